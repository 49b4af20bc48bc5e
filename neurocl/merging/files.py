"""Merging models on disk: plan, check, stream, resume, and say in the output where it came from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neurocl import __version__
from neurocl.config import to_yaml
from neurocl.devices import peak_memory_mb, resolve_device
from neurocl.errors import Interrupted, UserError
from neurocl.merging.card import model_card, short_names
from neurocl.merging.catalog import MERGES
from neurocl.merging.checkpoints import PICKLES, FileSource
from neurocl.merging.engine import Merger, Plan, Source, StatisticsOf, Step
from neurocl.merging.method import MergeMethod, declared
from neurocl.merging.output import ModelWriter, shard_layout
from neurocl.merging.peft import AdapterSource, is_adapter
from neurocl.merging.recipe import ModelEntry, Recipe, parse_bytes, recipe_values, relative_to
from neurocl.runs import make_folder, read_json, sha256, write_atomically, write_error
from neurocl.stopping import StopRequest

REPORT_SCHEMA = 1
MAX_COPIED_BYTES = 64 << 20
UNKNOWN_DIGEST = "0" * 64
NOT_COMPUTED = "not computed".ljust(64)
NOT_READ = "not read".ljust(64)  # as long as a digest, so that the header keeps its size
SLACK_BYTES = 64 << 20  # modules loaded and kernels set up after planning
MEASURING_BYTES = 150 << 20  # compiled kernels and histograms of merges that measure whole tensors first


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, before anything is computed.

    Attributes:
        recipe: the recipe with the method's options filled in.
        method: the merge.
        steps: every tensor with its treatment.
        left_out: what of the models is not used, one sentence each.
        out_bytes: size of the merged weights.
        files: output files.
        memory_bytes: estimate of the process's peak memory.
        largest: tensor that sets the peak.
    """

    recipe: Recipe
    method: MergeMethod
    steps: tuple[Step, ...]
    left_out: tuple[str, ...]
    out_bytes: int
    files: tuple[str, ...]
    memory_bytes: int
    largest: str

    def by_class(self) -> dict[str, dict[str, Any]]:
        """Per parameter class: what happens, how many tensors, how many values."""
        rows: dict[str, dict[str, Any]] = {}
        for step in self.steps:
            row = rows.setdefault(f"{step.kind}, {step.action}", {"class": step.kind, "action": step.action})
            row["tensors"] = row.get("tensors", 0) + 1
            row["values"] = row.get("values", 0) + step.spec.numel
            row.setdefault("example", step.name)
        return rows


@dataclass(frozen=True)
class MergeReport:
    """What a finished merge did.

    Attributes:
        out: the file or folder.
        plan: what was planned, and done.
        inputs: SHA-256 of the contents of the base and of every model, by path.
        seconds: wall time.
        peak_memory_mb: of the process.
        resumed: tensors that an earlier, interrupted attempt had finished.
    """

    out: Path
    plan: MergePlan
    inputs: dict[str, str]
    seconds: float
    peak_memory_mb: float
    resumed: int


@dataclass
class _Job:
    """Opened models and the merge of them."""

    recipe: Recipe
    merger: Merger
    plan: Plan
    files: list[FileSource] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)

    def close(self) -> None:
        for file in self.files:
            file.close()


def _open(recipe: Recipe, device: str) -> _Job:
    entry = MERGES.entry(recipe.method)
    if entry.name not in MERGES.names("weights"):
        raise UserError(f"{entry.name} does not merge weight files; `neurocl merging info {entry.name}` says how")
    method = declared(entry.load(), entry.name)
    files: list[FileSource] = []

    def source(path: Path, base: FileSource | None) -> Source:
        if path.is_dir() and is_adapter(path):
            if base is None:
                raise UserError(f"{path} is a LoRA adapter: give the model it was made for as base, or a lora- method")
            return AdapterSource.open(path, base)
        files.append(FileSource.open(path))
        return files[-1]

    base = None
    if recipe.base is not None:
        files.append(FileSource.open(recipe.base))
        base = files[0]
    models = [source(entry.path, base) for entry in recipe.models]
    _require_same_network([*([recipe.base] if recipe.base else []), *(entry.path for entry in recipe.models)])
    merger = Merger(
        method=method,
        options=method.resolve(recipe.options),
        base=base,
        models=models,
        alpha=recipe.alpha,
        weights=recipe.weights,
        statistics=_statistics(recipe.models) if method.statistic is not None else None,
        rules=recipe.parameters,
        on_mismatch=recipe.on_mismatch,
        dtype=getattr(torch, recipe.dtype) if recipe.dtype else None,
        compute_dtype=getattr(torch, recipe.compute_dtype),
        device=resolve_device(device),
    )
    resolved = recipe.model_copy(update={"options": dict(merger.options)})
    sources = {model.label: model for model in models}
    if base is not None:
        sources[base.label] = base
    return _Job(resolved, merger, merger.plan(), files, sources)


def _statistics(entries: Sequence[ModelEntry]) -> list[StatisticsOf]:
    from neurocl.merging.statistics import Statistics

    return [Statistics.load(entry.statistics) for entry in entries if entry.statistics is not None]


def _require_same_network(paths: Sequence[Path]) -> None:
    """Refuse models whose ``config.json`` names another architecture or vocabulary."""
    seen: dict[str, tuple[Any, Path]] = {}
    for path in paths:
        config = path / "config.json"
        if not config.is_file() or is_adapter(path):
            continue
        document: Any = None
        with contextlib.suppress(UserError):  # what cannot be read says nothing about the network
            document = read_json(config)
        for key in ("architectures", "model_type", "vocab_size"):
            value = document.get(key) if isinstance(document, dict) else None
            if value is None:
                continue
            other, where = seen.setdefault(key, (value, path))
            if other != value:
                raise UserError(f"{path} and {where} differ in {key}: {value} and {other}; they cannot be merged")


def process_bytes() -> int:
    """What this process holds now, and a margin: Python with torch takes 230 MB, with CUDA several times that."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") + SLACK_BYTES
    except (OSError, ValueError):
        return (int(peak_memory_mb()["host"]) << 20) + SLACK_BYTES


def _held_bytes(job: _Job) -> int:
    """Memory that is held from the first tensor to the last, whatever their sizes."""
    held = MEASURING_BYTES if job.merger.method.measure is not None else 0
    for source in job.merger.models:
        if isinstance(source, AdapterSource):
            held += source.largest_delta_bytes
    return held


def plan_merge(recipe: Recipe, *, device: str = "cpu", max_memory: int | None = None) -> MergePlan:
    """Read headers only and say what the merge would do.

    Raises:
        UserError: the models do not fit together, an option is wrong, or the memory does not suffice.
    """
    job = _open(recipe, device)
    try:
        return _planned(job, max_memory)
    finally:
        job.close()


def _planned(job: _Job, max_memory: int | None) -> MergePlan:
    merger, steps = job.merger, job.plan.steps
    specs = {step.name: step.spec for step in steps}
    largest = max(steps, key=merger.working_bytes)
    memory = process_bytes() + merger.working_bytes(largest) + _held_bytes(job)
    if max_memory is not None and memory > max_memory:
        whole = merger.whole_tensors(largest)
        what = f"tensor {largest.name!r} {list(largest.spec.shape)}" if whole else "the process"
        remedy = "raise it, or take that tensor's mean with --average" if whole else "raise it"
        raise UserError(
            f"--max-memory {max_memory >> 20}M is too little: {merger.method.name} on {len(merger.models)} models "
            f"needs about {-(-memory >> 20)}M for {what}; {remedy}"
        )
    layout = shard_layout(specs, parse_bytes(job.recipe.shard_size))
    return MergePlan(
        recipe=job.recipe,
        method=merger.method,
        steps=steps,
        left_out=job.plan.left_out,
        out_bytes=sum(spec.nbytes for spec in specs.values()),
        files=tuple(layout),
        memory_bytes=memory,
        largest=largest.name,
    )


def merge_files(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    max_memory: int | None = None,
    hashes: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> MergeReport:
    """Merge models on disk into ``out``, tensor by tensor.

    Args:
        recipe: what to merge and how.
        out: a new folder, or a new file whose name ends in ``.safetensors``. It appears when it is complete; until
            then the work is in ``OUT.partial``, and the same call goes on where an interrupted one stopped.
        device: where to compute.
        max_memory: bytes the process may need; more is refused before anything is computed.
        hashes: write the SHA-256 of every input's contents into the result; costs half a second per GB read.
        progress: called with (values done, values in all, tensor name).

    Raises:
        UserError: the models do not fit together, a file is damaged, a value is NaN, ``out`` exists, or the memory
            would not suffice.
        RunError: the disk is full.
        Interrupted: SIGINT or SIGTERM; what was merged is kept.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    started = time.perf_counter()
    job = _open(recipe, device)
    try:
        plan = _planned(job, max_memory)
        return _merge(job, plan, out, started, progress, hashes=hashes)
    finally:
        job.close()


def _merge(
    job: _Job,
    plan: MergePlan,
    out: Path,
    started: float,
    progress: Callable[[int, int, str], None] | None,
    *,
    hashes: bool,
) -> MergeReport:
    single = out.suffix == ".safetensors"
    shard_bytes = plan.out_bytes + 1 if single else parse_bytes(plan.recipe.shard_size)
    labels = list(job.sources)
    make_folder(out.absolute().parent)
    partial = out.with_name(out.name + ".partial")
    writer = ModelWriter(
        partial,
        plan.steps,
        shard_bytes=shard_bytes,
        metadata=_metadata(plan, dict.fromkeys(labels, UNKNOWN_DIGEST)),
        fingerprint=_fingerprint(job),
    )
    try:
        resumed = len(writer.finished)
        _stream(job, plan, writer, out, progress, hashes=hashes)
        inputs = {
            label: _digest_of(source, label, writer) if hashes else NOT_COMPUTED
            for label, source in job.sources.items()
        }
        writer.finish(_metadata(plan, inputs))
        report = MergeReport(out, plan, inputs, time.perf_counter() - started, peak_memory_mb()["host"], resumed)
        _dress(partial, report, single=single)
        if single:
            writer.appear_as_file(out, {"merge.json": out.with_suffix(".merge.json")})
        else:
            writer.appear_as(out)
    finally:
        writer.close()
    return report


def _stream(
    job: _Job,
    plan: MergePlan,
    writer: ModelWriter,
    out: Path,
    progress: Callable[[int, int, str], None] | None,
    *,
    hashes: bool,
) -> None:
    total = sum(step.spec.numel for step in plan.steps)
    todo = [step for step in plan.steps if step.name not in writer.finished]
    count = total - sum(step.spec.numel for step in todo)
    stop = StopRequest()

    def stop_here() -> None:
        if stop.requested:
            writer.sync()
            raise Interrupted(f"stopped; {writer.folder} keeps what is done, the same command with --out {out} goes on")

    def done(step: Step) -> None:
        nonlocal count
        digests = {
            label: source.digests[step.name]
            for label, source in job.sources.items()
            if isinstance(source, FileSource) and step.name in source.digests
        }
        writer.complete(step.name, digests)
        count += step.spec.numel
        if progress is not None:
            progress(count, total, step.name)
        stop_here()

    for file in job.files:
        file.hashing = hashes
    job.merger.pulse = stop_here
    with stop.listen():
        job.merger.run(todo, writer, done=done, model=plan.steps)


def _digest_of(source: Source, label: str, writer: ModelWriter) -> str:
    if isinstance(source, AdapterSource):
        return source.digest
    assert isinstance(source, FileSource)
    known = {name: found[label] for name, found in writer.finished.items() if label in found}
    return source.digest(known) if known else NOT_READ


def _fingerprint(job: _Job) -> str:
    """Of everything that the output depends on; a partial folder with another one is not continued."""
    digest = hashlib.sha256(to_yaml(job.recipe).encode())
    digest.update(f"{__version__} {job.merger.device.type}".encode())
    for source in job.sources.values():
        digest.update(source.fingerprint().encode() if isinstance(source, FileSource | AdapterSource) else b"")
    for entry in job.recipe.models:
        if entry.statistics is not None:
            digest.update(sha256(entry.statistics).encode())
    return digest.hexdigest()


def provenance(plan: MergePlan, inputs: Mapping[str, str]) -> str:
    """What the header of every output file says about where it came from, as JSON."""
    said = {
        "neurocl": __version__,
        "method": plan.method.name,
        "reference": plan.method.reference,
        "alpha": plan.recipe.alpha,
        "weights": plan.recipe.weights,
        "options": plan.recipe.options,
        "inputs_sha256": dict(zip(short_names(inputs), inputs.values(), strict=True)),
    }
    return json.dumps(said, default=str)


def _metadata(plan: MergePlan, inputs: Mapping[str, str]) -> dict[str, str]:
    return {"format": "pt", "neurocl_merge": provenance(plan, inputs)}


def _dress(folder: Path, report: MergeReport, *, single: bool) -> None:
    """Put recipe, report, model card and the base's small files beside the weights."""
    plan = report.plan
    document = {
        "schema": REPORT_SCHEMA,
        "neurocl": __version__,
        "method": plan.method.name,
        "reference": plan.method.reference,
        "recipe": dict(recipe_values(plan.recipe)),
        "inputs_sha256": report.inputs,
        "classes": list(plan.by_class().values()),
        "tensors": {
            step.name: {"class": step.kind, "action": step.action, "from_base": sorted(step.absent)}
            for step in plan.steps
        },
        "left_out": list(plan.left_out),
        "seconds": round(report.seconds, 3),
        "peak_memory_mb": round(report.peak_memory_mb),
    }
    write_atomically(folder / "merge.json", json.dumps(document, indent=1))
    if single:
        return
    write_atomically(folder / "merge.yaml", to_yaml(relative_to(plan.recipe, report.out)))
    write_atomically(folder / "README.md", model_card(plan, report.inputs))
    origin = plan.recipe.base or plan.recipe.models[0].path
    if origin.is_dir():
        for file in sorted(origin.iterdir()):
            if _belongs_to_model(file):
                _copy_small(file, folder / file.name, plan.recipe.dtype)


def _copy_small(file: Path, target: Path, dtype: str | None) -> None:
    """Copy a file; the type that ``config.json`` tells loaders becomes that of the output."""
    try:
        if file.name == "config.json" and dtype is not None:
            with contextlib.suppress(ValueError):
                document = json.loads(file.read_text(encoding="utf-8"))
                if isinstance(document, dict):
                    told = {key: dtype for key in ("torch_dtype", "dtype") if key in document}
                    write_atomically(target, json.dumps({**document, **told}, indent=2) + "\n")
                    return
        shutil.copyfile(file, target)
    except OSError as error:
        raise write_error(target, error) from None


def _belongs_to_model(file: Path) -> bool:
    """Configuration and tokenizer files, which a merged model needs beside its weights."""
    if not file.is_file() or file.name.startswith(".") or file.suffix in (".safetensors", *PICKLES):
        return False
    if file.name.endswith(".index.json") or file.name in ("README.md", "merge.json", "merge.yaml"):
        return False
    return file.suffix in (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken") and (
        file.stat().st_size <= MAX_COPIED_BYTES
    )
