"""What the parts of the forecaster are worth, on validation and test scenes of real data.

    python benchmarks/trajectory_ablations.py cells    # instance or fixed codebook x decoder with or without the past
    python benchmarks/trajectory_ablations.py codes    # the last two of them with 64 codes instead of 16
    python benchmarks/trajectory_ablations.py ranks    # 0 to 16, in the released design
    python benchmarks/trajectory_ablations.py additions  # codes, geometry and heading, one after the other
    python benchmarks/trajectory_ablations.py revival  # of codes that nobody uses, in the default model
    python benchmarks/trajectory_ablations.py priors   # the four priors over the same codes
    python benchmarks/trajectory_ablations.py steps RUN  # samplers and their steps, of a finished run

The first five train stage 1 alone and tell how well true futures come back from their codes (mean and last distance,
perplexity of the codes), all arms with the same budget and the same batches. ``steps`` compares everything with the
most steps: the last columns are the change of minADE in per cent and half its 95 % interval over agents. Everything is
kept in ``--out``, and a second call with the same settings goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from neurocl.config import merged
from neurocl.devices import cpu_name
from neurocl.errors import NeuroclError, UserError
from neurocl.runs import RunFolder, write_atomically
from neurocl.stopping import StopRequest
from neurocl.trajectory import metrics
from neurocl.trajectory.config import TrajectoryConfig, resolve
from neurocl.trajectory.datasets import Split
from neurocl.trajectory.forecaster import Forecaster, SamplingConfig, num_drawn
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.selection import select
from neurocl.trajectory.training import Trainer, load_config, load_split
from neurocl.trajectory.vqvae import reconstruction

Numbers = dict[str, float]
Errors = dict[str, torch.Tensor]

CELLS: dict[str, dict[str, Any]] = {
    f"{book} codebook, decoder {'with' if past else 'without'} the past": {
        "rank": rank,
        "decoder_cross_attention": past,
    }
    for past in (False, True)
    for book, rank in (("fixed", 0), ("instance", 8))
}
CODES: dict[str, dict[str, Any]] = {
    f"64 codes, {name}": {**model, "num_codes": 64} for name, model in CELLS.items() if model["decoder_cross_attention"]
}
RANKS: dict[str, dict[str, Any]] = {f"rank {rank}": {"rank": rank} for rank in (0, 1, 2, 4, 8, 16)}
ADDITIONS: dict[str, dict[str, Any]] = {
    "faithful": {},
    "+ decoder sees the past": {"decoder_cross_attention": True},
    "+ 64 codes": {"decoder_cross_attention": True, "num_codes": 64},
    "+ geometry": {"decoder_cross_attention": True, "num_codes": 64, "geometry": True},
    "+ heading": {"decoder_cross_attention": True, "num_codes": 64, "geometry": True, "heading": True},
}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    what: {name: {"faithful": True, "model": model} for name, model in arms.items()}
    for what, arms in {"cells": CELLS, "codes": CODES, "ranks": RANKS, "additions": ADDITIONS}.items()
} | {"revival": {f"revival every {steps} steps": {"revive_every": steps} for steps in (0, 20)}}


SAMPLERS: tuple[tuple[Literal["posterior", "unmask"], int], ...] = (
    ("unmask", 3),
    ("unmask", 5),
    ("unmask", 10),
    ("posterior", 5),
    ("posterior", 10),
    ("posterior", 50),
    ("posterior", 100),
)
FULL = "posterior, 100"


class Kept:
    """Results by name in a JSON file, so that nothing is computed twice.

    Args:
        path: of the file.
        settings: that all results share.

    Raises:
        UserError: the file holds results of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        document = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "found": {}}
        if document.get("settings") != settings:
            raise UserError(f"{path} holds results of other settings; choose another --out")
        self.found: dict[str, Numbers] = document["found"]

    def __setitem__(self, name: str, numbers: Numbers) -> None:
        self.found[name] = numbers
        write_atomically(self.path, json.dumps({"settings": self.settings, "found": self.found}, indent=1))


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
    splits: tuple[Split, ...] = "val", "test"
    for split in splits:
        found = reconstruction(network, load_split(config, split))
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
        for name, changes in ARMS[options.what].items():
            key = f"{name} | {seed}"
            if key not in kept.found:
                config = base(options, seed, **changes)
                kept[key] = stage1(config, options.out / f"{options.what}-{len(kept.found)}-{int(time.time())}")[1]
                print(key, shown(kept.found[key]), flush=True)


def prior_arms(options: argparse.Namespace, kept: Kept) -> None:
    """Priors over the codes of one stage 1 per seed, on the test scenes."""
    for seed in options.seeds:
        names = {prior: f"{prior} | {seed}" for prior in ("diffusion", "autoregressive", "flow", "ddim")}
        if all(name in kept.found for name in names.values()):
            continue
        config = base(options, seed)
        scenes = some_scenes(config, options, "test")
        trained, _ = stage1(config, options.out / f"codes-{seed}-{int(time.time())}")
        for prior, key in names.items():
            if key in kept.found:
                continue
            folder = RunFolder.create(options.out / f"{prior}-{seed}-{int(time.time())}", stem=prior)
            trainer = Trainer(base(options, seed, prior=prior), folder)
            trainer.networks.vqvae.load_state_dict(trained.networks.vqvae.state_dict())
            trainer.stage = 1
            started = time.monotonic()
            with StopRequest().listen() as stop:
                trainer.run_stage(stop)
            trainer.finish_stage()
            seconds = time.monotonic() - started
            forecaster = Forecaster(trainer.shape, trainer.networks, trainer.runtime.device)
            kept[key] = {"seconds": seconds, **sampled(forecaster, scenes, SamplingConfig(), options.draws)[0]}
            print(key, shown(kept.found[key]), flush=True)


def step_arms(options: argparse.Namespace, kept: Kept) -> None:
    """Samplers of a finished run with more and more steps, on validation scenes."""
    forecaster = Forecaster.load(options.run, device=options.device)
    scenes = some_scenes(load_config(RunFolder.open(options.run)), options, "val")
    path = kept.path.with_suffix(".safetensors")  # minADE of every agent
    each: Errors = safetensors.torch.load_file(path) if path.is_file() else {}
    for sampler, steps in SAMPLERS:
        key = f"{sampler}, {steps}"
        if key not in kept.found:
            how = SamplingConfig(sampler=sampler, steps=steps)
            numbers, errors = sampled(forecaster, scenes, how, options.draws)
            each |= {f"{key} {name}": found for name, found in errors.items()}
            safetensors.torch.save_file(each, path)
            kept[key] = numbers
            print(key, shown(numbers), flush=True)
    for key, numbers in kept.found.items():
        for name in ("samples", "centroids"):
            full = each[f"{FULL} {name}"]
            change = 100 * (each[f"{key} {name}"] - full) / full.mean()
            numbers[f"{name} %"] = float(change.mean())
            numbers[f"{name} +-"] = 1.96 * float(change.std()) / len(change) ** 0.5


def some_scenes(config: TrajectoryConfig, options: argparse.Namespace, split: Split) -> Scenes:
    """A seeded choice of a split."""
    scenes = load_split(config.model_copy(update={"data_dir": options.data_dir}), split)
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))
    return scenes.subset(order[: options.max_scenes].sort().values)


def sampled(forecaster: Forecaster, scenes: Scenes, how: SamplingConfig, num_draws: int) -> tuple[Numbers, Errors]:
    """minADE and minFDE of 20 centroids of 200 samples and of the first 20 of them, and minADE of every agent."""
    errors: dict[str, list[torch.Tensor]] = {}
    seconds = 0.0
    for seed in range(num_draws):
        generator = torch.Generator(forecaster.device).manual_seed(seed)
        parts: dict[str, list[torch.Tensor]] = {}
        # Scenes of about as many agents together, so that little is padded.
        for rows in scenes.target_mask.sum(dim=1).argsort(stable=True).split(32):
            batch = scenes.subset(rows)
            started = time.perf_counter()
            samples, present = forecaster.draw(batch, num_drawn(20, how), how, generator)
            centroids = select(samples, 20, agent_mask=present, smoothing=0.5, generator=generator).trajectories.cpu()
            seconds += time.perf_counter() - started
            mask, truth = batch.target_mask[:, : present.shape[1]], batch.future[batch.target_mask]
            for name, drawn in (("samples", samples[:20].cpu()), ("centroids", centroids)):
                parts.setdefault(f"{name} minADE", []).append(metrics.min_ade(drawn[:, mask], truth))
                parts.setdefault(f"{name} minFDE", []).append(metrics.min_fde(drawn[:, mask], truth))
        for name, found in parts.items():
            errors.setdefault(name, []).append(torch.cat(found).double())
    each = {name: torch.stack(found).mean(dim=0) for name, found in errors.items()}
    numbers = {name: float(found.mean()) for name, found in each.items()}
    numbers["ms/scene"] = 1000 * seconds / num_draws / len(scenes)
    return numbers, {name.split()[0]: found for name, found in each.items() if name.endswith("minADE")}


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
    try:
        compare(options)
    except NeuroclError as error:
        sys.exit(f"{parser.prog}: {error}")


def compare(options: argparse.Namespace) -> None:
    """Everything that is asked for and not there yet, and the table."""
    settings: dict[str, Any] = {"dataset": options.dataset, "max scenes": options.max_scenes, "draws": options.draws}
    if options.what == "steps":
        settings |= {"dataset": RunFolder.open(options.run).config.get("dataset"), "run": str(options.run)}
    else:
        settings |= {"steps": options.steps}
    if options.what == "priors":
        settings |= {"prior steps": options.prior_steps}
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.run.resolve().name if options.run else options.dataset.replace(":", "-")
    kept = Kept(options.out / f"{options.what}-{name}.json", settings)
    {"priors": prior_arms, "steps": step_arms}.get(options.what, reconstruct_arms)(options, kept)
    print("\n" + ", ".join(f"{key} {value}" for key, value in settings.items()) + f", {cpu_name()}\n")
    print("\n".join(table(kept)))


if __name__ == "__main__":
    main()
