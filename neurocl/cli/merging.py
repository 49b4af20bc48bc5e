"""``neurocl merging merge``: merge models on disk; the group of the commands about merging."""

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
        say("lora-linear adds the factors, not the updates: cross terms B_i A_j come in; lora-svd has none")
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
    console.print(f"output: {size_text(plan.out_bytes)} in {files}")
    console.print(f"memory: about {size_text(plan.memory_bytes)} (set by {plan.largest})", markup=False)


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


def size_text(count: int) -> str:
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
        f"{plan.method.name}: {size_text(plan.out_bytes)} in {report.seconds:.1f} s, "
        f"peak memory {report.peak_memory_mb:.0f} MB{again}"
    )
    typer.echo(f"Merged model: {report.out}")
    if report.out.is_dir():
        typer.echo(f"Its recipe and model card: {report.out / 'merge.yaml'}, {report.out / 'README.md'}")


def say(line: str) -> None:
    typer.echo(line, err=True)
