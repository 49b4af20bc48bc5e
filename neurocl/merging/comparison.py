"""Every merge on one suite of experts: scale chosen on validation pictures, accuracies on test pictures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from neurocl.devices import Runtime, machine, versions
from neurocl.errors import UserError
from neurocl.merging.catalog import MERGES
from neurocl.merging.collector import collect
from neurocl.merging.evaluation import Evaluator, Scores
from neurocl.merging.iso import subspace_alignment
from neurocl.merging.masks import compress
from neurocl.merging.memory import find_method, merge
from neurocl.merging.statistics import Statistics
from neurocl.merging.suite import LOGIT_SCALE, Suite, network
from neurocl.registry import did_you_mean
from neurocl.runs import make_folder, read_json, write_atomically

State = dict[str, torch.Tensor]
COMPARISON_SCHEMA = 1
ONE = (1.0,)
SMALL = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LARGE = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0)
SCALED = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)  # for merges of the size of a mean
PATIENCE = 3
MASKS: dict[str, Literal["emr", "tall"]] = {"emr (per task)": "emr", "tall-masks (per task)": "tall"}


@dataclass(frozen=True)
class Contender:
    """One merge with the scales to try.

    Attributes:
        method: its name.
        alphas: tried in this order until the validation accuracy has not improved for a while.
        options: of the method.
        label: in tables; the method if empty.
    """

    method: str
    alphas: tuple[float, ...] = ONE
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.method


CONTENDERS = (
    Contender("average"),
    Contender("task-arithmetic", SMALL),
    Contender("ties", LARGE),
    Contender("dare", SMALL),
    Contender("dare-ties", SMALL),
    Contender("breadcrumbs", SMALL),
    Contender("magnitude-prune", SMALL),
    Contender("model-stock"),
    Contender("consensus", SMALL),
    Contender("fisher"),
    Contender("regmean"),
    Contender("regmean-pp"),
    Contender("com"),
    Contender("com", options={"target": "expert"}, label="com (expert)"),
    Contender("regmean", SCALED, label="regmean (scaled)"),
    Contender("com", SCALED, {"target": "expert"}, label="com (expert, scaled)"),
    Contender("wudi"),
    Contender("wudi", LARGE, {"solver": "closed"}, label="wudi (closed)"),
    Contender("tsv-m", LARGE),
    Contender("iso-c", LARGE),
    Contender("iso-cts", LARGE),
    Contender("ada-merging"),
)


@dataclass(frozen=True)
class Outcome:
    """How one merge did.

    Attributes:
        name: of the row.
        alpha: scale with the best normalised validation accuracy, NaN where there is none to choose.
        absolute: test accuracy by task, in percent.
        normalised: mean over tasks of the percentage of the expert's accuracy.
        seconds: time of the merge itself.
        sweep: scale -> (absolute, normalised) on validation pictures.
        alignment: task -> mean subspace alignment ratio of its matrices with the merged ones.
        per_task_model: the task picks its own model (masks), so this is no single merged model.
    """

    name: str
    alpha: float
    absolute: dict[str, float]
    normalised: float
    seconds: float
    sweep: dict[str, tuple[float, float]] = field(default_factory=dict)
    alignment: dict[str, float] = field(default_factory=dict)
    per_task_model: bool = False

    @property
    def mean(self) -> float:
        return sum(self.absolute.values()) / len(self.absolute)


class Calibration:
    """What merges may know about the data: a few training pictures of every task, without labels.

    Args:
        suite: the experts.
        num_examples: pictures of each task.
        runtime: device and number format.
    """

    def __init__(self, suite: Suite, num_examples: int, runtime: Runtime) -> None:
        self.suite = suite
        self.num_examples = num_examples
        self.runtime = runtime
        self._statistics: dict[str, list[Statistics]] = {}

    def batches(self, task: str) -> list[torch.Tensor]:
        """Inputs of a task, the same ones every time."""
        items = self.suite.items(task, "train").first(self.num_examples)
        return [inputs.to(self.runtime.device) for inputs, _ in items.batches(64)]

    def statistics(self, kind: str) -> list[Statistics]:
        """Of every expert on its own task."""
        if kind not in self._statistics:
            self._statistics[kind] = [self._collected(task, kind) for task in self.suite.tasks]
        return self._statistics[kind]

    def _collected(self, task: str, kind: str) -> Statistics:
        model = network(self.suite.network_config, self.suite.experts[task]).to(self.runtime.device)
        head = self.suite.heads[task].to(self.runtime.device)

        def forward(module: torch.nn.Module, batch: Any) -> torch.Tensor:
            embedding = module(batch)
            if kind != "fisher":
                return embedding  # type: ignore[no-any-return]
            return LOGIT_SCALE * torch.nn.functional.normalize(embedding, dim=1) @ head.T

        return collect(model, self.batches(task), kinds=(kind,), forward=forward)  # type: ignore[arg-type]


def contenders(names: Sequence[str]) -> list[Contender]:
    """The contenders of these names, all if there are none.

    Raises:
        UserError: no such merge in the comparison.
    """
    known = {contender.name: contender for contender in CONTENDERS}
    for name in names:
        if name not in known and name not in MERGES.names("weights"):
            raise UserError(
                f"{name!r} is not in the comparison{did_you_mean(name, known)} (choose from {', '.join(known)})"
            )
    return [known.get(name, Contender(name, LARGE)) for name in names] if names else list(CONTENDERS)


def merged_with(contender: Contender, suite: Suite, calibration: Calibration) -> State:
    """The merge at alpha = 1.

    Raises:
        UserError: the method cannot merge this suite.
    """
    models = [suite.experts[task] for task in suite.tasks]
    entry = MERGES.entry(contender.method)
    device = calibration.runtime.device
    if "networks" not in entry.areas:
        needed = find_method(contender.method).statistic
        statistics = calibration.statistics(needed) if needed else None
        found = merge(suite.base, models, contender.method, statistics=statistics, device=device, **contender.options)
        return {name: value.cpu() for name, value in found.items()}
    function = entry.load()
    networks = [network(suite.network_config, state).to(device) for state in models]
    base = network(suite.network_config, suite.base).to(device)
    if contender.method == "ada-merging":
        heads = [suite.heads[task].to(device) for task in suite.tasks]
        batches = [[inputs.to(device) for inputs, _ in suite.items(task, "test").batches(16)] for task in suite.tasks]
        model = function(base, networks, batches, heads=heads, logit_scale=LOGIT_SCALE, **contender.options).model
    else:
        batches = [calibration.batches(task) for task in suite.tasks]
        blocks = [f"blocks.{index}" for index in range(suite.config.depth)]
        if contender.method == "regmean-pp":
            model = function(networks, batches, blocks, **contender.options)
        else:
            model = function(base, networks, batches, blocks=blocks, **contender.options).model
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def scaled(base: State, merged: State, alpha: float) -> State:
    """``base + alpha (merged - base)``."""
    if alpha == 1:
        return merged
    return {
        name: value + alpha * (merged[name] - value) if value.is_floating_point() else value
        for name, value in base.items()
    }


def sweep(evaluator: Evaluator, merged: State, alphas: Iterable[float]) -> tuple[float, dict[str, tuple[float, float]]]:
    """Try scales on validation pictures.

    Stops when the mean absolute accuracy has not improved for three scales; the scale with the best normalised
    accuracy of those tried wins, as in the published protocol.

    Returns: (best scale, scale -> (absolute, normalised)).
    """
    seen: dict[str, tuple[float, float]] = {}
    best, best_absolute, since = (-math.inf, 1.0), -math.inf, 0
    for alpha in alphas:
        scores = evaluator.scores(scaled(evaluator.suite.base, merged, alpha), "val")
        seen[f"{alpha:g}"] = (scores.mean_absolute, scores.mean_normalised)
        best = max(best, (scores.mean_normalised, alpha))
        since = 0 if scores.mean_absolute > best_absolute else since + 1
        best_absolute = max(best_absolute, scores.mean_absolute)
        if since >= PATIENCE:
            break
    return best[1], seen


def alignment(suite: Suite, merged: State) -> dict[str, float]:
    """Mean subspace alignment ratio of each task's block matrices with the merged ones."""
    names = [name for name, value in suite.base.items() if value.dim() == 2 and name.startswith("blocks.")]
    found = {}
    for task in suite.tasks:
        ratios = [
            subspace_alignment(
                (suite.experts[task][name] - suite.base[name]).double(), (merged[name] - suite.base[name]).double()
            )
            for name in names
        ]
        found[task] = sum(ratios) / len(ratios)
    return found


def compare(
    suite: Suite,
    out: Path,
    *,
    runtime: Runtime,
    chosen: Sequence[Contender] = CONTENDERS,
    num_examples: int = 256,
    max_items: int | None = None,
    with_alignment: bool = True,
    with_masks: bool = True,
    say: Callable[[str], None] | None = None,
) -> list[Outcome]:
    """Merge the experts of a suite with every contender and measure.

    Args:
        suite: base, experts, heads, data.
        out: folder for ``comparison.json``, rewritten after every merge; what it holds already is not done again.
        runtime: device and number format.
        chosen: the merges.
        num_examples: unlabelled training pictures of each task for merges that need inputs.
        max_items: pictures of each task used for validation and test; None is all.
        with_alignment: also measure subspace alignment, an SVD of every matrix per merge.
        with_masks: also measure EMR and TALL masks, where every task rebuilds its own model.
        say: called with lines for a log.

    Returns: outcomes, the base and the experts first.
    Raises:
        UserError: ``out`` holds the comparison of something else.
    """
    say = say or (lambda line: None)
    make_folder(out)
    setting = {
        "suite": suite.config.model_dump(mode="json"),
        "num_examples": num_examples,
        "max_items": max_items,
    }
    outcomes = read_comparison(out, setting) if (out / "comparison.json").is_file() else []
    done = {outcome.name for outcome in outcomes}
    evaluator = Evaluator(suite, runtime, max_items)
    calibration = Calibration(suite, num_examples, runtime)

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        _write(out, setting, outcomes, runtime)
        scale = "" if math.isnan(outcome.alpha) else f", alpha {outcome.alpha:g}"
        say(f"{outcome.name}: {outcome.mean:.1f} % ({outcome.normalised:.1f} % of the experts){scale}")

    if "base" not in done:
        add(_fixed("base", evaluator.scores(suite.base)))
    if "experts" not in done:
        own = evaluator.experts()
        add(_fixed("experts", Scores(own, own), per_task_model=True))
    for contender in chosen:
        if contender.name in done:
            continue
        started = time.perf_counter()
        merged = merged_with(contender, suite, calibration)
        seconds = time.perf_counter() - started
        alpha, seen = (1.0, {}) if contender.alphas == ONE else sweep(evaluator, merged, contender.alphas)
        state = scaled(suite.base, merged, alpha)
        scores = evaluator.scores(state)
        ratios = alignment(suite, state) if with_alignment else {}
        shown = math.nan if contender.alphas == ONE else alpha
        add(Outcome(contender.name, shown, scores.absolute, scores.mean_normalised, seconds, seen, ratios))
    for name, method in MASKS.items():
        if with_masks and name not in done:
            add(_with_masks(name, method, suite, evaluator))
    return outcomes


def _with_masks(name: str, method: Literal["emr", "tall"], suite: Suite, evaluator: Evaluator) -> Outcome:
    """One shared task vector, from which every task rebuilds its own model by its mask."""
    started = time.perf_counter()
    packed = compress(suite.base, [suite.experts[task] for task in suite.tasks], method)
    seconds = time.perf_counter() - started
    absolute = {task: evaluator.of_task(packed.expert(index), task) for index, task in enumerate(suite.tasks)}
    scores = Scores(absolute, evaluator.experts())
    return Outcome(name, math.nan, absolute, scores.mean_normalised, seconds, per_task_model=True)


def _fixed(name: str, scores: Scores, *, per_task_model: bool = False) -> Outcome:
    return Outcome(name, math.nan, scores.absolute, scores.mean_normalised, 0.0, per_task_model=per_task_model)


def _write(out: Path, setting: Mapping[str, Any], outcomes: Sequence[Outcome], runtime: Runtime) -> None:
    rows = [{**asdict(outcome), "alpha": None if math.isnan(outcome.alpha) else outcome.alpha} for outcome in outcomes]
    document = {
        "schema": COMPARISON_SCHEMA,
        "setting": setting,
        "machine": machine(runtime.device),
        "versions": versions(),
        "outcomes": rows,
    }
    write_atomically(out / "comparison.json", json.dumps(document, indent=1))


def read_comparison(out: Path, setting: Mapping[str, Any] | None = None) -> list[Outcome]:
    """Outcomes of an earlier comparison.

    Raises:
        UserError: not a comparison, or of another setting than ``setting``.
    """
    document = read_json(out / "comparison.json")
    if not isinstance(document, dict) or document.get("schema") != COMPARISON_SCHEMA:
        raise UserError(f"{out / 'comparison.json'}: not a comparison that this version reads")
    if setting is not None and document["setting"] != setting:
        raise UserError(f"{out} holds the comparison of another suite or setting; choose another --out")
    rows = []
    for row in document["outcomes"]:
        values = {**row, "alpha": math.nan if row["alpha"] is None else row["alpha"]}
        values["sweep"] = {key: (pair[0], pair[1]) for key, pair in row["sweep"].items()}
        rows.append(Outcome(**values))
    return rows
