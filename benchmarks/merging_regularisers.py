"""Do experts that were regularised while they were fine-tuned merge better? None, ITA, IEL and TAK on one suite.

    python benchmarks/merging_regularisers.py                     # three seeds of the embedded digits, minutes
    python benchmarks/merging_regularisers.py --suite pictures    # eight public sets, hours on a CPU
    python benchmarks/merging_regularisers.py --select            # strengths, on validation pictures of the first seed

All variants of a seed start from one base and see the same batches. ``matrices only`` trains what ITA and IEL train,
at strength 0. ``linear`` trains and evaluates the first-order expansion around the base. Accuracies are on test
pictures in percent; every scale and strength is chosen on validation pictures:

    experts   each on its own task
    mean      all task vectors averaged           sum        added up, alpha = 1
    best      added up at the best alpha          alphas     how many of 0.1, 0.2 ... 1.5 come within 5 points
    drop      the mean without one task: accuracy on that task and on the others, averaged over the choice of it
    negate    base - alpha tau_t, with alpha raised as long as 95 % of the base's accuracy on the other tasks is kept:
              accuracy on the task and on the others, averaged over the choice of it; the base's own is in the heading
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neurocl.devices import Runtime, cpu_name, generator_for, prepare, seed_everything
from neurocl.merging.evaluation import accuracy
from neurocl.merging.linearised import Linearised, unit_rows
from neurocl.merging.pool import TaskVectorPool, task_vector
from neurocl.merging.regularisers import STRENGTHS, regulariser_factory
from neurocl.merging.suite import Split, Suite, load_state, network, save_network, suite_config, task_names
from neurocl.merging.training import Fit, fit, train_suite
from neurocl.runs import make_folder

ALPHAS = tuple(round(0.1 * step, 1) for step in range(1, 16))
CLOSE = 5.0
KEPT = 0.95
GRID = {
    "ita": (0.02, 1.0, 10.0, 100.0),
    "iel": (1.0, 10.0, 100.0, 1000.0),
    "tak": (100.0, 1000.0, 3000.0, 10000.0, 30000.0),
    "tak linear": (100.0, 1000.0, 3000.0, 10000.0),
}

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune."""

    name: str
    regularise: str
    strength: float
    linear: bool = False


VARIANTS = (
    Variant("none", "none", 0.0),
    Variant("none linear", "none", 0.0, linear=True),
    Variant("matrices only", "ita", 0.0),
    Variant("ita", "ita", STRENGTHS["ita"]),
    Variant("iel", "iel", STRENGTHS["iel"]),
    Variant("tak", "tak", STRENGTHS["tak"]),
    Variant("tak linear", "tak", STRENGTHS["tak"], linear=True),
)


@dataclass
class Bench:
    """Bases, experts and accuracies of one suite and seed."""

    suite: Suite
    runtime: Runtime
    _accuracies: dict[tuple[int, str, Split], float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, seed: int, folder: Path, runtime: Runtime, quick: bool) -> Bench:
        small: dict[str, Any] = {"pretrain_epochs": 1, "epochs": 1, "width": 24, "depth": 1} if quick else {}
        if quick:
            small["tasks"] = task_names(suite_config(name))[:2]
        suite = train_suite(suite_config(name, seed=seed, **small), folder / f"{name}-{seed}", runtime=runtime)
        return cls(suite, runtime)

    def experts(self, variant: Variant) -> TaskVectorPool:
        """Fine-tune on every task in order, as ``train_suite`` does, from the base that is there."""
        plain = self.suite
        path = plain.path.with_name(f"{plain.path.name}-{variant.name.replace(' ', '-')}-{variant.strength:g}")
        changes = {"regularise": variant.regularise, "strength": variant.strength}
        config = plain.config.model_copy(update=changes)
        if not path.exists():
            make_folder(path)
            for part in ("base", "heads"):
                shutil.copytree(plain.path / part, path / part)
        suite = Suite(path, config, {**plain.document, "config": config.model_dump(mode="json")}, plain.data_dir)
        build = regulariser_factory(config, self.runtime)
        how = Fit(config.epochs, config.lr, config.batch_size, config.weight_decay, config.warmup)
        pool = TaskVectorPool(suite.base)
        for index, task in enumerate(suite.tasks):
            out = path / "experts" / task
            if not (out / "config.json").is_file():
                seed_everything(config.seed + 1 + index)
                model = network(suite.network_config, suite.base).to(self.runtime.device)
                fit(
                    model,
                    plain.items(task, "train"),
                    suite.heads[task].to(self.runtime.device),
                    how,
                    generator=generator_for(config.seed, 2, index),
                    runtime=self.runtime,
                    regulariser=build(suite, task) if build is not None else None,
                    linear=variant.linear,
                )
                save_network(out, suite.network_config, model.state_dict())
            pool.add(task, task_vector(suite.base, load_state(out)))
        return pool

    def accuracies(self, state: Mapping[str, torch.Tensor], split: Split, linear: bool) -> dict[str, float]:
        """Of one network on all tasks."""
        model: torch.nn.Module = network(self.suite.network_config, state).to(self.runtime.device)
        if linear:
            model = Linearised(model, self.suite.base, unit_rows).eval()
        return {
            task: accuracy(model, self.suite.items(task, split), self.suite.heads[task], self.runtime)
            for task in self.suite.tasks
        }

    def sweep(self, pool: TaskVectorPool, linear: bool) -> dict[float, float]:
        """Mean validation accuracy by scale of the sum."""
        return {alpha: mean(self.accuracies(pool.compose(alpha=len(pool) * alpha), "val", linear)) for alpha in ALPHAS}

    def row(self, variant: Variant) -> dict[str, float]:
        """All numbers of the table for one variant."""
        pool, linear = self.experts(variant), variant.linear
        tasks = self.suite.tasks
        curve = self.sweep(pool, linear)
        best = max(curve, key=lambda alpha: curve[alpha])
        own = {task: self.accuracies(pool.compose([task]), "test", linear)[task] for task in tasks}
        dropped, kept, negated, control = [], [], [], []
        for task in tasks:
            others = [name for name in tasks if name != task]
            found = self.accuracies(pool.compose(others), "test", linear)
            dropped.append(found[task])
            kept.append(mean({name: found[name] for name in others}))
            found = self.accuracies(pool.negate(task, self._mildest(pool, task, linear)), "test", linear)
            negated.append(found[task])
            control.append(mean({name: found[name] for name in others}))
        return {
            "experts": mean(own),
            "mean": mean(self.accuracies(pool.compose(), "test", linear)),
            "sum": mean(self.accuracies(pool.compose(alpha=len(pool)), "test", linear)),
            "best": mean(self.accuracies(pool.compose(alpha=len(pool) * best), "test", linear)),
            "alpha": best,
            "alphas": sum(value >= curve[best] - CLOSE for value in curve.values()),
            "drop: it": statistics.fmean(dropped),
            "others": statistics.fmean(kept),
            "negate: it": statistics.fmean(negated),
            "others ": statistics.fmean(control),
        }

    def _mildest(self, pool: TaskVectorPool, task: str, linear: bool) -> float:
        """Scale of the negated task vector up to which control accuracy on validation pictures is kept."""
        others = [name for name in self.suite.tasks if name != task]
        base = self.accuracies(self.suite.base, "val", False)
        bound, chosen = KEPT * sum(base[name] for name in others), 0.0
        for alpha in ALPHAS:
            found = self.accuracies(pool.negate(task, alpha), "val", linear)
            if sum(found[name] for name in others) < bound:
                break
            chosen = alpha
        return chosen


def mean(values: Mapping[str, float]) -> float:
    return statistics.fmean(values.values())


def select(bench: Bench) -> None:
    """Validation accuracies by strength; the mean decides for ITA and IEL, the sum for TAK."""
    print(f"  {'':12} {'strength':>8} {'experts':>8} {'mean':>6} {'sum':>6} {'best':>6} at alpha")
    for name, strengths in GRID.items():
        for strength in strengths:
            variant = Variant(name, name.split()[0], strength, linear=name.endswith("linear"))
            pool = bench.experts(variant)
            own = {t: bench.accuracies(pool.compose([t]), "val", variant.linear)[t] for t in bench.suite.tasks}
            curve = bench.sweep(pool, variant.linear)
            best = max(curve, key=lambda alpha: curve[alpha])
            average = mean(bench.accuracies(pool.compose(), "val", variant.linear))
            numbers = f"{mean(own):8.1f} {average:6.1f} {curve[1.0]:6.1f} {curve[best]:6.1f} {best}"
            print(f"  {name:12} {strength:8g} {numbers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("digits", "pictures"), default="digits")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, help="keeps the experts here; default: a temporary folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--select", action="store_true", help="try strengths on the first seed")
    parser.add_argument("--quick", action="store_true", help="one epoch of everything, to see that it runs")
    options = parser.parse_args()
    runtime = prepare(options.device, "fp32", options.threads)
    seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick or options.select else None]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        make_folder(folder)
        print(f"suite {options.suite}, seeds {', '.join(map(str, seeds))}, {cpu_name()}, torch {torch.__version__}")
        if options.select:
            select(Bench.of(options.suite, seeds[0], folder, runtime, options.quick))
            return
        benches = [Bench.of(options.suite, seed, folder, runtime, options.quick) for seed in seeds]
        at_start = [mean(bench.accuracies(bench.suite.base, "test", False)) for bench in benches]
        print(f"base: {statistics.fmean(at_start):.1f} % on {', '.join(benches[0].suite.tasks)}")
        lines: dict[str, dict[str, list[float]]] = {}
        for variant in VARIANTS:
            rows = [bench.row(variant) for bench in benches]
            if not lines:
                print(f"  {'':14} {'strength':>8} " + " ".join(f"{key.strip():>12}" for key in rows[0]))
            shown = {key: [row[key] for row in rows] for key in rows[0]}
            lines[variant.name] = shown
            cells = " ".join(f"{_cell(values):>12}" for values in shown.values())
            print(f"  {variant.name:14} {variant.strength:8g} {cells}", flush=True)
        print(json.dumps({"suite": options.suite, "seeds": seeds, "rows": lines}))
        print(f"{time.perf_counter() - started:.0f} s; mean and standard deviation over seeds")


def _cell(values: list[float]) -> str:
    spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
