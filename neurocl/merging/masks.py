"""Masks over one shared task vector: TALL masks, consensus merging, EMR, and experts compressed with them.

``N`` models, ``*shape`` the shape of one parameter, P entries of one tensor. A task vector is a fine-tuned tensor less
the base tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.arithmetic import task_arithmetic
from neurocl.merging.method import measured_on, merge_method
from neurocl.merging.ties import Density, TiesMeasurement, Trim, elect_and_combine
from neurocl.runs import write_error

Multitask = Literal["sum", "ties-sum"]
FILE_FORMAT = "neurocl-compressed-experts"


def tall_mask(base: Tensor, model: Tensor, multitask: Tensor, threshold: float) -> Tensor:
    """Entries of the multi-task model that matter to one model.

    Args:
        base: pre-trained tensor, [*shape].
        model: fine-tuned tensor, [*shape].
        multitask: merged tensor, [*shape].
        threshold: lambda of the paper; larger keeps fewer entries.

    Returns: [*shape] bool: where |base - model| > threshold * |multitask - model|.

    Reference: Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024,
    arXiv 2405.07813.
    """
    return (base - model).abs() > (multitask - model).abs() * threshold


class ConsensusMeasurement:
    """What the multi-task model of a consensus merge needs: nothing for a sum, the thresholds of TIES otherwise."""

    def __init__(
        self,
        num_models: int,
        multitask: Multitask = "sum",
        density: float = 0.2,
        weights: Tensor | None = None,
    ) -> None:
        self.ties = TiesMeasurement(num_models, density, weights=weights) if multitask == "ties-sum" else None
        self.reads_data = self.ties is not None

    def update(self, base: Tensor, models: Tensor) -> None:
        """Take in one piece: ``base`` [n], ``models`` [N, n]."""
        if self.ties is not None:
            self.ties.update(base, models)

    def another_pass(self) -> bool:
        """Whether TIES asks for one."""
        return self.ties is not None and self.ties.another_pass()

    def multitask(self, base: Tensor, models: Tensor, weights: Tensor | None = None) -> Tensor:
        """The multi-task tensor, [*shape]."""
        if self.ties is None:
            return task_arithmetic(base, models, weights=weights)
        return elect_and_combine(base, models, self.ties, weights=weights, combine="sum")


@merge_method("consensus", measure=ConsensusMeasurement, measure_scope="model", returns_single=False)
def consensus(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    measured: ConsensusMeasurement | None = None,
    multitask: Multitask = "sum",
    threshold: Annotated[float, Field(ge=0)] = 0.4,
    min_tasks: Annotated[int, Field(ge=0)] = 2,
    density: Density = 0.2,
    trim: Trim = "model",
) -> Tensor:
    """Keep the entries of the merged task vector that several models need.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the task vectors in the multi-task model, [N], 1 if not given.
        measured: what TIES needs; taken over ``models`` if not given.
        multitask: the multi-task model is the sum of the task vectors, or what TIES elects of it (ties-sum).
        threshold: lambda of the TALL masks; larger masks are smaller.
        min_tasks: an entry stays if the masks of at least that many models hold it; 0 keeps all.
        density: share of each task vector that TIES keeps.
        trim: whether that share is of the whole model or of every tensor.

    Returns: merged tensor, [*shape].

    Reference: Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024,
    arXiv 2405.07813.
    """
    if measured is None:
        measured = measured_on(ConsensusMeasurement(len(models), multitask, density, weights), base, models)
    merged = measured.multitask(base, models, weights)
    needed_by = torch.zeros(base.shape, dtype=torch.int64, device=base.device)
    for model in models:
        needed_by += tall_mask(base, model, merged, threshold)
    return torch.where(needed_by >= min_tasks, merged, base)


def emr_unified(task_vectors: Tensor) -> Tensor:
    """The task vector that all models share: elected signs, largest magnitudes.

    Args:
        task_vectors: [N, *shape].

    Returns: [*shape]: sign of the sum (minus where it is 0) times the largest magnitude among those of that sign.

    Reference: Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024, arXiv 2405.17461.
    """
    # One after the other: the order in which a reduction adds may depend on the shape of the piece.
    total = task_vectors[0].clone()
    for task_vector in task_vectors[1:]:
        total += task_vector
    sign = torch.where(total > 0, 1.0, -1.0).to(total)
    largest = torch.zeros_like(total)
    for task_vector in task_vectors:
        largest = torch.maximum(largest, task_vector * sign)
    return largest * sign


def emr_mask(task_vector: Tensor, unified: Tensor) -> Tensor:
    """Entries whose sign agrees with the shared task vector, [*shape] bool."""
    # Where the shared task vector is 0 no model has an entry of the elected sign.
    return task_vector.sign() * unified.sign() > 0


def emr_rescaler(task_vectors: Mapping[str, Tensor], unified: Mapping[str, Tensor]) -> float:
    """Factor that gives the masked shared task vector the size of a model's own.

    Args:
        task_vectors: of one model, by tensor name.
        unified: shared task vectors by tensor name.

    Returns: the sum over tensors of the mean magnitude of the model's task vector, divided by that of the masked shared
        one; 1 if nothing is left. Means are taken per tensor, so a bias counts as much as a matrix.
    """
    return _ratio([_mean_magnitudes(value, unified[name]) for name, value in task_vectors.items()])


def _mean_magnitudes(task_vector: Tensor, unified: Tensor) -> tuple[float, float]:
    """Of a task vector and of the masked shared one."""
    if task_vector.numel() == 0:
        return 0.0, 0.0
    masked = torch.where(emr_mask(task_vector, unified), unified.abs(), 0.0)
    return float(task_vector.abs().mean()), float(masked.mean())


def _ratio(means: Sequence[tuple[float, float]]) -> float:
    own, masked = math.fsum(mean for mean, _ in means), math.fsum(mean for _, mean in means)
    return own / masked if masked > 0 else 1.0


@merge_method("emr")
def emr(base: Tensor, models: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Add the shared task vector of EMR, without masks and rescalers.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the task vectors, [N], 1 if not given.

    Returns: merged tensor, [*shape].

    Reference: Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024, arXiv 2405.17461.
    """
    task_vectors = models - base
    if weights is not None:
        for task_vector, weight in zip(task_vectors, weights, strict=True):
            task_vector *= weight
    return base + emr_unified(task_vectors)


@dataclass
class CompressedExperts:
    """Several fine-tuned models as one: the base, a shared task vector, one bit per entry and model, one factor each.

    Attributes:
        method: ``"emr"`` or ``"tall"``.
        base: the pre-trained state dict.
        unified: the shared task vector of every floating tensor.
        masks: packed bits of the same tensors, [N, ceil(P / 8)] uint8.
        rescalers: [N] float64.
    """

    method: str
    base: dict[str, Tensor]
    unified: dict[str, Tensor]
    masks: dict[str, Tensor]
    rescalers: Tensor

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.rescalers)

    def mask(self, index: int, name: str) -> Tensor:
        """Mask of expert ``index`` for the tensor ``name``, [*shape] bool."""
        shared = self.unified[name]
        return unpack_bits(self.masks[name][index], shared.numel()).view(shared.shape).to(shared.device)

    def expert(self, index: int) -> dict[str, Tensor]:
        """State dict of one expert: base + rescaler * mask * shared task vector, in the types of the base.

        Tensors that are not floating point are those of the base.
        """
        if not 0 <= index < self.num_experts:
            raise ValueError(f"expert must be in 0..{self.num_experts - 1}, got {index}")
        state = {}
        for name, value in self.base.items():
            if name in self.unified:
                own = torch.where(self.mask(index, name), self.unified[name].double() * self.rescalers[index], 0.0)
                state[name] = (value.double() + own).to(value.dtype)
            else:
                state[name] = value.clone()
        return state

    def sizes(self) -> dict[str, int]:
        """Bytes of each part, of the whole, and of what the separate experts would take with the base."""
        base = sum(value.nbytes for value in self.base.values())
        parts = {
            "base": base,
            "unified": sum(value.nbytes for value in self.unified.values()),
            "masks": sum(value.nbytes for value in self.masks.values()),
            "rescalers": self.rescalers.nbytes,
        }
        return {**parts, "total": sum(parts.values()), "separate": base * (1 + self.num_experts)}

    def save(self, path: Path) -> None:
        """Write one safetensors file; numbers of bits and the method are in its header.

        Raises:
            RunError: the file cannot be written; what was there is untouched.
        """
        tensors: dict[str, Tensor] = {"rescalers": self.rescalers}
        for part, values in (("base", self.base), ("unified", self.unified), ("masks", self.masks)):
            # The format refuses tensors that share memory, and tied weights do.
            tensors.update(
                {f"{part}/{name}": value.detach().cpu().clone().contiguous() for name, value in values.items()}
            )
        header = {
            "format": FILE_FORMAT,
            "method": self.method,
            "num_entries": json.dumps({name: value.numel() for name, value in self.unified.items()}),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata=header)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise write_error(path, error if isinstance(error, OSError) else OSError(str(error))) from None

    @classmethod
    def load(cls, path: Path) -> CompressedExperts:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: no such file, not a file of this kind, or parts that do not fit together, named.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as archive:
                header = archive.metadata() or {}
                tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        if header.get("format") != FILE_FORMAT or "rescalers" not in tensors or tensors["rescalers"].ndim != 1:
            raise UserError(f"{path}: holds no compressed experts")
        parts: dict[str, dict[str, Tensor]] = {"base": {}, "unified": {}, "masks": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            if part in parts:
                parts[part][name] = value
        loaded = cls(header.get("method", ""), parts["base"], parts["unified"], parts["masks"], tensors["rescalers"])
        loaded._check(path, header)
        return loaded

    def _check(self, path: Path, header: Mapping[str, str]) -> None:
        try:
            num_entries = json.loads(header.get("num_entries", ""))
        except ValueError:
            num_entries = None
        if not isinstance(num_entries, dict):
            raise UserError(f"{path}: the header does not say how many entries the masks have")
        if not (self.masks.keys() == self.unified.keys() <= self.base.keys()):
            raise UserError(f"{path}: base, shared task vectors and masks are not of the same tensors")
        for name, value in self.unified.items():
            packed = (self.num_experts, math.ceil(value.numel() / 8))
            fits = (
                num_entries.get(name) == value.numel()
                and self.masks[name].dtype == torch.uint8
                and tuple(self.masks[name].shape) == packed
                and self.base[name].shape == value.shape
            )
            if not fits:
                raise UserError(f"{path}: the parts of tensor {name!r} do not fit together")


def compress(
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    method: Literal["emr", "tall"] = "emr",
    *,
    threshold: float | Sequence[float] = 0.4,
    multitask: Multitask = "sum",
    density: float = 0.2,
    dtype: torch.dtype | None = None,
) -> CompressedExperts:
    """Replace several experts by a shared task vector and a mask each.

    Args:
        base: pre-trained state dict.
        models: fine-tuned state dicts with the same floating tensors.
        method: ``"emr"``, with a rescaler per expert, or ``"tall"``.
        threshold: lambda of the TALL masks, one for all or one per expert.
        multitask: of which sum the TALL masks are taken, see :func:`consensus`; TIES trims over the whole model.
        density: of TIES.
        dtype: type of the shared task vector; default that of the base, but at least float32.

    Raises:
        UserError: no models, or a floating tensor of the base that a model lacks or has in another shape, named.
        ValueError: there are neither one nor as many thresholds as models.
    """
    if not models:
        raise UserError("there are no experts to compress")
    thresholds = [threshold] * len(models) if isinstance(threshold, int | float) else list(threshold)
    if len(thresholds) != len(models):
        raise ValueError(f"{len(thresholds)} thresholds for {len(models)} experts")
    names = sorted(name for name, value in base.items() if value.is_floating_point())
    for name in names:
        for index, model in enumerate(models):
            if name not in model or model[name].shape != base[name].shape:
                found = list(model[name].shape) if name in model else "missing"
                raise UserError(f"tensor {name!r} is {list(base[name].shape)} in the base, {found} in expert {index}")
    measured = _measured_over(ConsensusMeasurement(len(models), multitask, density), base, models, names)
    unified, masks = {}, {}
    means: list[list[tuple[float, float]]] = [[] for _ in models]
    for name in names:
        pre_trained, tuned = _in_double(base, models, name)
        if method == "emr":
            task_vectors = tuned - pre_trained
            shared = emr_unified(task_vectors)
            bits = [emr_mask(task_vector, shared) for task_vector in task_vectors]
            for index, task_vector in enumerate(task_vectors):
                means[index].append(_mean_magnitudes(task_vector, shared))
        else:
            merged = measured.multitask(pre_trained, tuned)
            shared = merged - pre_trained
            bits = [
                tall_mask(pre_trained, model, merged, value) for model, value in zip(tuned, thresholds, strict=True)
            ]
        unified[name] = shared.to(dtype or torch.promote_types(base[name].dtype, torch.float32))
        masks[name] = torch.stack([pack_bits(mask) for mask in bits])
    rescalers = torch.tensor([_ratio(pairs) for pairs in means], dtype=torch.float64)
    return CompressedExperts(method, dict(base), unified, masks, rescalers)


def _in_double(base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], name: str) -> tuple[Tensor, Tensor]:
    """(base [*shape], models [N, *shape]) of one tensor."""
    return base[name].detach().double(), torch.stack([model[name].detach().double() for model in models])


def _measured_over(
    measurement: ConsensusMeasurement,
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
) -> ConsensusMeasurement:
    while measurement.ties is not None:
        for name in names:
            pre_trained, tuned = _in_double(base, models, name)
            measurement.update(pre_trained.reshape(-1), tuned.reshape(len(models), -1))
        if not measurement.another_pass():
            break
    return measurement


def pack_bits(mask: Tensor) -> Tensor:
    """Eight entries of a boolean tensor of P per byte, the first in the highest bit, [ceil(P / 8)] uint8 on the CPU."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy()))


def unpack_bits(packed: Tensor, num_entries: int) -> Tensor:
    """The first ``num_entries`` bits of ``packed`` [ceil(P / 8)] as a boolean tensor, [P], on the CPU."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=num_entries).astype(bool))
