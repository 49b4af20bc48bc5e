"""How long a forecast takes: one NBA-sized scene, and many scenes in batches.

    python benchmarks/trajectory_forecast.py --threads 1 [--device cuda]

Eleven agents, 10 observed and 20 predicted steps, the default model with random weights (the time does not depend on
them). ``plain`` is the way without any of what this package does about time: every sample is a batch entry
of its own, so the past, the codebook and all keys are computed for each of the 200 samples, and the diffusion takes ten
strides of its posterior.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from neurocl.devices import cpu_name, prepare
from neurocl.trajectory.config import resolve
from neurocl.trajectory.forecaster import Forecaster, Networks, SamplingConfig, shape_for
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.selection import select

AGENTS, OBSERVED, PREDICTED, SAMPLES, FORECASTS = 11, 10, 20, 200, 20
FAST_BOUND_MS, DEFAULT_BOUND_MS = 150.0, 1000.0


def game(num_scenes: int) -> Scenes:
    """Scenes of eleven players who walk about."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(num_scenes, AGENTS, OBSERVED + PREDICTED, 2, generator=generator)
    track = 14 * torch.rand(num_scenes, AGENTS, 1, 2, generator=generator) + 0.3 * steps.cumsum(dim=2)
    present = torch.ones(num_scenes, AGENTS, dtype=torch.bool)
    return Scenes(
        past=track[:, :, :OBSERVED],
        future=track[:, :, OBSERVED:],
        agent_mask=present,
        past_mask=present[..., None].repeat(1, 1, OBSERVED),
        future_mask=present[..., None].repeat(1, 1, PREDICTED),
        target_mask=present.clone(),
        kind=torch.zeros(num_scenes, AGENTS, dtype=torch.int64),
        agent_id=torch.arange(AGENTS).repeat(num_scenes, 1),
        start=torch.arange(num_scenes),
        recording=("game",) * num_scenes,
        unit="m",
        hz=5.0,
        name="game",
    )


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median over repeats, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="scenes of a batch, for the throughput")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.batch = 1, 4
    device = prepare(options.device, "fp32", options.threads).device
    scenes = game(1)
    torch.manual_seed(0)
    shape = shape_for(resolve("small", {"dataset": "nba"}), scenes)
    forecaster = Forecaster(shape, Networks(shape), device)

    def forecast(scenes: Scenes, **how: object) -> None:
        forecaster.forecast_scenes(scenes, FORECASTS, SamplingConfig(**how))  # type: ignore[arg-type]

    def plain() -> None:
        crowd = scenes.subset([0] * SAMPLES)
        how = SamplingConfig(select="samples", num_samples=1, sampler="posterior", steps=10)
        drawn = forecaster.forecast_scenes(crowd, 1, how).trajectories
        select(drawn.transpose(0, 1), FORECASTS, how="centroids")

    many = game(options.batch)
    fast = {"select": "samples"}
    milliseconds = {
        "20 plain samples (fast)": 1000 * seconds(lambda: forecast(scenes, **fast), options.repeats, device),
        "20 centroids of 200 (default)": 1000 * seconds(lambda: forecast(scenes), options.repeats, device),
        "20 joint centroids of 200": 1000 * seconds(lambda: forecast(scenes, joint=True), options.repeats, device),
        "the same, 10 strides of the posterior": 1000
        * seconds(lambda: forecast(scenes, sampler="posterior", steps=10), options.repeats, device),
        "plain way": 1000 * seconds(plain, max(1, options.repeats // 2), device),
    }
    rate = options.batch / seconds(lambda: forecast(many, **fast), max(1, options.repeats // 2), device)
    if options.json:
        print(json.dumps({"milliseconds": milliseconds, "scenes per second": rate}, indent=1))
        return
    print(f"{AGENTS} agents, {OBSERVED} + {PREDICTED} steps, {device}, {cpu_name()}, {options.threads} thread(s)\n")
    reference = milliseconds["plain way"]
    for name, value in milliseconds.items():
        print(f"{name:40s} {value:8.1f} ms   {reference / value:6.1f} x faster than the plain way")
    print(f"{'20 plain samples, batches of ' + str(options.batch):40s} {rate:8.2f} scenes/s")
    if device.type == "cpu":
        print(
            f"\nbounds: fast {milliseconds['20 plain samples (fast)']:.0f} of {FAST_BOUND_MS:.0f} ms, "
            f"default {milliseconds['20 centroids of 200 (default)']:.0f} of {DEFAULT_BOUND_MS:.0f} ms"
        )


if __name__ == "__main__":
    main()
