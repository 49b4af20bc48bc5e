"""What the parts of the forecaster are worth, on validation and test scenes of real data.

    python benchmarks/trajectory_ablations.py cells    # instance or fixed codebook x decoder with or without the past
    python benchmarks/trajectory_ablations.py ranks    # 0 to 16, in the released design
    python benchmarks/trajectory_ablations.py additions  # codes, geometry and heading, one after the other
    python benchmarks/trajectory_ablations.py priors   # diffusion, autoregressive and flow over the same codes
    python benchmarks/trajectory_ablations.py steps RUN  # samplers and their steps, of a finished run

The first three train stage 1 alone and tell how well true futures come back from their codes (mean and last distance,
perplexity of the codes), all arms with the same budget and the same batches. Everything is kept in ``--out``, and a
second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neurocl.config import merged
from neurocl.devices import cpu_name
from neurocl.runs import RunFolder, write_atomically
from neurocl.stopping import StopRequest
from neurocl.trajectory import metrics
from neurocl.trajectory.baselines import target_tracks
from neurocl.trajectory.config import TrajectoryConfig, resolve
from neurocl.trajectory.evaluation import draw_targets
from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
from neurocl.trajectory.training import Trainer, load_config, load_split
from neurocl.trajectory.vqvae import reconstruction

Numbers = dict[str, float]

CELLS: dict[str, dict[str, Any]] = {
    f"{book} codebook, decoder {'with' if past else 'without'} the past": {
        "rank": rank,
        "decoder_cross_attention": past,
    }
    for past in (False, True)
    for book, rank in (("fixed", 0), ("instance", 8))
}
RANKS: dict[str, dict[str, Any]] = {f"rank {rank}": {"rank": rank} for rank in (0, 1, 2, 4, 8, 16)}
ADDITIONS: dict[str, dict[str, Any]] = {
    "faithful": {},
    "+ decoder sees the past": {"decoder_cross_attention": True},
    "+ 64 codes": {"decoder_cross_attention": True, "num_codes": 64},
    "+ geometry": {"decoder_cross_attention": True, "num_codes": 64, "geometry": True},
    "+ heading": {"decoder_cross_attention": True, "num_codes": 64, "geometry": True, "heading": True},
}
ARMS = {"cells": CELLS, "ranks": RANKS, "additions": ADDITIONS}


class Kept:
    """Results by name in a JSON file, so that nothing is computed twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Numbers] = json.loads(path.read_text()) if path.is_file() else {}

    def __setitem__(self, name: str, numbers: Numbers) -> None:
        self.found[name] = numbers
        write_atomically(self.path, json.dumps(self.found, indent=1))


def stage1(config: TrajectoryConfig, folder: Path) -> tuple[Trainer, Numbers]:
    """Train the codes and measure them on all validation and test scenes."""
    trainer = Trainer(config, RunFolder.create(folder, stem="ablation"))
    started = time.monotonic()
    with StopRequest().listen() as stop:
        trainer.run_stage(stop)
    trainer.finish_stage()
    seconds = time.monotonic() - started
    network = trainer.networks.vqvae.eval()
    numbers: Numbers = {"seconds": seconds}
    for split in ("val", "test"):
        found = reconstruction(network, load_split(config, split))  # type: ignore[arg-type]
        numbers |= {f"{split} ADE": found.ade, f"{split} FDE": found.fde, "perplexity": found.perplexity}
    return trainer, numbers


def base(options: argparse.Namespace, seed: int, **more: Any) -> TrajectoryConfig:
    budget = {"steps": options.steps, "validate_every": max(1, options.steps // 4)}
    values = {
        "dataset": options.dataset,
        "data_dir": options.data_dir,
        "seed": seed,
        "stage1": budget,
        "stage2": {"steps": options.prior_steps, "validate_every": max(1, options.prior_steps // 4)},
        "threads": 1,
        "device": options.device,
    }
    return resolve("small", merged(values, more))


def reconstruct_arms(options: argparse.Namespace, kept: Kept) -> None:
    for seed in options.seeds:
        for name, model in ARMS[options.what].items():
            key = f"{name} | {seed}"
            if key not in kept.found:
                config = base(options, seed, faithful=True, model=model)
                kept[key] = stage1(config, options.out / f"{options.what}-{len(kept.found)}")[1]
                print(key, shown(kept.found[key]), flush=True)


def prior_arms(options: argparse.Namespace, kept: Kept) -> None:
    """Priors over the codes of one stage 1 per seed, on the test scenes."""
    for seed in options.seeds:
        names = {prior: f"{prior} | {seed}" for prior in ("diffusion", "autoregressive", "flow")}
        if all(name in kept.found for name in names.values()):
            continue
        trained, _ = stage1(base(options, seed), options.out / f"codes-{seed}-{int(time.time())}")
        for prior, key in names.items():
            if key in kept.found:
                continue
            config = base(options, seed, prior=prior)
            trainer = Trainer(config, RunFolder.create(options.out / f"{prior}-{seed}-{int(time.time())}", stem=prior))
            trainer.networks.vqvae.load_state_dict(trained.networks.vqvae.state_dict())
            trainer.stage = 1
            started = time.monotonic()
            with StopRequest().listen() as stop:
                trainer.run_stage(stop)
            trainer.finish_stage()
            seconds = time.monotonic() - started
            forecaster = Forecaster(trainer.shape, trainer.networks, trainer.runtime.device)
            numbers = sampled(forecaster, config, options, SamplingConfig())
            kept[key] = {"seconds": seconds, **numbers}
            print(key, shown(kept.found[key]), flush=True)


def step_arms(options: argparse.Namespace, kept: Kept) -> None:
    """Samplers of a finished run with fewer and fewer steps, on validation scenes."""
    forecaster = Forecaster.load(options.run, device=options.device)
    config = load_config(RunFolder.open(options.run))
    for sampler in ("posterior", "unmask"):
        for steps in (100, 50, 25, 10, 5, 2, 1):
            key = f"{sampler}, {steps} steps"
            if key not in kept.found:
                how = SamplingConfig(sampler=sampler, steps=steps)  # type: ignore[arg-type]
                kept[key] = sampled(forecaster, config, options, how, split="val")
                print(key, shown(kept.found[key]), flush=True)


def sampled(
    forecaster: Forecaster,
    config: TrajectoryConfig,
    options: argparse.Namespace,
    how: SamplingConfig,
    split: str = "test",
) -> Numbers:
    """minADE and minFDE of 20 samples and 20 centroids of 200, in several draws."""
    scenes = load_split(config.model_copy(update={"data_dir": options.data_dir}), split)  # type: ignore[arg-type]
    if options.max_scenes < len(scenes):
        order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))
        scenes = scenes.subset(order[: options.max_scenes].sort().values)
    truth = target_tracks(scenes)[1]
    numbers: dict[str, list[float]] = {}
    for seed in range(options.draws):
        for select in ("samples", "centroids"):
            asked = how.model_copy(update={"select": select, "seed": seed})
            started = time.perf_counter()
            found = draw_targets(forecaster, scenes, 20, asked, 32).predicted.double()
            seconds = time.perf_counter() - started
            for name, value in (
                (f"{select} minADE", float(metrics.min_ade(found, truth).mean())),
                (f"{select} minFDE", float(metrics.min_fde(found, truth).mean())),
                (f"{select} ms/scene", 1000 * seconds / len(scenes)),
            ):
                numbers.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in numbers.items()}


def shown(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def table(kept: Kept) -> Iterator[str]:
    """Markdown: mean and standard deviation over seeds."""
    groups: dict[str, list[Numbers]] = {}
    for key, numbers in kept.found.items():
        groups.setdefault(key.rpartition(" | ")[0] or key, []).append(numbers)
    columns = [name for name in next(iter(groups.values()))[0]]
    yield "| | " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for name, rows in groups.items():
        cells = [_spread([row[column] for row in rows]) for column in columns]
        yield f"| {name} ({len(rows)}) | " + " | ".join(cells) + " |"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*ARMS, "priors", "steps"])
    parser.add_argument("run", nargs="?", type=Path, help="a finished run, for steps")
    parser.add_argument("--dataset", default="sdd")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, default=1500, help="of stage 1")
    parser.add_argument("--prior-steps", type=int, default=3000, help="of stage 2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=1, help="times that forecasts are drawn, for priors and steps")
    parser.add_argument("--max-scenes", type=int, default=1_000_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/trajectory-ablations"))
    options = parser.parse_args()
    if (options.what == "steps") != (options.run is not None):
        parser.error("steps, and nothing else, needs a RUN")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.out / f"{options.what}-{options.dataset.replace(':', '-')}.json")
    {"priors": prior_arms, "steps": step_arms}.get(options.what, reconstruct_arms)(options, kept)
    print(f"\n{options.dataset}, {options.steps} + {options.prior_steps} steps, {cpu_name()}\n")
    print("\n".join(table(kept)))


if __name__ == "__main__":
    main()
