"""``neurocl merging train``, ``stats``, ``evaluate`` and ``compare``: experts, and how good merges of them are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from neurocl.cli.merging import MACHINE, MergeDeviceOption, MergeThreadsOption, say, size_text
from neurocl.cli.options import JsonOption, QuietOption
from neurocl.errors import UserError

SuiteArgument = Annotated[Path, typer.Argument(help="A folder made by `neurocl merging train`.", show_default=False)]
DataOption = Annotated[
    Path | None, typer.Option(help="Folder with data sets.", envvar="NEUROCL_DATA", show_default="the user's cache")
]
SuitePrecisionOption = Annotated[str, typer.Option(help="fp32 or bf16.", rich_help_panel=MACHINE)]
SuiteDeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=MACHINE)]


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
    typer.echo(f"Statistics: {out} ({listed}; {size_text(out.stat().st_size)})")


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
    tell = None if quiet else say
    made = train_suite(
        config,
        folder,
        runtime=runtime,
        data_dir=data_dir,
        regularise=regulariser_factory(config, runtime),
        say=tell,
    )
    evaluator = Evaluator(made, runtime)
    experts, base = evaluator.experts(), evaluator.scores(made.base)
    if as_json:
        typer.echo(json.dumps({"suite": str(folder), "base": base.absolute, "experts": experts}, indent=1))
        return
    _print_accuracies({"base": base.absolute, "expert": experts})
    typer.echo(f"Suite: {folder}")
    typer.echo(f"Merge its experts with every method: neurocl merging compare {folder}")


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
        say=None if quiet else say,
    )
    pictures = save_plots(outcomes, folder / "plots")
    typer.echo(comparison_table(outcomes, form))
    if form == "table":
        typer.echo(f"Comparison: {folder / 'comparison.json'}")
        typer.echo("Plots: " + ", ".join(str(path) for path in pictures))
