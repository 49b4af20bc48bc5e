"""The run folder: configuration, metrics, checkpoints and result, written so that a crash at any moment loses nothing.

A checkpoint is one safetensors file and ``state.json``, which names that file with its size and
SHA-256. The tensors are written first, under a new name; replacing ``state.json`` is the single
atomic step that makes them current. No pickle is written or read.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from neurocl.config import read_yaml
from neurocl.errors import RunError, UserError

RESULT_SCHEMA = 1
CHECKPOINT_SCHEMA = 1
RESULT_KEYS = {"schema", "status", "config", "protocol", "accuracy", "metrics", "seconds", "method", "dataset", "seed"}
MAX_JSON_BYTES = 64 << 20


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace ``path`` by ``data``: temporary sibling, flush to disk, rename.

    Raises:
        RunError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    payload = data.encode() if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from None


def write_error(path: Path, error: OSError) -> RunError:
    """The one-line error for a file that the system would not let us write."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return RunError(f"cannot write {path}: a file of that name is in the way")
    reason = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file may not grow that large",
        errno.EACCES: "no permission to write there",
        errno.EROFS: "the file system is read-only",
    }.get(error.errno or 0, error.strerror or str(error))
    return RunError(f"cannot write {path}: {reason}; what was saved before is intact")


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        RunError: the disk is full, read-only or not ours, or a file stands in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from None


def fresh_folder(stem: str) -> Path:
    """Make and return an empty folder ``runs/<stem>-<time>`` that no other process was given."""
    make_folder(Path("runs"))
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for count in itertools.count(1):
        path = Path("runs") / (f"{stem}-{stamp}" if count == 1 else f"{stem}-{stamp}-{count}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise write_error(path, error) from None
        break
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file of bounded size.

    Raises:
        UserError: missing, too large or not JSON; the message names the file.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """What :meth:`RunFolder.load_checkpoint` returns: named tensors and the JSON state beside them."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    digest: str


class RunFolder:
    """One folder of one run. Create with :meth:`create`, reopen with :meth:`open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")

    @classmethod
    def create(cls, out: Path | None, *, stem: str) -> RunFolder:
        """Make a new run folder.

        Args:
            out: the folder to use, or None for ``runs/<stem>-<time>``.
            stem: ``<area>-<method>-<dataset>-<seed>``.

        Raises:
            UserError: ``out`` holds a run already or is not an empty folder.
            RunError: the folder cannot be made.
        """
        path = fresh_folder(stem) if out is None else out
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if (path / "config.yaml").exists():
                raise UserError(f"{path} holds a run already; continue it with --resume {path} or choose another --out")
            raise UserError(f"{path} is not an empty folder; choose another --out")
        make_folder(path / "checkpoint")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Reopen an existing run.

        Raises:
            UserError: ``path`` is not a run folder.
        """
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path} is not a run folder (it has no config.yaml)")
        return cls(path)

    def acquire(self) -> None:
        """Hold the folder for this process.

        Raises:
            UserError: another process is running in it.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.path} is in use by another process") from None
        except OSError as error:
            raise write_error(self.path, error) from None

    def release(self) -> None:
        self._lock.release()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain values."""
        return read_yaml(self.path / "config.yaml")

    def write_config(self, text: str) -> None:
        write_atomically(self.path / "config.yaml", text)

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        try:
            with open(self.metrics_path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise write_error(self.metrics_path, error) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_atomically(
            self.path / "result.json", json.dumps({"schema": RESULT_SCHEMA, **result}, indent=1, allow_nan=False)
        )

    def has_result(self) -> bool:
        return (self.path / "result.json").exists()

    def read_result(self) -> dict[str, Any]:
        """The result of the run.

        Raises:
            UserError: no result yet, broken, or of a newer schema than this version reads.
        """
        path = self.path / "result.json"
        if not path.exists():
            raise UserError(f"{self.path} has no result yet; finish it with --resume {self.path}")
        result = read_json(path)
        if not isinstance(result, dict) or not result.keys() >= RESULT_KEYS:
            raise UserError(f"{path}: not a neurocl result, or an incomplete one")
        if result["schema"] > RESULT_SCHEMA:
            raise UserError(f"{path}: written by a newer neurocl (schema {result['schema']})")
        return result

    def save_checkpoint(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> str:
        """Make ``tensors`` and ``state`` the current checkpoint; returns the SHA-256 of the tensor file.

        Raises:
            RunError: the disk is full or cannot be written; the previous checkpoint stays current.
        """
        folder = self.path / "checkpoint"
        folder.mkdir(exist_ok=True)
        name = f"tensors-{time.time_ns()}.safetensors"
        temporary = folder / f".{name}.tmp"
        try:
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary)
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            digest = sha256(temporary)
            os.replace(temporary, folder / name)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise write_error(folder / name, error) from None
            raise RunError(f"cannot write {folder / name}: {error}; what was saved before is intact") from None
        metrics = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        document = {
            "schema": CHECKPOINT_SCHEMA,
            "tensors": name,
            "bytes": (folder / name).stat().st_size,
            "sha256": digest,
            "metrics_bytes": metrics,
            **state,
        }
        try:
            write_atomically(folder / "state.json", json.dumps(document, indent=1))
        except RunError:
            (folder / name).unlink(missing_ok=True)
            raise
        # Older tensors, and what a killed process left half written.
        for old in (*folder.glob("*tensors-*"), *folder.glob(".state.json.*.tmp")):
            if old.name != name:
                old.unlink(missing_ok=True)
        return digest

    def has_checkpoint(self) -> bool:
        return (self.path / "checkpoint" / "state.json").exists()

    def rewind_metrics(self, size: int = 0) -> None:
        """Cut ``metrics.jsonl`` back to the ``size`` it had at the checkpoint, so that every record is logged once."""
        if self.metrics_path.exists():
            os.truncate(self.metrics_path, min(size, self.metrics_path.stat().st_size))

    def load_checkpoint(self) -> Checkpoint:
        """Read the current checkpoint and verify it; nothing is changed.

        Raises:
            UserError: no checkpoint, or a file that is truncated, changed or foreign.
        """
        folder = self.path / "checkpoint"
        if not self.has_checkpoint():
            raise UserError(f"{self.path} has no checkpoint")
        state = read_json(folder / "state.json")
        if not isinstance(state, dict) or not {"schema", "tensors", "bytes", "sha256"} <= state.keys():
            raise UserError(f"{folder / 'state.json'}: not a neurocl checkpoint")
        if state["schema"] != CHECKPOINT_SCHEMA:
            raise UserError(f"{folder / 'state.json'}: checkpoint schema {state['schema']}, this version reads 1")
        path = folder / Path(str(state["tensors"])).name
        if not path.is_file():
            raise UserError(f"{path}: named by state.json but missing")
        if path.stat().st_size != state["bytes"]:
            raise UserError(f"{path}: truncated, {path.stat().st_size} of {state['bytes']} bytes")
        if sha256(path) != state["sha256"]:
            raise UserError(f"{path}: its SHA-256 is not the one in state.json; the file was changed or damaged")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None
        return Checkpoint(tensors, state, state["sha256"])


def find_runs(paths: list[Path]) -> list[RunFolder]:
    """Run folders among ``paths`` and one level below (a folder of seeds), in the order given.

    Raises:
        UserError: a path that holds no run.
    """
    found = []
    for path in paths:
        if (path / "config.yaml").is_file():
            found.append(RunFolder(path))
            continue
        inner = sorted(child.parent for child in path.glob("*/config.yaml")) if path.is_dir() else []
        if not inner:
            raise UserError(f"{path} is not a run folder (it has no config.yaml)")
        found.extend(RunFolder(child) for child in inner)
    return found
