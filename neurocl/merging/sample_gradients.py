"""The gradient of every single sample of a batch, from what enters a layer and what flows back into its output.

``B`` samples, ``R`` rows (tokens, image patches) of one sample, ``d`` inputs, ``o`` outputs of a layer.

One backward pass gives the output gradients g of all samples at once; the gradient of a weight for sample n is the sum
over its rows of g a^T, so no backward pass per sample is needed. Parameters that belong to no such layer (a class
embedding) are differentiated sample by sample through ``torch.func``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from neurocl.errors import RunError, UserError
from neurocl.merging.linear_inputs import Batch, Forward, row_selection, unfolded

GRADIENT_VALUES = 1 << 24  # of all samples in one chunk
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding)


@dataclass(frozen=True)
class Call:
    """One call of a layer inside a forward pass.

    Attributes:
        name: path of the layer.
        layer: the layer.
        inputs: what it was given, detached.
        output: what it returned, part of the graph.
        version: of ``inputs``, to notice that the network changed them afterwards.
    """

    name: str
    layer: nn.Module
    inputs: Tensor
    output: Tensor
    version: int


def record(layers: Mapping[str, nn.Module], calls: list[Call]) -> list[Any]:
    """Append every call of ``layers`` (path -> layer) to ``calls``; returns the hook handles to remove."""

    def hook_for(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            value: Tensor = args[0] if args else next(iter(kwargs.values()))
            if not output.requires_grad:
                output.requires_grad_()
            calls.append(Call(name, layer, value.detach(), output, value._version))
            return output.clone()  # an in-place activation must not touch what gradients are asked for

        return hook

    return [layer.register_forward_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]


class Layout:
    """Which axis of an activation counts the samples: the first, or the second in sequence-first networks.

    Where both axes have the length of the batch, what the same layer showed in another batch decides.
    """

    def __init__(self, batch_first: bool | None) -> None:
        self.batch_first = batch_first
        self.known: dict[str, bool] = {}

    def by_sample(self, name: str, value: Tensor, size: int, trailing: int) -> Tensor:
        """``value`` [..., *last] as [B, R, *last], where ``last`` are its ``trailing`` last axes.

        Raises:
            UserError: no axis fits the batch, or two do.
        """
        leading, last = value.shape[: value.ndim - trailing], value.shape[value.ndim - trailing :]
        if len(leading) >= 2 and not self._first(name, leading, size):
            value = value.transpose(0, 1)
            leading = value.shape[: value.ndim - trailing]
        if not leading or leading[0] % size:
            raise UserError(
                f"layer {name!r} sees a tensor of shape {list(value.shape)}, which no batch of {size} fits; "
                "layers that run once for a whole batch can be left out by parameter patterns"
            )
        per_sample: Tensor = value.reshape(size, -1, *last)
        return per_sample

    def _first(self, name: str, leading: torch.Size, size: int) -> bool:
        if self.batch_first is not None:
            return self.batch_first
        if leading[0] == leading[1] == size:
            if name in self.known:
                return self.known[name]
            raise UserError(
                f"layer {name!r} sees {size} tokens of {size} samples, so it is not clear which axis is which; "
                "use another batch size or say batch_first=True or False"
            )
        self.known[name] = leading[1] != size
        return self.known[name]


@dataclass(frozen=True)
class Rows:
    """A call of an ``nn.Linear`` sample by sample: ``inputs`` [B, R, d] and ``keep`` [B, R], false where padding."""

    inputs: Tensor
    keep: Tensor | None

    @classmethod
    def of(cls, call: Call, layout: Layout, size: int, mask: Tensor | None) -> Rows:
        inputs = layout.by_sample(call.name, call.inputs, size, 1)
        keep = row_selection(call.inputs, mask)
        if keep is not None:
            keep = layout.by_sample(call.name, keep.reshape(call.inputs.shape[:-1]), size, 0).reshape(size, -1)
        return cls(inputs, keep)

    @property
    def num_rows(self) -> int:
        """Rows of all samples, padding left out."""
        return self.inputs.shape[0] * self.inputs.shape[1] if self.keep is None else int(self.keep.sum())

    def scaled(self, values: Tensor) -> Tensor:
        """``values`` [B, R, k] as rows [n, k], divided by the root of the number of rows of their sample."""
        if self.keep is None:
            return values.reshape(-1, values.shape[2]) / math.sqrt(values.shape[1])
        counts = self.keep.sum(1, keepdim=True).clamp(min=1).to(values.dtype)
        return (values / counts.sqrt().unsqueeze(2))[self.keep]


def layer_gradients(call: Call, gradient: Tensor, layout: Layout, size: int) -> dict[str, Callable[[slice], Tensor]]:
    """Per-sample gradients of the parameters of one layer, made on demand for a slice of the samples.

    Args:
        call: the recorded call.
        gradient: of a sum over samples with respect to ``call.output``.
        layout: which axis counts the samples.
        size: number of samples.
    Returns: parameter name inside the layer -> function from a slice of samples to [b, *shape].
    Raises:
        RunError: the network changed the layer's input in place after the call.
        UserError: the samples cannot be told apart.
    """
    layer, name = call.layer, call.name
    if call.inputs._version != call.version:
        raise RunError(f"layer {name!r}: its input was changed in place after the call, so its gradient is unknown")
    made: dict[str, Callable[[slice], Tensor]] = {}
    if isinstance(layer, nn.Linear):
        a = layout.by_sample(name, call.inputs, size, 1)
        g = layout.by_sample(name, gradient, size, 1)
        made["weight"] = lambda part: torch.einsum("bro,brd->bod", g[part], a[part])
        made["bias"] = lambda part: g[part].sum(1)
    elif isinstance(layer, nn.Conv2d):
        groups = layer.groups
        patches = unfolded(layer, call.inputs).reshape(size, groups, -1, gradient.shape[-2] * gradient.shape[-1])
        flat = gradient.reshape(size, groups, -1, patches.shape[-1])
        shape = layer.weight.shape
        made["weight"] = lambda part: torch.einsum("bgol,bgdl->bgod", flat[part], patches[part]).reshape(-1, *shape)
        made["bias"] = lambda part: gradient[part].sum((2, 3))
    elif isinstance(layer, nn.LayerNorm):
        last = len(layer.normalized_shape)
        normal = F.layer_norm(call.inputs, layer.normalized_shape, eps=layer.eps)
        product = layout.by_sample(name, gradient * normal, size, last)
        plain = layout.by_sample(name, gradient, size, last)
        made["weight"] = lambda part: product[part].sum(1)
        made["bias"] = lambda part: plain[part].sum(1)
    elif isinstance(layer, nn.Embedding):
        tokens = layout.by_sample(name, call.inputs, size, 0).reshape(size, -1)
        flow = layout.by_sample(name, gradient, size, 1)
        made["weight"] = lambda part: _table_gradients(layer, tokens[part], flow[part])
    else:
        raise ValueError(f"no per-sample gradient for {type(layer).__name__}")
    return {key: make for key, make in made.items() if getattr(layer, key, None) is not None}


def _table_gradients(layer: nn.Embedding, tokens: Tensor, gradient: Tensor) -> Tensor:
    """Dense per-sample gradients [b, vocabulary, d] of an embedding table, for tables that other layers share."""
    if layer.padding_idx is not None:
        gradient = gradient * (tokens != layer.padding_idx).unsqueeze(-1)
    result = gradient.new_zeros(len(tokens), *layer.weight.shape)
    return result.scatter_add_(1, tokens.unsqueeze(-1).expand_as(gradient), gradient)


def add_embedding_squares(total: Tensor, call: Call, gradient: Tensor, layout: Layout, size: int) -> None:
    """Add squared per-sample gradients of an embedding table to ``total`` [vocabulary, d], rows that occur only."""
    layer = call.layer
    assert isinstance(layer, nn.Embedding)
    tokens = layout.by_sample(call.name, call.inputs, size, 0).reshape(size, -1)
    g = layout.by_sample(call.name, gradient, size, 1).reshape(-1, gradient.shape[-1])
    samples = torch.arange(size, device=tokens.device).unsqueeze(1)
    pairs, where = (samples * layer.num_embeddings + tokens).reshape(-1).unique(return_inverse=True)
    sums = torch.zeros(len(pairs), g.shape[-1], dtype=total.dtype, device=g.device)
    sums.index_add_(0, where, g.to(total.dtype))
    words = pairs % layer.num_embeddings
    if layer.padding_idx is not None:
        sums[words == layer.padding_idx] = 0  # never trained
    total.index_add_(0, words, sums.square())


def chunks(size: int, values: int) -> list[slice]:
    """Slices of ``size`` samples whose gradients of ``values`` numbers each fit the working memory."""
    step = max(1, GRADIENT_VALUES // max(1, values))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class _Whole(nn.Module):
    """A module whose forward pass is ``forward(inner, batch)``, so that ``functional_call`` reaches it."""

    def __init__(self, inner: nn.Module, through: Forward) -> None:
        super().__init__()
        self.inner = inner
        self.through = through

    def forward(self, batch: Batch) -> Any:
        return self.through(self.inner, batch)


def bare_gradients(module: nn.Module, forward: Forward, names: list[str], batch: Batch, seed: Tensor) -> list[Tensor]:
    """Per-sample gradients of parameters that no recorded layer owns.

    Args:
        module: the network, without hooks that keep tensors.
        forward: from network and batch to the output [B, K].
        names: the parameters.
        batch: a tensor, or a list or dict of tensors that all count samples along their first axis.
        seed: what flows back into the output of every sample, [B, K].
    Returns: one [B, *shape] per name.
    """
    whole = _Whole(module, forward)
    values = {f"inner.{name}": module.get_parameter(name).detach() for name in names}

    def single(weights: dict[str, Tensor], sample: Batch, own: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(whole, weights, (_alone(sample),))
        return (output[0] * own).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
        gradients = torch.func.vmap(torch.func.grad(single), in_dims=(None, 0, 0))(values, batch, seed)
    return [gradients[f"inner.{name}"] for name in names]


def _alone(sample: Batch) -> Batch:
    if isinstance(sample, Mapping):
        return {key: value.unsqueeze(0) for key, value in sample.items()}
    if isinstance(sample, list | tuple):
        return [value.unsqueeze(0) for value in sample]
    return sample.unsqueeze(0)
