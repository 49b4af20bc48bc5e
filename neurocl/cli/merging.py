"""``neurocl merging``: merge models on disk, see what the methods are, and measure what they give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurocl.cli.options import JsonOption, QuietOption
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

if TYPE_CHECKING:
    from neurocl.merging.files import MergePlan, MergeReport
    from neurocl.merging.recipe import Recipe

app = typer.Typer(
    help="Merge fine-tuned models without retraining.\n\n"
    "[bold]neurocl merging methods[/bold] lists the merges, [bold]neurocl merging info ties[/bold] explains one.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

WHAT, TREATMENT, MACHINE = "What is merged", "How", "Machine"
MergeDeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=MACHINE)]
MergeThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads.", envvar="NEUROCL_THREADS", rich_help_panel=MACHINE, show_default="torch's"),
]


@app.command(context_settings={"ignore_unknown_options": True})
def merge(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models: safetensors files, Hugging Face folders, PEFT adapter folders. Or one recipe (YAML, also "
            "mergekit's).",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="See `neurocl merging methods`.", rich_help_panel=WHAT, show_default="average")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The model the others were fine-tuned from.", rich_help_panel=WHAT, show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder, or new .safetensors file.", rich_help_panel=WHAT, show_default="runs/merge-METHOD-..."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Scale: base + alpha (merged - base).", rich_help_panel=TREATMENT, show_default="1"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number per model: 0.7,0.3.", rich_help_panel=TREATMENT, show_default="equal")
    ] = None,
    statistics: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of `neurocl merging stats`, once per model, in their order.",
            rich_help_panel=TREATMENT,
            show_default=False,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An option of the method: density=0.3. --density 0.3 does the same.",
            rich_help_panel=TREATMENT,
            show_default=False,
        ),
    ] = None,
    average: Annotated[
        list[str] | None,
        typer.Option(
            help="Parameters (glob) that merges of matrices average instead.",
            rich_help_panel=TREATMENT,
            show_default="*text_projection*",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Parameters (glob) to copy from the base.", rich_help_panel=TREATMENT, show_default=False),
    ] = None,
    matrices: Annotated[
        list[str] | None,
        typer.Option(
            help="Token embeddings (glob) to treat as matrices.", rich_help_panel=TREATMENT, show_default=False
        ),
    ] = None,
    on_mismatch: Annotated[
        str | None,
        typer.Option(
            help="error; base takes tensors a model lacks from the base.",
            rich_help_panel=TREATMENT,
            show_default="error",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the output: float64, float32, bfloat16, float16.",
            rich_help_panel=TREATMENT,
            show_default="the base's",
        ),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest output file.", rich_help_panel=MACHINE, show_default="5G")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Refuse before starting if more is needed: 2G.", rich_help_panel=MACHINE, show_default=False),
    ] = None,
    device: MergeDeviceOption = "cpu",
    threads: MergeThreadsOption = None,
    hashes: Annotated[
        bool, typer.Option("--hashes/--no-hashes", help="SHA-256 of the inputs in the result.", rich_help_panel=MACHINE)
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan and the memory it needs.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Merge small models made on the spot, in seconds.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge models on disk, tensor by tensor, in little memory.

    Every option of the chosen method is a flag too: --method ties --density 0.3 --trim tensor.
    An interrupted merge goes on when the same command is given again.

    Examples:

      neurocl merging merge --method iso-c --base vit cars/ signs/ --alpha 1.3 --out merged

      neurocl merging merge --method lora-svd --rank 32 adapter-a adapter-b --out adapter

      neurocl merging merge recipe.yaml --out merged --dry-run
    """
    from neurocl.devices import prepare
    from neurocl.merging.adapter_files import merge_adapter_folders, plan_adapters
    from neurocl.merging.catalog import MERGES
    from neurocl.merging.files import merge_files, plan_merge
    from neurocl.merging.recipe import parse_bytes

    paths, extra = _split(models or [])
    limit = parse_bytes(max_memory) if max_memory else None
    flags = {
        "method": method,
        "base": str(base) if base else None,
        "alpha": alpha,
        "on_mismatch": on_mismatch,
        "dtype": dtype,
        "shard_size": shard_size,
        "parameters": _rules(average, keep, matrices),
    }
    if smoke:
        if paths or base:
            raise UserError("--smoke makes its own models; leave out the models and --base")
        from neurocl.merging.smoke import smoke_recipe
        from neurocl.runs import fresh_folder

        _require_files(method or "average")
        folder = fresh_folder(f"smoke-{method or 'average'}")
        values = smoke_recipe(method or "average", folder).model_dump()
        out = out or folder / "merged"
    else:
        values = _start_values(paths)
    recipe = _recipe(values, flags, weights, statistics, [*(assignments or []), *extra])
    prepare("cpu", "fp32", threads)
    adapters = "adapters" in MERGES.entry(recipe.method).areas
    if dry_run:
        plan = (
            plan_adapters(recipe, max_memory=limit) if adapters else plan_merge(recipe, device=device, max_memory=limit)
        )
        _print_plan(plan, as_json)
        return
    target = out or _fresh_name(recipe)
    if adapters and device not in ("cpu", "auto"):
        raise UserError(f"{recipe.method} works on small factors and runs on the CPU; leave --device out")
    if recipe.method == "lora-linear" and not quiet:
        _say("lora-linear adds the factors, not the updates: cross terms B_i A_j come in; lora-svd has none")
    if adapters:
        report = merge_adapter_folders(recipe, target, max_memory=limit)
    else:
        bar = None if quiet else _Bar(recipe.method)
        try:
            report = merge_files(recipe, target, device=device, max_memory=limit, hashes=hashes, progress=bar)
        finally:
            if bar is not None:
                bar.close()
    _print_report(report, as_json)


def _require_files(method: str) -> None:
    """Refuse merges of networks before anything is made for them."""
    from neurocl.merging.catalog import MERGES

    if "networks" in MERGES.entry(method).areas:
        raise UserError(f"{method} does not merge files; `neurocl merging info {method}` says how it is called")


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths, and ``--name value`` pairs as assignments; a flag that the command does not know belongs to the method."""
    paths, assignments = [], []
    waiting = ""
    for word in words:
        if waiting and word.startswith("--"):
            raise UserError(f"--{waiting} needs a value, found {word}")
        if waiting:
            assignments.append(f"{waiting}={word}")
            waiting = ""
        elif word.startswith("--"):
            key, separator, value = word[2:].partition("=")
            if separator:
                assignments.append(f"{key}={value}")
            else:
                waiting = key
        elif word.startswith("-") and len(word) > 1 and not Path(word).exists():
            raise UserError(f"no such option: {word}")
        else:
            paths.append(word)
    if waiting:
        raise UserError(f"--{waiting} needs a value")
    return paths, assignments


def _rules(
    average: list[str] | None, keep: list[str] | None, matrices: list[str] | None
) -> dict[str, tuple[str, ...]] | None:
    given = {"averaged": average, "kept": keep, "matrices": matrices}
    rules = {key: tuple(value) for key, value in given.items() if value}
    return rules or None


def _start_values(paths: list[str]) -> dict[str, Any]:
    """A recipe file, or the models that were named."""
    from neurocl.merging.recipe import read_recipe

    if not paths:
        raise UserError("name the models to merge, or one recipe; `neurocl merging merge --help` shows examples")
    if len(paths) == 1 and Path(paths[0]).suffix in (".yaml", ".yml"):
        return read_recipe(Path(paths[0])).model_dump()
    return {"models": [{"path": path} for path in paths]}


def _recipe(
    values: dict[str, Any],
    flags: dict[str, Any],
    weights: str | None,
    statistics: list[Path] | None,
    assignments: Sequence[str],
) -> Recipe:
    """The recipe with the flags on top."""
    from neurocl.config import merged, parse_overrides, validate
    from neurocl.merging.recipe import Recipe

    given = {key: value for key, value in flags.items() if value is not None}
    options = parse_overrides(assignments)
    if "method" in given and given["method"] != values.get("method"):
        values["options"] = {}  # of another method
    values = merged(values, given)
    values["options"] = {**values.get("options", {}), **options}
    entries = [dict(entry) for entry in values["models"]]
    if weights is not None:
        for entry, weight in zip(entries, _numbers(weights, len(entries)), strict=True):
            entry["weight"] = weight
    if statistics:
        if len(statistics) != len(entries):
            raise UserError(f"{len(statistics)} --statistics for {len(entries)} models; give one for each, in order")
        for entry, file in zip(entries, statistics, strict=True):
            entry["statistics"] = file
    recipe = validate(Recipe, {**values, "models": entries}, source="merge")
    _check_options(recipe, options)
    return recipe


def _check_options(recipe: Recipe, options: dict[str, Any]) -> None:
    """A flag that neither the command nor the method knows."""
    from neurocl.merging.describe import option_fields

    known = option_fields(recipe.method)
    for name in options:
        if name not in known:
            spelt = [field.replace("_", "-") for field in known]
            hint = did_you_mean(name.replace("_", "-"), spelt)
            listed = f" ({', '.join(spelt)})" if spelt else ""
            raise UserError(f"{recipe.method} has no option {name.replace('_', '-')!r}{hint or listed}")


def _numbers(text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights expects numbers such as 0.7,0.3, got {text!r}") from None
    if len(numbers) != count:
        raise UserError(f"{len(numbers)} --weights for {count} models")
    return numbers


def _fresh_name(recipe: Recipe) -> Path:
    from neurocl.runs import fresh_folder

    folder = fresh_folder(f"merge-{recipe.method}")
    folder.rmdir()  # reserved a name; the merge makes the folder when it is complete
    return folder


class _Bar:
    """Progress of a merge on stderr: a live bar on a terminal, nothing elsewhere but the start."""

    def __init__(self, method: str) -> None:
        import sys

        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._live = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn(method),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tensor]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, tensor="")

    def __call__(self, done: int, total: int, tensor: str) -> None:
        if not self._live:
            return
        if not self._bar.live.is_started:
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, tensor=tensor)

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar.live.is_started:
            self._bar.stop()


def _print_plan(plan: MergePlan, as_json: bool) -> None:
    from neurocl.merging.recipe import recipe_values

    if as_json:
        document = {
            "recipe": dict(recipe_values(plan.recipe)),
            "classes": list(plan.by_class().values()),
            "left_out": list(plan.left_out),
            "out_bytes": plan.out_bytes,
            "files": list(plan.files),
            "memory_bytes": plan.memory_bytes,
            "largest_tensor": plan.largest,
        }
        typer.echo(json.dumps(document, indent=1, default=str))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{plan.method.name}[/bold]: {plan.method.summary}")
    if plan.recipe.options:
        options = ", ".join(f"{key} = {value}" for key, value in plan.recipe.options.items())
        console.print(f"options: {options}", markup=False)
    console.print(_class_table(plan))
    for sentence in plan.left_out[:20]:
        console.print(f"note: {sentence}", markup=False)
    if len(plan.left_out) > 20:
        console.print(f"note: and {len(plan.left_out) - 20} more")
    files = plan.files[0] if len(plan.files) == 1 else f"{len(plan.files)} files"
    console.print(f"output: {_size(plan.out_bytes)} in {files}")
    console.print(f"memory: about {_size(plan.memory_bytes)} (set by {plan.largest})", markup=False)


def _class_table(plan: MergePlan) -> Any:
    from rich.table import Table

    words = {"merge": plan.method.name, "mean": "mean of the models", "copy": "copied from the base"}
    table = Table(box=None, pad_edge=False)
    table.add_column("parameters")
    table.add_column("what happens")
    table.add_column("tensors", justify="right")
    table.add_column("values", justify="right")
    table.add_column("such as", overflow="fold")
    for row in plan.by_class().values():
        values = f"{row['values']:,}"
        table.add_row(row["class"], words[row["action"]], f"{row['tensors']:,}", values, row["example"])
    return table


def _size(count: int) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1024 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    raise AssertionError


def _print_report(report: MergeReport, as_json: bool) -> None:
    plan = report.plan
    if as_json:
        document = {
            "out": str(report.out),
            "method": plan.method.name,
            "inputs_sha256": report.inputs,
            "classes": list(plan.by_class().values()),
            "left_out": list(plan.left_out),
            "seconds": report.seconds,
            "peak_memory_mb": report.peak_memory_mb,
            "resumed_tensors": report.resumed,
        }
        typer.echo(json.dumps(document, indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_class_table(plan))
    for sentence in plan.left_out[:20]:
        console.print(f"note: {sentence}", markup=False)
    again = f", {report.resumed} tensors were done before" if report.resumed else ""
    console.print(
        f"{plan.method.name}: {_size(plan.out_bytes)} in {report.seconds:.1f} s, "
        f"peak memory {report.peak_memory_mb:.0f} MB{again}"
    )
    typer.echo(f"Merged model: {report.out}")
    if report.out.is_dir():
        typer.echo(f"Its recipe and model card: {report.out / 'merge.yaml'}, {report.out / 'README.md'}")


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the merges: what each works on, what it needs, its options."""
    from neurocl.merging.catalog import MERGES
    from neurocl.merging.describe import described

    rows = []
    for name in MERGES.names():
        try:
            rows.append(described(name))
        except UserError as error:  # a plug-in that cannot be used; the others can
            _say(f"neurocl: left out: {error}")
    if as_json:
        typer.echo(json.dumps(rows, indent=1, default=str))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    titles = {
        "weights": "merges of weights: state dicts in memory, models on disk",
        "adapters": "merges of LoRA adapters",
        "networks": "merges of networks: run on unlabelled data (from Python, and in `compare`)",
    }
    for area, title in titles.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("what it does")
        table.add_column("options")
        for row in rows:
            if row["works on"] == area:
                options = " ".join(option["name"] for option in row["options"])
                needs = [need for need in row["needs"] if area == "weights" and need != "base"]
                entry = MERGES.entry(row["name"])
                own = entry.source == "neurocl"
                summary = entry.summary if own else f"{row['summary'].rstrip('.')} ({entry.summary})"
                table.add_row(row["name"], escape(summary + "".join(f"; needs {need}" for need in needs)), options)
        console.print(table)
        console.print()
    console.print(
        "Everywhere the result is base + alpha (merged - base); in code that merges the mean of the task vectors "
        "instead of their sum, alpha is that many times larger. `neurocl merging info NAME` explains one merge."
    )


@app.command()
def info(
    target: Annotated[str, typer.Argument(help="A merge, or a model: file, folder, adapter.")],
    as_json: JsonOption = False,
) -> None:
    """Explain a merge, or show what a model file holds and where it came from."""
    from neurocl.merging.catalog import MERGES

    if target not in MERGES.names() and Path(target).exists():
        _print_model(Path(target), as_json)
        return
    if target not in MERGES.names() and ("/" in target or Path(target).suffix):
        raise UserError(f"{target}: no such file or folder, and no merge of that name")
    from neurocl.merging.describe import described

    row = described(target)
    if as_json:
        typer.echo(json.dumps(row, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{row['name']}[/bold] (merge of {row['works on']}): {row['summary']}")
    if row["about"]:
        console.print("\n" + row["about"], markup=False)
    if row["needs"]:
        console.print("\nneeds: " + ", ".join(row["needs"]))
    if row["options"]:
        table = Table(box=None, pad_edge=False)
        for column in ("option", "values", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for option in row["options"]:
            table.add_row(option["name"], option["type"], str(option["default"]), option["meaning"])
        console.print()
        console.print(table)
    console.print("\nsource: " + row["reference"], markup=False)


def _print_model(path: Path, as_json: bool) -> None:
    from collections import Counter

    from neurocl.merging.checkpoints import FileSource
    from neurocl.merging.parameters import classify
    from neurocl.merging.peft import WEIGHTS_NAME, is_adapter, read_adapter
    from neurocl.merging.statistics import HEADER_KEY

    if (path / "suite.json").is_file():
        raise UserError(f"{path} is a suite of experts; name one of its models, such as {path / 'base'}")
    adapter = path.is_dir() and is_adapter(path)
    layers = read_adapter(path).layers if adapter else {}
    source = FileSource.open(path / WEIGHTS_NAME if adapter else path)
    kinds: Counter[str] = Counter()
    values: Counter[str] = Counter()
    statistics = HEADER_KEY in source.metadata
    for name, spec in source.tensors.items():
        kind = name.partition("/")[0] if statistics else classify(name, spec)
        kinds[kind] += 1
        values[kind] += spec.numel
    document: dict[str, Any] = {
        "path": str(path),
        "kind": "LoRA adapter" if adapter else "statistics" if statistics else "weights",
        "files": sorted({place.file.name for place in source.placed.values()}),
        "tensors": len(source.tensors),
        "values": sum(values.values()),
        "bytes": sum(spec.nbytes for spec in source.tensors.values()),
        "dtypes": sorted({str(spec.dtype).removeprefix("torch.") for spec in source.tensors.values()}),
        "classes": {kind: {"tensors": kinds[kind], "values": values[kind]} for kind in kinds},
        "metadata": source.metadata,
    }
    if adapter:
        document["ranks"] = dict(Counter(str(layer.lora.rank) for layer in layers.values()))
    source.close()
    merged = _provenance(document["metadata"].pop("neurocl_merge", ""))
    if merged:
        document["merged by neurocl"] = merged
    if as_json:
        typer.echo(json.dumps(document, indent=1))
        return
    typer.echo(
        f"{path}: {document['kind']}, {document['tensors']:,} tensors, {document['values']:,} values, "
        f"{_size(document['bytes'])}, {', '.join(document['dtypes'])}"
    )
    for kind, row in document["classes"].items():
        typer.echo(f"  {kind}: {row['tensors']:,} tensors, {row['values']:,} values")
    if adapter:
        typer.echo("  ranks: " + ", ".join(f"{rank} ({count} layers)" for rank, count in document["ranks"].items()))
    if merged:
        typer.echo(
            f"  merged by neurocl {merged['neurocl']} with {merged['method']}, alpha {merged['alpha']}, of "
            + ", ".join(merged["inputs_sha256"])
        )


def _provenance(text: str) -> dict[str, Any]:
    """What :func:`neurocl.merging.files.provenance` wrote; empty if it is something else, files come from anywhere."""
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    known = {"neurocl", "method", "alpha", "inputs_sha256"}
    return said if isinstance(said, dict) and known <= said.keys() and isinstance(said["inputs_sha256"], dict) else {}


SuiteArgument = Annotated[Path, typer.Argument(help="A folder made by `neurocl merging train`.", show_default=False)]
DataOption = Annotated[
    Path | None, typer.Option(help="Folder with data sets.", envvar="NEUROCL_DATA", show_default="the user's cache")
]
SuitePrecisionOption = Annotated[str, typer.Option(help="fp32 or bf16.", rich_help_panel=MACHINE)]
SuiteDeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=MACHINE)]


@app.command()
def stats(
    model: Annotated[Path, typer.Argument(help="An expert of a suite, or a Hugging Face folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New .safetensors file.", show_default=False)],
    suite: Annotated[
        Path | None, typer.Option(help="The suite whose data to use, with --task.", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="A task of the suite.", show_default=False)] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="For Hugging Face models: safetensors file with input_ids, pixel_values ...", show_default=False
        ),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="gram, fisher, kfac; may be repeated.", show_default="gram")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(help="Only parameters like this (glob).", show_default="all")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Samples used.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    diagonal: Annotated[bool, typer.Option("--diagonal", help="Keep only the diagonal of Gram matrices.")] = False,
    conv: Annotated[bool, typer.Option("--conv", help="Gram matrices of convolutions too.")] = False,
    merge_with: Annotated[
        list[Path] | None,
        typer.Option(help="Add these files, collected elsewhere on other data.", show_default=False),
    ] = None,
    data_dir: DataOption = None,
    device: MergeDeviceOption = "cpu",
    threads: MergeThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Collect what some merges need to know about a model's data: Gram matrices, Fisher information, K-FAC factors.

    Examples:

      neurocl merging stats SUITE/experts/turned --suite SUITE --task turned --out turned.safetensors

      neurocl merging stats bert/ --inputs sentences.safetensors --kind gram --out bert.safetensors
    """
    from neurocl.devices import prepare
    from neurocl.merging.gathering import gather
    from neurocl.runs import make_folder

    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    make_folder(out.absolute().parent)
    runtime = prepare(device, "fp32", threads)
    found = gather(
        model,
        suite=suite,
        task=task,
        inputs=inputs,
        kinds=tuple(kind or ["gram"]),
        parameters=parameter,
        num_examples=examples,
        batch_size=batch_size,
        diagonal=diagonal,
        conv=conv,
        merge_with=merge_with or [],
        data_dir=data_dir,
        runtime=runtime,
    )
    found.save(out)
    counts: dict[str, int] = {}
    for own, _ in found:
        counts[own] = counts.get(own, 0) + 1
    if as_json:
        typer.echo(json.dumps({"out": str(out), "bytes": out.stat().st_size, "entries": counts}, indent=1))
        return
    listed = ", ".join(f"{count} x {own}" for own, count in counts.items())
    typer.echo(f"Statistics: {out} ({listed}; {_size(out.stat().st_size)})")


@app.command()
def train(
    suite: Annotated[
        str,
        typer.Option(
            help="digits (embedded, half a minute) or pictures (eight public sets, frozen EfficientNet-Lite)."
        ),
    ] = "digits",
    tasks: Annotated[
        str | None, typer.Option(help="Only these: eurosat,gtsrb.", show_default="all of the suite")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of the suite: epochs=5, width=128, lr=1e-4 ...", show_default=False),
    ] = None,
    regularise: Annotated[str, typer.Option(help="What experts are trained with: none, ita, iel or tak.")] = "none",
    strength: Annotated[float | None, typer.Option(help="Of the regulariser.", show_default="by regulariser")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the suite; an unfinished one goes on.", show_default="runs/...")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A small network and few passes, in seconds.")] = False,
    data_dir: DataOption = None,
    device: SuiteDeviceOption = "auto",
    precision: SuitePrecisionOption = "fp32",
    threads: MergeThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pre-train a small Vision Transformer and fine-tune one expert per task, to have something to merge.

    The task heads are fixed before: the base's class means. ita, iel and tak keep experts composable while they train.
    """
    from neurocl.config import parse_overrides
    from neurocl.devices import prepare
    from neurocl.merging.evaluation import Evaluator
    from neurocl.merging.regularisers import regulariser_factory
    from neurocl.merging.suite import SMOKE, suite_config
    from neurocl.merging.training import train_suite
    from neurocl.runs import fresh_folder

    changes = {
        "seed": seed,
        **(SMOKE if smoke else {}),
        **parse_overrides(assignments or []),
    }
    if tasks is not None:
        changes["tasks"] = tuple(name.strip() for name in tasks.split(","))
    changes["regularise"] = regularise
    if strength is not None:
        changes["strength"] = strength
    config = suite_config(suite, **changes)
    runtime = prepare(device, precision, threads)
    folder = out or fresh_folder(f"suite-{suite}-{seed}")
    say = None if quiet else _say
    made = train_suite(
        config,
        folder,
        runtime=runtime,
        data_dir=data_dir,
        regularise=regulariser_factory(config, runtime),
        say=say,
    )
    evaluator = Evaluator(made, runtime)
    experts, base = evaluator.experts(), evaluator.scores(made.base)
    if as_json:
        typer.echo(json.dumps({"suite": str(folder), "base": base.absolute, "experts": experts}, indent=1))
        return
    _print_accuracies({"base": base.absolute, "expert": experts})
    typer.echo(f"Suite: {folder}")
    typer.echo(f"Merge its experts with every method: neurocl merging compare {folder}")


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _print_accuracies(columns: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    for name in columns:
        table.add_column(f"{name} %", justify="right")
    for task in next(iter(columns.values())):
        table.add_row(task, *(f"{column[task]:.1f}" for column in columns.values()))
    table.add_row("mean", *(f"{sum(column.values()) / len(column):.1f}" for column in columns.values()))
    Console(highlight=False).print(table)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A merged (or any) model of the suite's network.", show_default=False)],
    suite: Annotated[Path, typer.Option(help="A folder made by `neurocl merging train`.", show_default=False)],
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    data_dir: DataOption = None,
    device: SuiteDeviceOption = "auto",
    precision: SuitePrecisionOption = "fp32",
    threads: MergeThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of a model on every task of a suite, absolute and in percent of the task's own expert."""
    from neurocl.devices import prepare
    from neurocl.merging.evaluation import Evaluator
    from neurocl.merging.suite import Suite, load_fitting

    if split not in ("test", "val"):
        raise UserError(f"--split must be test or val, got {split!r}")
    opened = Suite.open(suite, data_dir=data_dir)
    state = load_fitting(model, opened.network_config)
    scores = Evaluator(opened, prepare(device, precision, threads)).scores(state, split)  # type: ignore[arg-type]
    if as_json:
        document = {
            "model": str(model),
            "split": split,
            "absolute": scores.absolute,
            "normalised": scores.normalised,
            "mean_absolute": scores.mean_absolute,
            "mean_normalised": scores.mean_normalised,
        }
        typer.echo(json.dumps(document, indent=1))
        return
    _print_accuracies({"model": scores.absolute, "expert": scores.reference, "of the expert's": scores.normalised})


@app.command()
def compare(
    suite: SuiteArgument,
    method: Annotated[
        list[str] | None, typer.Option(help="Only these merges; may be repeated.", show_default="all")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Unlabelled training pictures per task for merges with data.")
    ] = 256,
    max_items: Annotated[
        int | None, typer.Option(min=1, help="Pictures per task to measure on.", show_default="all")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison.", show_default="SUITE/comparison")] = None,
    form: Annotated[str, typer.Option("--format", help="table, md, csv or json.")] = "table",
    data_dir: DataOption = None,
    device: SuiteDeviceOption = "auto",
    precision: SuitePrecisionOption = "fp32",
    threads: MergeThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge the experts of a suite with every method; table and plots of absolute and normalised accuracy.

    Scales are chosen on validation pictures. Interrupted, it goes on where it was.
    """
    from neurocl.devices import prepare
    from neurocl.merging import comparison
    from neurocl.merging.plots import save_plots
    from neurocl.merging.suite import Suite
    from neurocl.merging.tables import FORMATS, comparison_table

    form = "json" if as_json else form
    if form not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    opened = Suite.open(suite, data_dir=data_dir)
    folder = out or suite / "comparison"
    chosen = comparison.contenders(method or [])
    outcomes = comparison.compare(
        opened,
        folder,
        runtime=prepare(device, precision, threads),
        chosen=chosen,
        num_examples=examples,
        max_items=max_items,
        with_masks=not method,
        say=None if quiet else _say,
    )
    pictures = save_plots(outcomes, folder / "plots")
    typer.echo(comparison_table(outcomes, form))
    if form == "table":
        typer.echo(f"Comparison: {folder / 'comparison.json'}")
        typer.echo("Plots: " + ", ".join(str(path) for path in pictures))
