"""What ``neurocl spiking train`` and ``neurocl continual train`` share: options, seeds, and the end of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from neurocl.config import Config, merged, parse_overrides, read_yaml, to_yaml
from neurocl.errors import Interrupted, UserError

if TYPE_CHECKING:
    from neurocl.continual.training import RunResult

SMOKE: dict[str, Any] = {"epochs": 1, "max_train_per_class": 12, "max_test_per_class": 6, "buffer_size": 16}
SMOKE_NETWORKS: dict[str, dict[str, Any]] = {
    "spiking": {"backbone": "spiking-resnet-small", "backbone_options": {"stem": 8, "channels": [8, 16]}},
    "continual": {"backbone": "resnet-small", "backbone_options": {"stem": 8, "channels": [8, 16]}},
}


class SeedList(Config):
    """``seeds.yaml`` in a folder of several seeds: what is needed to go on with them."""

    area: str
    seeds: tuple[int, ...]
    config: dict[str, Any]


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"`` -> [0, 1, 2], and a single number is how many: ``"3"`` -> [0, 1, 2].

    Raises:
        UserError: not a positive number or a comma-separated list of different non-negative integers.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds expects integers such as 0,1,2, got {text!r}") from None
    if len(seeds) == 1 and seeds[0] > 0:
        return list(range(seeds[0]))
    if any(seed < 0 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds expects different non-negative integers, got {text!r}")
    return seeds


def run_training(
    area: str,
    flags: Mapping[str, Any],
    *,
    config_file: Path | None,
    assignments: Sequence[str],
    seeds: str | None,
    out: Path | None,
    resume_path: Path | None,
    stop_after_task: int | None,
    smoke: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Carry out one ``train`` command.

    Args:
        area: ``"spiking"`` or ``"continual"``.
        flags: configuration values given as options; None means not given.
        stop_after_task: counted from 1, as users count.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    stop = None if stop_after_task is None else stop_after_task - 1
    if resume_path is not None:
        allowed = {"device", "threads", "data_dir"}
        clash = sorted(given.keys() - allowed)
        if clash or config_file or assignments or seeds or out or smoke:
            named = f"--{clash[0].replace('_', '-')}" if clash else "an option that changes the run"
            raise UserError(f"--resume continues a run with its own configuration; drop {named}")
        results = _resume(resume_path, {key: given.get(key) for key in allowed}, stop, quiet)
    else:
        layers = [read_yaml(config_file) if config_file else {}, parse_overrides(assignments), _nested(given)]
        if smoke:
            layers = [*_smoke_network(area, layers), layers[0], _smoke_budget(merged(*layers)), *layers[1:]]
        results = _start(area, merged(*layers), seeds, out, stop, quiet)
    _print_end(results, as_json)


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """``{"optimizer.lr": 1}`` -> ``{"optimizer": {"lr": 1}}``."""
    result: dict[str, Any] = {}
    for key, value in given.items():
        group, _, name = key.partition(".")
        result = merged(result, {group: {name: value}} if name else {group: value})
    return result


def _smoke_budget(values: Mapping[str, Any]) -> dict[str, Any]:
    """``SMOKE`` with room in memory for every class of the data set."""
    from neurocl.data.catalog import load_benchmark

    classes = sum(load_benchmark(str(values.get("dataset", "seq-digits"))).task_sizes)
    return {**SMOKE, "buffer_size": max(SMOKE["buffer_size"], classes)}


def _smoke_network(area: str, layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A tiny network for ``--smoke`` unless the user chose one."""
    return [] if any("backbone" in layer for layer in layers) else [SMOKE_NETWORKS[area]]


def _start(
    area: str, values: dict[str, Any], seeds: str | None, out: Path | None, stop: int | None, quiet: bool
) -> list[RunResult]:
    from neurocl.cli.progress import make_progress
    from neurocl.continual.building import resolve
    from neurocl.continual.training import train
    from neurocl.runs import write_atomically

    if seeds is None:
        config = resolve(area, values)
        return [train(config, out=out, progress=make_progress(quiet), stop_after_task=stop)]
    if "seed" in values:
        raise UserError("--seed and --seeds exclude each other")
    numbers = parse_seeds(seeds)
    configs = [resolve(area, values, {"seed": seed}) for seed in numbers]
    parent = _make_parent(configs[0], out)
    plan = SeedList(area=area, seeds=tuple(numbers), config=configs[0].model_dump(mode="json"))
    write_atomically(parent / "seeds.yaml", to_yaml(plan))
    with _hint_names(parent):
        return [
            train(config, out=parent / f"seed-{config.seed}", progress=make_progress(quiet), stop_after_task=stop)
            for config in configs
        ]


@contextmanager
def _hint_names(parent: Path) -> Iterator[None]:
    """An interrupted series of seeds is resumed as a whole."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(re.sub(r"--resume .*", lambda match: f"--resume {parent}", str(stop))) from None


def _make_parent(config: Any, out: Path | None) -> Path:
    from neurocl.runs import fresh_folder, make_folder

    if out is None:
        return fresh_folder(f"{config.area}-{config.method}-{Path(config.dataset).stem}-seeds")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; choose another --out")
    make_folder(out)
    return out


def _resume(path: Path, changes: Mapping[str, Any], stop: int | None, quiet: bool) -> list[RunResult]:
    from neurocl.cli.progress import make_progress
    from neurocl.config import validate
    from neurocl.continual.building import resolve
    from neurocl.continual.training import resume, train

    if not (path / "seeds.yaml").is_file():
        return [resume(path, progress=make_progress(quiet), stop_after_task=stop, **changes)]
    plan = validate(SeedList, read_yaml(path / "seeds.yaml"), source=str(path / "seeds.yaml"))
    given = {key: value for key, value in changes.items() if value is not None}
    results = []
    with _hint_names(path):
        for seed in plan.seeds:
            folder = path / f"seed-{seed}"
            progress = make_progress(quiet)
            if (folder / "config.yaml").is_file():
                results.append(resume(folder, progress=progress, stop_after_task=stop, **changes))
            else:
                config = resolve(plan.area, plan.config, given, {"seed": seed})
                results.append(train(config, out=folder, progress=progress, stop_after_task=stop))
    return results


def _print_end(results: Sequence[RunResult], as_json: bool) -> None:
    """The table, where the results are, and what to do next."""
    from neurocl.report import print_summary

    documents = [result.document for result in results]
    if as_json:
        typer.echo(json.dumps([{"run": str(r.path), **r.document} for r in results], indent=1))
        return
    print_summary(documents)
    first = results[0]
    assert first.path is not None
    folder = first.path.parent if len(results) > 1 else first.path
    typer.echo(f"\nResults: {folder}")
    if any(result.status == "stopped" for result in results):
        typer.echo(f"Go on:   neurocl {first.document['area']} train --resume {folder}")
    else:
        typer.echo(f"Next:    neurocl report {folder} --plots")


def print_config(area: str) -> None:
    """Every key of a run with its default and meaning, as YAML that ``--config`` reads."""
    from neurocl.continual.building import config_class, resolve

    defaults = resolve(area, {}).model_dump(mode="json")
    typer.echo(f"# neurocl {area} train --config FILE; any key can also be given as --set key=value")
    for line in _commented(config_class(area), defaults, ""):
        typer.echo(line)


def _commented(model: Any, values: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        value = values[name]
        meaning = f"  # {field.description}" if field.description else ""
        if isinstance(value, dict) and hasattr(field.annotation, "model_fields"):
            lines.append(f"{indent}{name}:{meaning}")
            lines += _commented(field.annotation, value, indent + "  ")
        else:
            lines.append(f"{indent}{name}: {json.dumps(value)}{meaning}")
    return lines
