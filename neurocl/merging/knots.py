"""Spaces that the LoRA layers of several adapters share: KnOTS, and the core space where any merge is cheap.

``T`` adapters, ``r`` their ranks, ``R`` sum of the ranks, ``o`` outputs, ``n`` inputs of a layer, ``k`` and ``l``
dimensions of the spaces of outputs and of inputs that the adapters reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.linear_algebra import column_basis
from neurocl.merging.lora import LoraLayer, Weights, check_sizes, nearest_of_rank, stacked_factors, weight_list
from neurocl.merging.method import MergeMethod
from neurocl.merging.ties import Combine, Density, Sign, ties

# Directions of the shared space below this singular value are dropped, as in the authors' code.
SMALLEST_SINGULAR_VALUE = 1e-5


def shared_svd(layers: Sequence[LoraLayer]) -> tuple[Tensor, Tensor, Tensor]:
    """One basis of outputs for the updates of all adapters, and each update in it.

    The SVD ``[Delta_1 ... Delta_T] = U S [V_1^T ... V_T^T]`` of the updates side by side, taken from the factors.

    Returns: U [o, k]; the task parts ``S V_t^T`` [T, k, n], with ``U @ parts[t]`` the update of adapter t; the singular
        values [k]. All in float64.
    Raises: UserError if the sizes of the layers differ.

    Reference: Stoica et al., "Model merging with SVD to tie the Knots", ICLR 2025, arXiv 2410.19735.
    """
    check_sizes(layers)
    basis, triangle = torch.linalg.qr(torch.cat([layer.B.double() for layer in layers], dim=1))
    ranks = [layer.rank for layer in layers]
    inputs = [torch.linalg.qr(layer.A.double().mT) for layer in layers]
    small = [
        layer.scaling * (up @ down.R.mT)
        for layer, up, down in zip(layers, triangle.split(ranks, dim=1), inputs, strict=True)
    ]
    left, values, right = torch.linalg.svd(torch.cat(small, dim=1), full_matrices=False)
    kept = values > SMALLEST_SINGULAR_VALUE
    parts = (values[kept].unsqueeze(-1) * right[kept]).split([block.shape[1] for block in small], dim=1)
    tasks = torch.stack([part @ down.Q.mT for part, down in zip(parts, inputs, strict=True)])
    return basis @ left[:, kept], tasks, values[kept]


def knots(
    layers: Sequence[Sequence[LoraLayer]],
    *,
    weights: Weights = None,
    density: Density = 0.2,
    sign: Sign = "total",
    combine: Combine = "mean",
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    seed: int = 0,
    rank: Annotated[int, Field(ge=1)] | None = None,
) -> list[LoraLayer]:
    """TIES, or DARE and TIES, in the output space that the adapters share.

    Thresholds and votes are those of the task parts of all layers together.

    Args:
        layers: for every layer, that layer of each adapter.
        weights: one factor per adapter.
        density: share of each adapter's entries that TIES keeps.
        sign: elected by the sum of entries (total) or of their signs (frequency).
        combine: mean, sum or largest of the agreeing entries.
        drop: share of the entries that DARE drops at random before, scaling up the others; 0 leaves DARE out.
        seed: of DARE.
        rank: of the merged layers; None keeps the result exactly, at up to the sum of the ranks.
    Returns: the merged layers, scaling 1.
    Raises: UserError if the sizes of a layer differ between adapters.

    Reference: Stoica et al., "Model merging with SVD to tie the Knots", ICLR 2025, arXiv 2410.19735.
    """
    if not layers:
        return []
    factors = torch.tensor(weight_list(layers[0], weights), dtype=torch.float64)
    bases, parts = [], []
    for tasks in layers:
        basis, task_parts, _ = shared_svd(tasks)
        bases.append(basis)
        parts.append(task_parts)
    flat = torch.cat([part.flatten(1) for part in parts], dim=1)
    if drop:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(flat.shape, dtype=torch.float64, generator=generator) >= drop
        flat = flat * kept.to(flat) / (1 - drop)
    merged = ties(torch.zeros_like(flat[0]), flat, weights=factors, density=density, sign=sign, combine=combine)
    results = []
    for tasks, basis, part, values in zip(
        layers, bases, parts, merged.split([part[0].numel() for part in parts]), strict=True
    ):
        down, dtype = values.view_as(part[0]), tasks[0].A.dtype
        results.append(
            LoraLayer(down.to(dtype), basis.to(dtype)) if rank is None else nearest_of_rank(down, basis, rank, dtype)
        )
    return results


class CoreSpace(NamedTuple):
    """Small matrices that stand for the updates of all adapters without loss.

    Attributes:
        outputs: orthonormal basis U_B [o, k] of all columns of the B.
        cores: ``U_B^T Delta_t V_A`` [T, k, l], with ``outputs @ cores[t] @ inputs.T`` the update of adapter t.
        inputs: orthonormal basis V_A [n, l] of all rows of the A.
    """

    outputs: Tensor
    cores: Tensor
    inputs: Tensor

    def lift(self, core: Tensor) -> LoraLayer:
        """The layer that a core [k, l] stands for, in float64."""
        return LoraLayer(core @ self.inputs.mT, self.outputs)


def core_space(layers: Sequence[LoraLayer]) -> CoreSpace:
    """The bases that the adapters of one layer reach, and the update of each in them; in float64.

    Raises:
        UserError: the sizes of the layers differ.

    Reference: Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025,
    arXiv 2509.17786.
    """
    a, b = stacked_factors(layers)
    outputs, inputs = column_basis(b), column_basis(a.mT)
    cores = [layer.scaling * (outputs.mT @ layer.B.double()) @ (layer.A.double() @ inputs) for layer in layers]
    return CoreSpace(outputs, torch.stack(cores), inputs)


def merge_in_core_space(
    layers: Sequence[LoraLayer],
    method: MergeMethod,
    *,
    weights: Weights = None,
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> LoraLayer:
    """Run a merge of matrices on the cores of one layer and lift the result back.

    For merges that commute with orthogonal transforms (sums, TSV-Merge) this is the merge of the dense updates; those
    that work entry by entry, and those that count the directions of the matrix (Iso-C), act on the core instead.

    Args:
        layers: one layer of each adapter.
        method: a merge of weights without statistics.
        weights: one factor per adapter.
        rank: of the result; None keeps it exactly.
        options: of the merge.
    Returns: the merged layer, scaling 1.
    Raises: UserError if the merge needs statistics, takes no weights though some are given, or an option is wrong.
    """
    if method.statistic is not None:
        raise UserError(f"{method.name} needs statistics of the inputs and cannot run in the core space")
    factors = weight_list(layers, weights)
    arguments = method.resolve(options or {})
    if "weights" in method.supplied and weights is not None:
        arguments["weights"] = torch.tensor(factors, dtype=torch.float64)
    elif weights is not None:
        raise UserError(f"{method.name} takes no per-model weights")
    space = core_space(layers)
    lifted = space.lift(method.function(torch.zeros_like(space.cores[0]), space.cores, **arguments))
    dtype = layers[0].A.dtype
    if rank is not None:
        return nearest_of_rank(lifted.A, lifted.B, rank, dtype)
    return LoraLayer(lifted.A.to(dtype), lifted.B.to(dtype))
