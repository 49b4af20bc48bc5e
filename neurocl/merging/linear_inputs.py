"""What reaches the linear layers of a network: taps, the hooks that read them, and their Gram matrices.

``B`` samples of a batch, ``S`` tokens, ``n`` rows (samples x tokens), ``d`` input features, ``o`` output features.

A tap is one matrix W [o, d] of a network with a way to see its inputs: an ``nn.Linear``, an ``nn.Conv2d`` read as a
matrix on unfolded patches, and the two projections inside ``nn.MultiheadAttention``, which are bare parameters.
GPT-2's ``Conv1D`` (a transposed matrix) is not read; such layers have no Gram matrix and are averaged by merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRAM_BLOCK_ROWS = 1024

Batch = Any
Forward = Callable[[nn.Module, Batch], Any]
RowMask = Callable[[Batch], Tensor | None]


@dataclass(frozen=True)
class Tap:
    """One matrix of a network and the module whose call shows its inputs.

    Attributes:
        name: path of the layer, ``"blocks.0.fc1"``; ``"attn.in_proj"`` and ``"attn.out_proj"`` for attention.
        weight: name of the matrix among the parameters.
        bias: name of its bias, or None.
        module: path of the module that is hooked.
        part: which input of that module.
    """

    name: str
    weight: str
    bias: str | None
    module: str
    part: Literal["linear", "conv", "in_proj", "out_proj"]


def find_taps(module: nn.Module, *, conv: bool = False) -> list[Tap]:
    """All matrices whose inputs can be read, in the order of registration.

    A matrix that is also an embedding table (a tied output layer) is left out: its rows answer to two kinds of input.
    Grouped convolutions are left out: they are several matrices.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    inside_attention = {
        f"{name}.out_proj" for name, part in module.named_modules() if isinstance(part, nn.MultiheadAttention)
    }
    found: list[Tap] = []
    bias: str | None
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, nn.MultiheadAttention):
            if part.in_proj_weight is not None:
                bias = None if part.in_proj_bias is None else f"{prefix}in_proj_bias"
                found.append(Tap(f"{prefix}in_proj", f"{prefix}in_proj_weight", bias, name, "in_proj"))
            bias = None if part.out_proj.bias is None else f"{prefix}out_proj.bias"
            found.append(Tap(f"{prefix}out_proj", f"{prefix}out_proj.weight", bias, name, "out_proj"))
        elif name in inside_attention:
            continue  # nn.MultiheadAttention never calls it; the tap above reads it
        elif isinstance(part, nn.Linear) and id(part.weight) not in tables:
            bias = None if part.bias is None else f"{prefix}bias"
            found.append(Tap(name, f"{prefix}weight", bias, name, "linear"))
        elif conv and isinstance(part, nn.Conv2d) and part.groups == 1:
            bias = None if part.bias is None else f"{prefix}bias"
            found.append(Tap(name, f"{prefix}weight", bias, name, "conv"))
    return found


def tap_input(tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor [..., d] that ``tap`` sees in one call of its module, or None if it is not a single one.

    The fused input projection of attention has one Gram matrix only when query, key and value are the same tensor.
    """
    if tap.part in ("in_proj", "out_proj"):
        assert isinstance(module, nn.MultiheadAttention)
        call = _attention_call(args, kwargs)
        if tap.part == "out_proj":
            return _attention_context(module, call)
        query: Tensor = call["query"]
        return query if call["key"] is query and call["value"] is query else None
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    if tap.part == "conv":
        assert isinstance(module, nn.Conv2d)
        return unfolded(module, value).transpose(1, 2)
    return value


def unfolded(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Patches of ``images`` [B, c, h, w] that the kernel sees, [B, c * kh * kw, L]."""
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(padding):
        images = F.pad(images, padding, mode=mode)
    return F.unfold(images, module.kernel_size, module.dilation, 0, module.stride)


def _attention_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    return {"key_padding_mask": None, "attn_mask": None, **dict(zip(names, args, strict=False)), **kwargs}


def _attention_context(module: nn.MultiheadAttention, call: Mapping[str, Any]) -> Tensor:
    """What the output projection of attention receives: the same attention with the identity in its place."""
    query, key, value = call["query"], call["key"], call["value"]
    swap = module.batch_first and query.ndim == 3
    if swap:
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    context, _ = F.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        0.0,
        torch.eye(module.embed_dim, dtype=query.dtype, device=query.device),
        torch.zeros(module.embed_dim, dtype=query.dtype, device=query.device),
        training=False,
        key_padding_mask=call["key_padding_mask"],
        need_weights=False,
        attn_mask=call["attn_mask"],
        use_separate_proj_weight=not module._qkv_same_embed_dim,
        q_proj_weight=module.q_proj_weight,
        k_proj_weight=module.k_proj_weight,
        v_proj_weight=module.v_proj_weight,
        is_causal=bool(call.get("is_causal", False)),
    )
    return context.transpose(0, 1) if swap else context


@contextmanager
def watched(module: nn.Module, taps: list[Tap], receive: Callable[[Tap, Tensor], None]) -> Iterator[None]:
    """Call ``receive(tap, input)`` whenever a tapped layer runs; the hooks are gone afterwards, whatever happens."""
    by_module: dict[str, list[Tap]] = {}
    for tap in taps:
        by_module.setdefault(tap.module, []).append(tap)
    handles = []

    def hook_for(own: list[Tap]) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for tap in own:
                value = tap_input(tap, part, args, kwargs)
                if value is not None:
                    receive(tap, value.detach())

        return hook

    try:
        for path, own in by_module.items():
            part = module.get_submodule(path)
            handles.append(part.register_forward_pre_hook(hook_for(own), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for ``module``; every part gets its own training flag back."""
    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in flags.items():
            part.training = training


def moved(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [moved(value, device) for value in batch]
    return batch


def run(module: nn.Module, batch: Batch) -> Any:
    """``module`` on a batch: a tensor, the first of a list or tuple ``(x, y)``, or a dict as keyword arguments."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch[0] if isinstance(batch, list | tuple) else batch)


def batch_size(batch: Batch) -> int:
    """Number of samples: the length of the first tensor in the batch.

    Raises:
        ValueError: the batch holds no tensor.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ValueError("a batch must be a tensor, a list or tuple that starts with one, or a dict of tensors")


def attention_mask(batch: Batch) -> Tensor | None:
    """The ``attention_mask`` of a dict batch: [B, S], zero where a token is padding."""
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def rows_of(value: Tensor, mask: Tensor | None) -> Tensor:
    """Rows [n, d] of a layer's input [..., d], without padding where the layer sees all tokens of ``mask`` [B, S]."""
    rows = value.reshape(-1, value.shape[-1])
    keep = row_selection(value, mask)
    return rows if keep is None else rows[keep]


def row_selection(value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which rows of a layer's input [..., d] are no padding, [n] bool; None if the mask is not about these rows."""
    if mask is None:
        return None
    leading = value.shape[:-1]
    if leading == mask.shape or leading == (mask.numel(),):
        return mask.reshape(-1).bool()
    if leading == mask.T.shape:
        return mask.T.reshape(-1).bool()
    return None


def add_gram(total: Tensor, left: Tensor, right: Tensor | None = None) -> None:
    """Add ``left^T right`` (``right = left`` if None) to ``total`` [d, d], or its diagonal if ``total`` is [d].

    Products of at most 1024 rows are made in float32 (float64 for float64 rows) and added up in float64, so that
    neither half-precision inputs overflow nor long sums lose digits.
    """
    right = left if right is None else right
    work = torch.float64 if left.dtype == torch.float64 else torch.float32
    for start in range(0, len(left), GRAM_BLOCK_ROWS):
        a = left[start : start + GRAM_BLOCK_ROWS].to(work)
        b = a if right is left else right[start : start + GRAM_BLOCK_ROWS].to(work)
        total += (a * b).sum(0) if total.ndim == 1 else a.T @ b
