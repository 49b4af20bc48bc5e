"""Merges of LoRA adapters: from factors to factors, layer by layer, in a table by name.

``T`` adapters, ``r`` rank, ``R`` sum of the ranks, ``o`` outputs, ``n`` inputs of a layer. Every merge returns layers
of scaling 1 in the dtype of the first adapter and computes in float64; scaling the result is a new ``scaling``.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.iso import iso_c, iso_cts
from neurocl.merging.knots import knots, merge_in_core_space
from neurocl.merging.lora import LoraLayer, Weights, check_sizes, nearest_of_rank, stacked_factors, weight_list
from neurocl.merging.method import MergeMethod, reference_in
from neurocl.merging.ties import Density, Sign
from neurocl.merging.tsv import tsv_merge
from neurocl.merging.wudi import wudi
from neurocl.registry import did_you_mean

__all__ = [
    "ADAPTER_MERGES",
    "AdapterMerge",
    "LoraLayer",
    "core_space_merge",
    "lora_cat",
    "lora_dare",
    "lora_linear",
    "lora_magnitude",
    "lora_svd",
    "lora_ties",
    "merge_adapters",
]

Rank = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class AdapterMerge(MergeMethod):
    """A merge of LoRA layers; ``name``, ``summary``, ``reference``, ``options`` and ``resolve`` as of any merge.

    Attributes:
        function: ``(layers of one place [T], *, weights, options) -> layer``, or for whole adapters
            ``(places of layers [T], *, weights, options) -> layers``.
        whole: the function looks at all layers together.
    """

    function: Callable[..., Any]
    whole: bool = False


ADAPTER_MERGES: dict[str, AdapterMerge] = {}

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def adapter_merge(name: str, **properties: Any) -> Callable[[FunctionT], FunctionT]:
    """Enter a function in :data:`ADAPTER_MERGES` and its declaration in ``.merge``.

    Args:
        name: lower case with hyphens.
        properties: further fields of :class:`AdapterMerge`.
    """

    def declare(function: FunctionT) -> FunctionT:
        reference = reference_in(inspect.getdoc(function) or "")
        ADAPTER_MERGES[name] = AdapterMerge(name, function, reference, **properties)
        function.merge = ADAPTER_MERGES[name]  # type: ignore[attr-defined]
        return function

    return declare


@adapter_merge("lora-svd", returns_single=True)
def lora_svd(layers: Sequence[LoraLayer], *, weights: Weights = None, rank: Rank | None = None) -> LoraLayer:
    """Best approximation of the sum of updates at a given rank.

    Ranks may differ. The dense update is never formed: its SVD is taken from the factors.

    Args:
        layers: one of each adapter.
        weights: one factor per adapter.
        rank: of the result; the largest of the inputs if None. From the sum of the ranks on the result is exact.
    Returns: the merged layer.
    Raises: UserError if sizes differ.

    Reference: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
    """
    a, b = stacked_factors(layers, weights)
    return nearest_of_rank(a, b, rank or max(layer.rank for layer in layers), layers[0].A.dtype)


@adapter_merge("lora-cat", returns_single=True)
def lora_cat(layers: Sequence[LoraLayer], *, weights: Weights = None) -> LoraLayer:
    """Exact sum of updates: factors side by side, ranks added.

    Args:
        layers: one of each adapter.
        weights: one factor per adapter.
    Returns: the merged layer, of rank R.
    Raises: UserError if sizes differ.

    Reference: Mangrulkar et al., "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods", 2022.
    """
    a, b = stacked_factors(layers, weights)
    return LoraLayer(a.to(layers[0].A.dtype), b.to(layers[0].A.dtype))


@adapter_merge("lora-linear", returns_single=True)
def lora_linear(layers: Sequence[LoraLayer], *, weights: Weights = None) -> LoraLayer:
    """Sum of the factors A and of the factors B; not the sum of updates.

    The product of summed factors has the cross terms ``B_i A_j``, so the update of two adapters differs from the sum
    of their updates, often by as much as the sum itself. It is here for results obtained with PEFT's ``linear``;
    ``lora-svd`` and ``lora-cat`` merge the updates.

    Args:
        layers: one of each adapter, equal ranks.
        weights: one factor per adapter; square roots go to both factors, the sign to A.
    Returns: the merged layer, of the common rank.
    Raises: UserError if sizes or ranks differ.

    Reference: Mangrulkar et al., "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods", 2022.
    """
    return _factor_by_factor(layers, weights, lambda values, factors, _: _weighted(values, factors).sum(dim=0))


@adapter_merge("lora-ties", returns_single=False)
def lora_ties(
    layers: Sequence[LoraLayer], *, weights: Weights = None, density: Density = 0.2, sign: Sign = "total"
) -> LoraLayer:
    """TIES on the factors A and on the factors B; has cross terms.

    As in PEFT's ``ties``: trimmed and elected per factor before weighting, zero votes count as positive. ``knots``
    works on the updates instead.

    Args:
        layers: one of each adapter, equal ranks.
        weights: one factor per adapter.
        density: share of the entries of a factor that stay.
        sign: elected by the sum of the entries (total) or of their signs (frequency).
    Returns: the merged layer, of the common rank.
    Raises: UserError if sizes or ranks differ.

    Reference: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708.
    """
    return _factor_by_factor(
        layers, weights, lambda values, factors, _: _agreeing_mean(_largest(values, density), factors, sign)
    )


@adapter_merge("lora-dare", returns_single=False, order_matters=True)
def lora_dare(
    layers: Sequence[LoraLayer],
    *,
    weights: Weights = None,
    name: str = "",
    density: Density = 0.5,
    then: Literal["linear", "ties"] = "linear",
    sign: Sign = "total",
    seed: int = 0,
) -> LoraLayer:
    """DARE on the factors A and on the factors B; has cross terms.

    Drops random entries and scales up the others, as PEFT's ``dare_linear`` and ``dare_ties`` are meant to. What is
    dropped depends on the seed, the name of the layer and the position of the adapter only.

    Args:
        layers: one of each adapter, equal ranks.
        weights: one factor per adapter.
        name: of the layer.
        density: probability that an entry stays.
        then: add the factors (linear) or merge them as TIES does.
        sign: for TIES: elected by the sum of the entries (total) or of their signs (frequency).
        seed: of the random choice.
    Returns: the merged layer, of the common rank.
    Raises: UserError if sizes or ranks differ.

    Reference: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    ICML 2024, arXiv 2311.03099.
    """

    def merge(values: Tensor, factors: Tensor, letter: str) -> Tensor:
        kept = [_random_mask(value, density, f"{seed}/{name}/{letter}/{index}") for index, value in enumerate(values)]
        thinned = values * torch.stack(kept) / density
        return _weighted(thinned, factors).sum(dim=0) if then == "linear" else _agreeing_mean(thinned, factors, sign)

    return _factor_by_factor(layers, weights, merge)


@adapter_merge("lora-magnitude", returns_single=False)
def lora_magnitude(layers: Sequence[LoraLayer], *, weights: Weights = None, density: Density = 0.5) -> LoraLayer:
    """Sum of pruned factors A and of pruned factors B; has cross terms.

    Of each factor the entries of largest magnitude stay.

    Args:
        layers: one of each adapter, equal ranks.
        weights: one factor per adapter.
        density: share of the entries of a factor that stay.
    Returns: the merged layer, of the common rank.
    Raises: UserError if sizes or ranks differ.

    Reference: Mangrulkar et al., "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods", 2022.
    """
    return _factor_by_factor(
        layers, weights, lambda values, factors, _: _weighted(_largest(values, density), factors).sum(dim=0)
    )


CORE_FUNCTIONS: tuple[Any, ...] = (tsv_merge, iso_c, iso_cts, wudi)
CORE_MERGES: dict[str, MergeMethod] = {function.merge.name: function.merge for function in CORE_FUNCTIONS}


@adapter_merge("core-space", returns_single=False)
def core_space_merge(
    layers: Sequence[LoraLayer],
    *,
    weights: Weights = None,
    merge: Literal["tsv-m", "iso-c", "iso-cts", "wudi"] = "tsv-m",
    merge_options: dict[str, Any] | None = None,
    rank: Rank | None = None,
) -> LoraLayer:
    """A merge of matrices on the small cores that stand for the updates.

    Args:
        layers: one of each adapter; ranks may differ.
        weights: one factor per adapter.
        merge: which one.
        merge_options: its options.
        rank: of the result; None keeps the result exactly, at up to the sum of the ranks.
    Returns: the merged layer.
    Raises: UserError if sizes differ or an option of the merge is wrong.

    Reference: Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025,
    arXiv 2509.17786.
    """
    return merge_in_core_space(layers, CORE_MERGES[merge], weights=weights, rank=rank, options=merge_options)


adapter_merge("knots", whole=True, returns_single=False)(knots)


def merge_adapters(
    adapters: Sequence[Mapping[str, LoraLayer]],
    method: str = "lora-svd",
    *,
    weights: Weights = None,
    **options: Any,
) -> dict[str, LoraLayer]:
    """Merge adapters, given as their layers by name.

    Args:
        adapters: T adapters that adapt the same layers.
        method: a name in :data:`ADAPTER_MERGES`.
        weights: one factor per adapter; 1 if None.
        options: of the method.
    Returns: the merged layers by name, in the order of the first adapter.
    Raises: UserError if the method or an option is unknown, the adapters adapt different layers, or a layer does not
        fit; the message names the layer.
    """
    if method not in ADAPTER_MERGES:
        close = did_you_mean(method, ADAPTER_MERGES)
        raise UserError(f"unknown merge of adapters {method!r}{close} (choose from {', '.join(ADAPTER_MERGES)})")
    chosen = ADAPTER_MERGES[method]
    arguments = {**chosen.resolve(options), "weights": weight_list(adapters, weights)}
    names = list(adapters[0])
    for index, adapter in enumerate(adapters):
        odd = sorted(set(names).symmetric_difference(adapter))
        if odd:
            has, lacks = (index, 0) if odd[0] in adapter else (0, index)
            raise UserError(f"layer {odd[0]!r} is adapted by adapter {has + 1} but not by adapter {lacks + 1}")
    places = [[adapter[name] for adapter in adapters] for name in names]
    for name, layers in zip(names, places, strict=True):
        try:
            check_sizes(layers)
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}") from None
    if chosen.whole:
        return dict(zip(names, chosen.function(places, **arguments), strict=True))
    merged = {}
    for name, layers in zip(names, places, strict=True):
        supplied = {"name": name} if "name" in chosen.supplied else {}
        try:
            merged[name] = chosen.function(layers, **arguments, **supplied)
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}") from None
    return merged


def _factor_by_factor(
    layers: Sequence[LoraLayer], weights: Weights, merge: Callable[[Tensor, Tensor, str], Tensor]
) -> LoraLayer:
    """Merge the stacked A [T, r, n], then the stacked B [T, o, r], each with one factor per adapter [T]."""
    check_sizes(layers, same_rank=True)
    factors = [weight * layer.scaling for weight, layer in zip(weight_list(layers, weights), layers, strict=True)]
    dtype, device = layers[0].A.dtype, layers[0].A.device
    signed = torch.tensor([math.copysign(math.sqrt(abs(factor)), factor) for factor in factors], dtype=torch.float64)
    signed = signed.to(device)
    a = merge(torch.stack([layer.A.double() for layer in layers]), signed, "A")
    b = merge(torch.stack([layer.B.double() for layer in layers]), signed.abs(), "B")
    return LoraLayer(a.to(dtype), b.to(dtype))


def _weighted(values: Tensor, factors: Tensor) -> Tensor:
    return values * factors[:, None, None]


def _largest(values: Tensor, density: float) -> Tensor:
    """The largest entries of each of ``values`` [T, p, q] by magnitude, at least one, zeros elsewhere."""
    size = values[0].numel()
    if not size:
        return values
    num_kept = max(1, int(density * size))
    threshold = values.abs().flatten(1).kthvalue(size - num_kept + 1, dim=1).values
    return torch.where(values.abs() >= threshold[:, None, None], values, 0)


def _agreeing_mean(values: Tensor, factors: Tensor, sign: Sign) -> Tensor:
    """Weighted sum of the entries that have the elected sign over their number, as PEFT merges trimmed factors."""
    votes = (values if sign == "total" else values.sign()).sum(dim=0)
    agrees = values.sign() == torch.where(votes >= 0, 1.0, -1.0)
    return (_weighted(values, factors) * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def _random_mask(like: Tensor, density: float, key: str) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return (torch.rand(like.shape, dtype=torch.float64, generator=generator) < density).to(like)
