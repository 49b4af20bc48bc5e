"""Writing a merged model: sizes are known before the first value, so files are laid out first and filled in place.

Everything happens in ``NAME.partial`` beside the output, which appears under its own name when it is complete. A
journal says which tensors are on disk; a merge that was stopped or killed goes on after the last of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from neurocl.errors import UserError
from neurocl.merging.checkpoints import INDEX_NAME, header_bytes
from neurocl.merging.engine import Step
from neurocl.merging.parameters import TensorSpec
from neurocl.runs import make_folder, write_atomically, write_error

SYNC_BYTES = 256 << 20
SYNC_SECONDS = 1.0
MAX_OPEN_FILES = 16


def shard_layout(tensors: Mapping[str, TensorSpec], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names: one ``model.safetensors``, or numbered shards of at most ``shard_bytes`` each.

    A tensor larger than a shard gets a file of its own.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if groups[-1] and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, start=1)
    }


class ModelWriter:
    """Fills the files of one merged model; a :class:`neurocl.merging.engine.Sink`.

    Args:
        folder: the partial folder; made if it is not there.
        steps: what will be written, in order.
        shard_bytes: largest file.
        metadata: text for the file headers, of the length that the final text will have.
        fingerprint: of recipe and inputs; an existing partial folder must carry the same one.

    Raises:
        UserError: the folder is something else or belongs to another merge, or another process is at work in it.
        RunError: the disk is full.
    """

    def __init__(
        self, folder: Path, steps: Sequence[Step], *, shard_bytes: int, metadata: Mapping[str, str], fingerprint: str
    ) -> None:
        make_folder(folder)
        self.folder = folder
        self._journal = folder / "journal.jsonl"
        if not self._journal.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} is in the way and no interrupted merge; move it or choose another --out")
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{folder} is in use by another merge") from None
        except OSError as error:
            raise write_error(folder, error) from None
        self.specs = {step.name: step.spec for step in steps}
        self.layout = shard_layout(self.specs, shard_bytes)
        self._headers: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._descriptors: dict[str, int] = {}
        self._waiting: list[dict[str, Any]] = []
        self._unsynced = 0
        self._synced_at = time.monotonic()
        self.finished: dict[str, dict[str, str]] = {}
        try:
            self._begin(metadata, fingerprint)
        except OSError as error:
            self.close()
            raise write_error(folder, error) from None
        except UserError:
            self.close()
            raise

    def _begin(self, metadata: Mapping[str, str], fingerprint: str) -> None:
        known = self._read_journal(fingerprint)
        self._start_journal(fingerprint, known)
        replaced = False
        for file, names in self.layout.items():
            header = header_bytes([(name, self.specs[name]) for name in names], metadata)
            self._headers[file] = len(header)
            offset = len(header)
            for name in names:
                self._places[name] = (file, offset)
                offset += self.specs[name].nbytes
            descriptor = self._descriptor(file)
            if os.fstat(descriptor).st_size != offset:
                replaced = True
                _reserve(descriptor, offset)
        if replaced and known:
            known = {}
            self._start_journal(fingerprint, known)
        self.finished = known

    def _start_journal(self, fingerprint: str, known: Mapping[str, Mapping[str, str]]) -> None:
        """Write the journal anew, without the torn line that a crash may have left at its end."""
        records = [{"fingerprint": fingerprint}, *({"name": name, "digests": known[name]} for name in known)]
        write_atomically(self._journal, "".join(json.dumps(record) + "\n" for record in records))

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            while len(self._descriptors) >= MAX_OPEN_FILES:
                oldest = self._descriptors.pop(next(iter(self._descriptors)))
                os.fsync(oldest)
                os.close(oldest)
            self._descriptors[file] = os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o644)
        return self._descriptors[file]

    def _read_journal(self, fingerprint: str) -> dict[str, dict[str, str]]:
        if not self._journal.is_file():
            return {}
        records: list[dict[str, Any]] = []
        with contextlib.suppress(json.JSONDecodeError):  # a torn last line is the crash itself
            for line in self._journal.read_text(encoding="utf-8", errors="replace").splitlines():
                records.append(json.loads(line))
        if not records or records[0].get("fingerprint") != fingerprint:
            raise UserError(
                f"{self.folder} holds an interrupted merge of other models or options; "
                f"repeat that merge to finish it, or delete the folder"
            )
        return {record["name"]: record["digests"] for record in records[1:] if record["name"] in self.specs}

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Store a slice.

        Raises:
            RunError: the disk is full or went away.
        """
        if values.numel() == 0:
            return
        file, offset = self._places[name]
        data = values.detach().cpu().contiguous().view(torch.uint8).numpy().data
        position = offset + start * values.element_size()
        try:
            while data:
                written = os.pwrite(self._descriptor(file), data, position)
                data, position = data[written:], position + written
        except OSError as error:
            raise write_error(self.folder / file, error) from None

    def complete(self, name: str, digests: Mapping[str, str]) -> None:
        """Note that a tensor is written; the note reaches the disk after the data it speaks of."""
        self._waiting.append({"name": name, "digests": dict(digests)})
        self.finished[name] = dict(digests)
        self._unsynced += self.specs[name].nbytes
        if self._unsynced >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring data, then journal, to the disk."""
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            with open(self._journal, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(record) + "\n" for record in self._waiting)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise write_error(self.folder, error) from None
        self._waiting, self._unsynced, self._synced_at = [], 0, time.monotonic()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the headers and the index.

        Raises:
            ValueError: ``metadata`` is longer than was announced.
        """
        try:
            for file, names in self.layout.items():
                header = header_bytes([(name, self.specs[name]) for name in names], metadata)
                if len(header) != self._headers[file]:
                    raise ValueError(f"header of {file}: {len(header)} bytes, {self._headers[file]} were reserved")
                os.pwrite(self._descriptor(file), header, 0)
            self.sync()
        except OSError as error:
            raise write_error(self.folder, error) from None
        if len(self.layout) > 1:
            weight_map = {name: file for file, names in self.layout.items() for name in names}
            total = sum(spec.nbytes for spec in self.specs.values())
            document = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_atomically(self.folder / INDEX_NAME, json.dumps(document, indent=1))

    def appear_as(self, out: Path) -> None:
        """Give the finished folder its own name, and remove what only an unfinished merge needs.

        Raises:
            UserError: ``out`` has come into being in the meantime.
            RunError: it cannot be renamed.
        """
        if out.exists():
            raise UserError(f"{out} exists already; {self.folder} holds the merged model")
        try:
            self.folder.rename(out)
            (out / self._journal.name).unlink()
            (out / ".lock").unlink()
        except OSError as error:
            raise write_error(out, error) from None

    def appear_as_file(self, out: Path, beside: Mapping[str, Path]) -> None:
        """As :meth:`appear_as` for one file of weights.

        Args:
            out: its name.
            beside: where other files of the folder go, by their name in it.

        Raises:
            UserError: ``out`` has come into being in the meantime.
            RunError: it cannot be renamed.
        """
        if out.exists():
            raise UserError(f"{out} exists already; {self.folder} holds the merged model")
        try:
            for name, place in beside.items():
                (self.folder / name).replace(place)
            (self.folder / next(iter(self.layout))).replace(out)
            shutil.rmtree(self.folder)
        except OSError as error:
            raise write_error(out, error) from None

    def close(self) -> None:
        """Close the files and let go of the folder."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self._lock.release()


def _reserve(descriptor: int, size: int) -> None:
    """Make a file ``size`` bytes long and claim the room for it, so that a full disk shows now."""
    os.ftruncate(descriptor, 0)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        # some systems and file systems cannot claim room
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)
