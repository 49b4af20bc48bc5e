"""``neurocl federated``: run a method over clients that keep their data, compare methods, list them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from neurocl.cli.options import JsonOption, QuietOption, RunArgument
from neurocl.errors import UserError

app = typer.Typer(
    help="Learn from clients that keep their data.\n\n"
    "[bold]neurocl federated run[/bold] lets five clients learn three tasks of real digits together, in this process, "
    "in seconds; [bold]neurocl federated compare[/bold] puts several methods beside each other.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

DatasetOption = Annotated[str | None, typer.Option(help="See `neurocl federated methods`.", show_default="digits")]
ClientsOption = Annotated[int | None, typer.Option(min=1, help="Number of clients.", show_default="5")]
BetaOption = Annotated[
    float | None,
    typer.Option(help="How evenly samples are dealt: 0.05 very unevenly, 100 all alike.", show_default="0.5"),
]
RoundsOption = Annotated[int | None, typer.Option(min=1, help="Rounds of messages per task.", show_default="3")]
EpochsOption = Annotated[int | None, typer.Option(min=1, help="Epochs of a client per round.", show_default="3")]
LrOption = Annotated[float | None, typer.Option(help="Learning rate of the clients.", show_default="by method")]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, help="Processes that run clients; 0 for this one.", show_default="0")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(help="YAML file with any keys; what it leaves out is as in the reference.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any key; repeat it: options.rank=4, device=auto, batch_size=32 ...", show_default=False
    ),
]
DataOption = Annotated[
    Path | None, typer.Option(help="Folder with data sets.", envvar="NEUROCL_DATA", show_default="the user's cache")
]
SecureSumOption = Annotated[
    bool, typer.Option("--secure-sum", help="The server sees nothing but sums over its clients.")
]
SmokeOption = Annotated[bool, typer.Option("--smoke", help="Two clients, one round, one epoch: done in seconds.")]
ResumeOption = Annotated[Path | None, typer.Option(help="Go on with this run, as it was set up.", show_default=False)]

# Without options: minutes at most, and enough to see forgetting.
DEMO: dict[str, Any] = {
    "classes_per_task": [4, 3, 3],
    "partition": {"num_clients": 5, "beta": 0.5},
    "rounds": 3,
    "local_epochs": 3,
}
SMOKE: dict[str, Any] = {"partition": {"num_clients": 2}, "rounds": 1, "local_epochs": 1}
COMPARED = "fedavg,lora,lorm,hgp,fedcof"


@app.command()
def run(
    method: Annotated[str | None, typer.Option(help="See `neurocl federated methods`.", show_default="fedavg")] = None,
    dataset: DatasetOption = None,
    clients: ClientsOption = None,
    beta: BetaOption = None,
    rounds: RoundsOption = None,
    local_epochs: EpochsOption = None,
    lr: LrOption = None,
    workers: WorkersOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random.", show_default="0")] = None,
    secure_sum: SecureSumOption = False,
    runtime: Annotated[str, typer.Option(help="local, or flower-sim for Flower's simulation.")] = "local",
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/...")] = None,
    resume: ResumeOption = None,
    smoke: SmokeOption = False,
    data_dir: DataOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run one method: tasks one after the other, rounds of messages in each. Saved after every round."""
    if runtime not in RUNTIMES:
        raise UserError(f"--runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    connect: Any = None
    if runtime == "flower-sim":
        from neurocl.federated.flower.simulation import check_ray, simulating

        check_ray()
        connect = simulating
    given: dict[str, Any] = {"method": method, "seed": seed, "secure_sum": {} if secure_sum else None}
    own = {key: value for key, value in given.items() if value is not None}
    flags = {**flags_of(dataset, clients, beta, rounds, local_epochs, lr, workers, data_dir), **own}
    if resume is not None:
        refuse_changes(flags, config=config, set=assignments, smoke=smoke, out=out)
    settings = None if resume else config_of(config, flags, assignments, smoke)
    run_and_print(settings, out, resume, connect, as_json=as_json, quiet=quiet)


def run_and_print(
    config: Any, out: Path | None, resume: Path | None, connect: Any, *, as_json: bool, quiet: bool
) -> None:
    """Run a configuration, or go on with a run, and print its tables.

    Args:
        config: a :class:`~neurocl.federated.config.FederatedConfig`; None with ``resume``.
        out, resume: run folders.
        connect: see :func:`~neurocl.federated.driver.run_federated`.
        as_json, quiet: as on the command line.
    """
    from neurocl.federated.driver import resume_federated, run_federated
    from neurocl.runs import RunFolder

    say = None if quiet else Progress()
    if resume is not None and not quiet and RunFolder.open(resume).has_result():
        typer.echo(f"{resume} was finished before; this is its result", err=True)
    if resume is not None:
        result, path = resume_federated(resume, say=say, connect=connect), resume
    else:
        result, path = run_federated(config, out=out, say=say, connect=connect)
    if as_json:
        shown = {key: result[key] for key in ("metrics", "bytes", "failures", "privacy") if key in result}
        typer.echo(json.dumps({"run": str(path), **shown}))
        return
    _print_accuracies(result)
    if result["failures"]:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(result["failures"].items()))
        typer.echo(f"Replies that were lost: {told}; see metrics.jsonl")
    if "privacy" in result:
        given = result["privacy"]
        typer.echo(
            f"privacy of a client: epsilon {given['epsilon']:.2f} at delta {given['delta']:g} after "
            f"{given['releases']} rounds (noise {given['noise']:g} x {given['clip']:g}, added by the {given['where']})"
        )
    typer.echo(f"Run: {path}")
    typer.echo(f"Next: neurocl report {path} --plots")
    typer.echo("Or other methods: neurocl federated compare")


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = COMPARED,
    seeds: Annotated[str, typer.Option(help="0,1,2, or how many.")] = "1",
    dataset: DatasetOption = None,
    clients: ClientsOption = None,
    beta: BetaOption = None,
    rounds: RoundsOption = None,
    local_epochs: EpochsOption = None,
    lr: LrOption = None,
    workers: WorkersOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of all runs; give it again to go on, what is finished stays.", show_default="runs/..."
        ),
    ] = None,
    smoke: SmokeOption = False,
    form: Annotated[str, typer.Option("--format", help="table, md, csv or json.")] = "table",
    data_dir: DataOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run several methods over the same clients and seeds, and print them beside each other: accuracy against bytes."""
    from statistics import fmean

    from neurocl.config import merged
    from neurocl.federated.comparison import compare as measure

    if form not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    flags = flags_of(dataset, clients, beta, rounds, local_epochs, lr, workers, data_dir)
    names = [name.strip() for name in methods.split(",")]
    configs = [
        config_of(config, merged(flags, {"method": name, "seed": seed}), assignments, smoke)
        for name in dict.fromkeys(name for name in names if name)
        for seed in _seeds(seeds)
    ]
    if not configs:
        raise UserError("--methods names no method")
    _check_methods(configs)
    found = measure(configs, out=out, say=None if quiet else Progress())
    rows = []
    for name, results in found.items():
        final = [result["metrics"]["class_il"]["final_average_accuracy"] for result in results]
        forgotten = [result["metrics"]["class_il"]["forgetting"] for result in results]
        up = fmean(result["bytes"]["up"] for result in results) / 1e6
        down = fmean(result["bytes"]["down"] for result in results) / 1e6
        seconds = fmean(result["seconds"]["total"] for result in results)
        rows.append([name, _spread(final), _spread(forgotten), f"{up:.2f}", f"{down:.2f}", f"{seconds:.1f}"])
    _print_rows(["method", "accuracy %", "forgetting", "MB up", "MB down", "seconds"], rows, form)


@app.command()
def unlearn(
    run: RunArgument,
    clients: Annotated[
        list[int] | None, typer.Option("--client", help="Who leaves; repeat it for several.", show_default=False)
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="negation, global-negation, ledger or exact.", show_default="what suits the method"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="How much of the vector is subtracted, 0 to 2.", show_default="the client's share, 0.1 to 0.5"
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="The largest alpha that keeps 95 % of what the remaining clients get right.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(help="That a leaving client trains.", show_default="half of those in the run")
    ] = None,
    gold: Annotated[bool, typer.Option("--gold", help="Train again without them, to compare.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="One round of the remaining clients afterwards.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run.", show_default="runs/...")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the run itself.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Take clients out of a finished run: by task arithmetic (method tangent), or exactly where the method can."""
    from neurocl.federated.unlearning import MODES
    from neurocl.federated.unlearning import unlearn as take_out

    if mode is not None and mode not in MODES:
        raise UserError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    report, path = take_out(
        run,
        clients or [],
        mode=mode,
        alpha=alpha,
        sweep=sweep,
        epochs=epochs,
        gold=gold,
        repair=repair,
        out=out,
        in_place=in_place,
        say=None if quiet else Progress(),
    )
    if as_json:
        typer.echo(json.dumps({"run": str(path), **report}))
        return
    _print_removal(report)
    typer.echo(f"Run: {path}")


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """The federated methods and the problems they can be run on."""
    from neurocl.federated.catalog import FEDERATED, PROBLEMS

    tables = {"methods": FEDERATED.entries(), "data sets": PROBLEMS.entries()}
    if as_json:
        document = {kind: {entry.name: entry.summary for entry in entries} for kind, entries in tables.items()}
        typer.echo(json.dumps(document, indent=1))
        return
    for kind, entries in tables.items():
        typer.echo(kind)
        _print_rows(["", ""], [[f"  {entry.name}", entry.summary] for entry in entries], "table")


FORMATS = ("table", "md", "csv", "json")
RUNTIMES = ("local", "flower-sim")


def flags_of(
    dataset: str | None,
    clients: int | None,
    beta: float | None,
    rounds: int | None,
    local_epochs: int | None,
    lr: float | None,
    workers: int | None,
    data_dir: Path | None,
) -> dict[str, Any]:
    """Options that were given, as configuration keys."""
    given = {
        "dataset": dataset,
        "rounds": rounds,
        "local_epochs": local_epochs,
        "lr": lr,
        "workers": workers,
        "data_dir": data_dir,
    }
    partition = {"num_clients": clients, "beta": beta}
    found: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    own = {key: value for key, value in partition.items() if value is not None}
    return {**found, "partition": own} if own else found


def refuse_changes(flags: dict[str, Any], **others: Any) -> None:
    """Nothing that would change a run may stand beside ``--resume``.

    Raises:
        UserError: names an option that does.
    """
    given = [*flags, *(name for name, value in others.items() if value)]
    given = [name for name in given if name != "data_dir"]  # often set by the environment
    if given:
        inner = flags.get("partition", {})
        name = ("clients" if "num_clients" in inner else "beta") if given[0] == "partition" else given[0]
        raise UserError(f"--resume goes on with a run as it was set up; drop --{name.replace('_', '-')}")


def check_dataset(name: str) -> None:
    """A name of the catalogue, or ``module:function``.

    Raises:
        UserError: neither; the message says how a function of one's own is named.
    """
    module, colon, function = name.partition(":")
    if colon and not all(part.isidentifier() for part in (*module.split("."), function)):
        raise UserError(f"a data set of your own is module:function such as my_file:waves, got {name!r}")
    if not colon:
        from neurocl.federated.catalog import PROBLEMS

        PROBLEMS.entry(name)


def _check_methods(configs: Sequence[Any]) -> None:
    """A misspelt last method must not cost the runs of the first.

    Raises:
        UserError: an unknown method, or an option that one of them does not have.
    """
    from neurocl.config import validate
    from neurocl.federated.catalog import FEDERATED

    for config in configs:
        validate(FEDERATED.load(config.method).Config, config.options, source=f"options of {config.method}")


def config_of(file: Path | None, flags: dict[str, Any], assignments: list[str] | None, smoke: bool) -> Any:
    """The configuration: the demonstration's, the file, the options, ``--set``, the later ones winning.

    Raises:
        UserError: as :func:`checked`.
    """
    from neurocl.config import parse_overrides, read_yaml

    layers: list[dict[str, Any]] = []
    own = read_yaml(file) if file else {}
    if not own:
        demo = dict(DEMO)
        if flags.get("dataset", "digits") != "digits":
            del demo["classes_per_task"]
        layers.append(demo)
    return checked(*layers, own, SMOKE if smoke else {}, flags, parse_overrides(assignments or []))


def checked(*layers: dict[str, Any]) -> Any:
    """The configuration of layers, the later ones winning, with the device by its name.

    Raises:
        UserError: an unknown key or a wrong value, no such data set, folder or device.
    """
    from neurocl.config import merged, validate
    from neurocl.federated.config import FederatedConfig

    found = validate(FederatedConfig, merged(*layers), source="federated")
    check_dataset(found.dataset)
    if found.data_dir is not None and not found.data_dir.is_dir():
        raise UserError(f"data_dir {found.data_dir} is not a folder")
    if found.device == "cpu":
        return found
    from neurocl.devices import resolve_device

    return found.model_copy(update={"device": str(resolve_device(found.device))})


def _seeds(text: str) -> list[int]:
    """``0,1,2`` or a number of seeds.

    Raises:
        UserError: anything else.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds must be numbers such as 0,1,2, or how many, got {text!r}") from None
    found = list(dict.fromkeys(numbers)) if "," in text else list(range(numbers[0]))
    if not found or min(found) < 0:
        raise UserError(f"--seeds must be numbers such as 0,1,2, or how many, got {text!r}")
    return found


class Progress:
    """A line on stderr for every task, and a running one for rounds on a terminal."""

    def __init__(self) -> None:
        import sys

        self._live = sys.stderr.isatty()

    def __call__(self, record: dict[str, Any]) -> None:
        if record["event"] == "task":
            if self._live:
                typer.echo("\r\033[K", err=True, nl=False)
            typer.echo(f"task {record['task'] + 1}: {record['average']:.2f} % over the classes seen so far", err=True)
        elif record["event"] == "run":
            typer.echo(record["text"], err=True)
        elif self._live:
            text = f"task {record['task'] + 1}, {record['phase']} {record['round'] + 1}, {record['seconds']:.1f} s"
            typer.echo(f"\r\033[K{text}", err=True, nl=False)


def _print_accuracies(result: dict[str, Any]) -> None:
    matrix = result["accuracy"]["class_il"]
    header = ["after task", *(f"task {index + 1}" for index in range(len(matrix)))]
    rows = [
        [str(after + 1), *(f"{value:.1f}" if index <= after else "" for index, value in enumerate(row))]
        for after, row in enumerate(matrix)
    ]
    _print_rows(header, rows, "table")
    found = result["metrics"]["class_il"]
    typer.echo(
        f"final average accuracy {found['final_average_accuracy']:.2f} %, forgetting {found['forgetting']:.2f}, "
        f"{result['bytes']['up'] / 1e6:.2f} MB up, {result['bytes']['down'] / 1e6:.2f} MB down, "
        f"{result['seconds']['total']:.1f} s"
    )


JUDGED = {
    "forget": "their data",
    "retain": "others' data",
    "test": "test",
    "test_own": "their classes",
    "test_others": "other classes",
}


def _print_removal(report: dict[str, Any]) -> None:
    rows = []
    for name, found in report["accuracy"].items():
        cells = ["" if found[key] is None else f"{found[key]:.1f}" for key in JUDGED]
        member = "" if found["membership"] is None else f"{found['membership']:.2f}"
        distance = report.get("distance", {}).get(name)
        rows.append([name, *cells, member, "" if distance is None else f"{distance:.3f}"])
    _print_rows(["accuracy %", *JUDGED.values(), "membership", "to gold"], rows, "table")
    scales = ", ".join(f"{alpha:.3g} for client {client}" for client, alpha in report["alpha"].items())
    used = report["bytes"]
    typer.echo(
        f"{report['mode']}{', alpha ' + scales if scales else ''}: {used['up'] / 1e6:.2f} MB up, "
        f"{used['down'] / 1e6:.2f} MB down, {report['seconds']:.1f} s"
    )
    if "repair_bytes" in report:
        used = report["repair_bytes"]
        typer.echo(f"repair: {used['up'] / 1e6:.2f} MB up, {used['down'] / 1e6:.2f} MB down")
    if report.get("over_removed"):
        typer.echo("Their data are answered worse than without ever having seen them, which tells of them: lower alpha")


def _spread(values: Sequence[float]) -> str:
    from statistics import fmean, stdev

    mean = f"{fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.2f}"


def _print_rows(header: Sequence[str], rows: Sequence[Sequence[str]], form: str) -> None:
    if form == "json":
        typer.echo(json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=1))
    elif form == "csv":
        import csv
        import sys

        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
    elif form == "md":
        typer.echo("| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
        for row in rows:
            typer.echo("| " + " | ".join(row) + " |")
    else:
        from rich.console import Console
        from rich.table import Table

        console = Console(highlight=False)
        table = Table(box=None, pad_edge=False, show_header=any(header))
        # rich would fold cells and cut words
        wide = sum(max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)) > console.width + 2
        for index, column in enumerate(header):
            title = column.replace(" ", "\n") if wide else column
            table.add_column(title, justify="left" if index == 0 or not column else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
