"""A pool of task vectors over one base, to which tasks are added and from which they are taken away again.

``T`` tasks in the pool. A task vector maps names of the base's parameters to their difference from the base, dense or
as LoRA factors; parameters that it lacks are not changed by the task.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.lora import LoraLayer
from neurocl.registry import did_you_mean
from neurocl.runs import make_folder, read_json, sha256, write_atomically

POOL_SCHEMA = 1
INDEX = "index.json"
SCALINGS = "neurocl.lora_scalings"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

State = Mapping[str, Tensor]
TaskVector = Mapping[str, "Tensor | LoraLayer"]


def task_vector(base: State, model: State) -> dict[str, Tensor]:
    """Differences ``model - base`` of all floating tensors that changed, in float32 or the base's wider type.

    Raises:
        UserError: names or shapes differ.
    """
    if odd := set(base) ^ set(model):
        raise UserError(f"base and model do not have the same parameters: {min(odd)!r} is in only one of them")
    found = {}
    for name, value in base.items():
        if value.shape != model[name].shape:
            raise UserError(
                f"{name!r} has shape {list(value.shape)} in the base, {list(model[name].shape)} in the model"
            )
        if value.is_floating_point() and not torch.equal(value, model[name]):
            wide = torch.promote_types(value.dtype, torch.float32)
            found[name] = (model[name].double() - value.double()).to(wide)
    return found


class TaskVectorPool:
    """Named task vectors over one base; what is composed depends on which are in it, not on their history.

    Args:
        base: the state dict that all tasks were fine-tuned from; it is kept, not copied.
    """

    def __init__(self, base: State) -> None:
        self.base = base
        self._vectors: dict[str, dict[str, Tensor | LoraLayer]] = {}

    def __len__(self) -> int:
        return len(self._vectors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._vectors

    @property
    def names(self) -> list[str]:
        """Tasks in alphabetical order, in which they are added up."""
        return sorted(self._vectors)

    def vector(self, name: str) -> TaskVector:
        """The task vector of a task.

        Raises:
            UserError: no such task.
        """
        if name not in self._vectors:
            hint = did_you_mean(name, self.names)
            raise UserError(f"the pool has no task {name!r}{hint} (it has {', '.join(self.names) or 'none'})")
        return self._vectors[name]

    def add(self, name: str, vector: TaskVector) -> None:
        """Put a task in.

        Args:
            name: letters, digits, ``_``, ``-``, ``.``; it becomes a file name.
            vector: see :func:`task_vector`.
        Raises:
            UserError: the name is taken or cannot be a file name, or the vector does not fit the base.
        """
        if not NAME.fullmatch(name):
            raise UserError(f"a task of a pool is named with letters, digits, '_', '-' and '.', got {name!r}")
        if name in self._vectors:
            raise UserError(f"the pool has a task {name!r} already; remove it first")
        for key, value in vector.items():
            self._check(name, key, value)
        self._vectors[name] = dict(vector)

    def _check(self, task: str, key: str, value: Tensor | LoraLayer) -> None:
        if key not in self.base:
            raise UserError(f"task {task!r} changes {key!r}, which the base does not have")
        shape = list(self.base[key].shape)
        size = [len(value.B), value.A.shape[1]] if isinstance(value, LoraLayer) else list(value.shape)
        if size != (_as_matrix(shape) if isinstance(value, LoraLayer) else shape):
            raise UserError(f"task {task!r}: {key!r} has shape {size}, in the base {shape}")
        tensors = (value.A, value.B) if isinstance(value, LoraLayer) else (value,)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise UserError(f"task {task!r}: {key!r} holds values that are not finite")

    def remove(self, name: str) -> TaskVector:
        """Take a task out (unlearning) and return its task vector; the others are untouched.

        Raises:
            UserError: no such task.
        """
        vector = self.vector(name)
        del self._vectors[name]
        return vector

    def compose(
        self, names: Sequence[str] | None = None, weights: Sequence[float] | None = None, alpha: float = 1.0
    ) -> dict[str, Tensor]:
        """State dict ``base + alpha * sum_t w_t tau_t``, added up in float64 in alphabetical order and rounded once.

        Args:
            names: which tasks, a subset to specialise; all if None.
            weights: one per name; 1 / T each if None, the mean that ITA and IEL deploy.
            alpha: scale of the whole change; T turns the mean into the plain sum of task arithmetic.
        Raises:
            UserError: no such task, one named twice, or another number of weights.
        """
        chosen = list(self.names if names is None else names)
        if len(set(chosen)) < len(chosen):
            raise UserError(f"tasks named twice: {', '.join(chosen)}")
        shares = [1 / max(1, len(chosen))] * len(chosen) if weights is None else list(weights)
        if len(shares) != len(chosen):
            raise UserError(f"{len(shares)} weights for {len(chosen)} tasks")
        share_of = dict(zip(chosen, shares, strict=True))
        vectors = {name: self.vector(name) for name in sorted(chosen)}
        return {key: self._composed(key, value, vectors, share_of, alpha) for key, value in self.base.items()}

    def _composed(
        self, key: str, value: Tensor, vectors: Mapping[str, TaskVector], shares: Mapping[str, float], alpha: float
    ) -> Tensor:
        total: Tensor | None = None
        for name, vector in vectors.items():
            if key in vector:
                part = vector[key]
                dense = part.delta() if isinstance(part, LoraLayer) else part.double()
                change = shares[name] * dense.reshape(value.shape).to(value.device)
                total = change if total is None else total + change
        if total is None:
            return value.clone()
        return (value.double() + alpha * total).to(value.dtype)

    def negate(self, name: str, alpha: float = 1.0) -> dict[str, Tensor]:
        """State dict ``base - alpha * tau``: the base made to forget what the task needs.

        Raises:
            UserError: no such task.
        Reference: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089.
        """
        return self.compose([name], [-1.0], alpha)

    def save(self, folder: Path | str) -> None:
        """Write one safetensors file per task and ``index.json``, which makes them current; the base is not stored.

        A crash leaves the pool that was there. Files of tasks that are no longer in the pool are deleted last.

        Raises:
            UserError: the folder holds the pool of another base.
            RunError: the disk is full.
        """
        folder = Path(folder)
        make_folder(folder)
        base = base_digest(self.base)
        old = _read_index(folder, base) if (folder / INDEX).is_file() else {}
        files = {}
        for name in self.names:
            payload = _encoded(self._vectors[name])
            digest = hashlib.sha256(payload).hexdigest()
            # The digest in the name keeps the file of the current index whole while a changed task is written.
            file = f"{name}-{digest[:12]}.safetensors"
            if old.get(name, {}).get("sha256") != digest or not (folder / file).is_file():
                write_atomically(folder / file, payload)
            files[name] = {"file": file, "sha256": digest}
        index = {"schema": POOL_SCHEMA, "base_sha256": base, "tasks": files}
        write_atomically(folder / INDEX, json.dumps(index, indent=1))
        current = {entry["file"] for entry in files.values()}
        for entry in old.values():
            if entry["file"] not in current:
                (folder / entry["file"]).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path | str, base: State) -> TaskVectorPool:
        """Read a pool that :meth:`save` wrote.

        Raises:
            UserError: no pool, one of another base, or a damaged file, which is named.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} is not a pool of task vectors (it has no {INDEX})")
        pool = cls(base)
        for name, entry in _read_index(folder, base_digest(base)).items():
            path = folder / entry["file"]
            try:
                digest = sha256(path)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            if digest != entry["sha256"]:
                raise UserError(f"{path}: damaged, its SHA-256 is not the one in {INDEX}")
            pool.add(name, _decoded(path))
        return pool


def base_digest(base: State) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(base):
        value = base[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _as_matrix(shape: Sequence[int]) -> list[int]:
    """Shape [o, n] of the matrix that LoRA factors of a parameter multiply to; convolutions are [o, rest]."""
    return [shape[0], math.prod(shape[1:])] if len(shape) > 1 else list(shape)


def _encoded(vector: TaskVector) -> bytes:
    tensors: dict[str, Tensor] = {}
    scalings = {}
    for key, value in vector.items():
        if isinstance(value, LoraLayer):
            tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"] = value.A, value.B
            scalings[key] = value.scaling
        else:
            tensors[key] = value
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    encoded: bytes = save(plain, metadata={SCALINGS: json.dumps(scalings)})
    return encoded


def _decoded(path: Path) -> dict[str, Tensor | LoraLayer]:
    try:
        with safe_open(str(path), framework="pt") as stream:
            scalings: dict[str, float] = json.loads((stream.metadata() or {})[SCALINGS])
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118  (not a mapping)
        layers = {
            key: LoraLayer(tensors.pop(f"{key}.lora_A"), tensors.pop(f"{key}.lora_B"), float(scaling))
            for key, scaling in scalings.items()
        }
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a task vector of a pool") from None
    return {**tensors, **layers}


def _read_index(folder: Path, base: str) -> dict[str, Any]:
    """Task -> file and digest.

    Raises:
        UserError: not an index, or of another base.
    """
    path = folder / INDEX
    document = read_json(path)
    if not isinstance(document, dict) or document.get("schema") != POOL_SCHEMA:
        raise UserError(f"{path}: not a pool of task vectors that this version reads")
    if document.get("base_sha256") != base:
        raise UserError(f"{folder} holds task vectors of another base")
    tasks = document.get("tasks")
    if not isinstance(tasks, dict) or not all(_is_entry(name, entry) for name, entry in tasks.items()):
        raise UserError(f"{path}: its table of tasks is damaged")
    return tasks


def _is_entry(name: str, entry: Any) -> bool:
    """A task's file lies in the folder itself, whatever an index from elsewhere says."""
    if not NAME.fullmatch(name) or not isinstance(entry, dict):
        return False
    file, digest = entry.get("file"), entry.get("sha256")
    return isinstance(file, str) and isinstance(digest, str) and Path(file).name == file and file not in ("", "..")
