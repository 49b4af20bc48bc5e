"""Memory and time of one stage-1 training step, against the same network with one dense mask over all agents.

    python benchmarks/trajectory_memory.py --threads 1          # 64 scenes of 11 agents, 10 + 20 steps
    python benchmarks/trajectory_memory.py --device cuda
    python benchmarks/trajectory_memory.py --quick              # 16 scenes

The peer is the model of the paper as its code lays it out: all agents of all scenes in one flat row, and attention
among them under a block-diagonal N x N mask. Both start from the same weights and scenes, and their losses are
compared. Every contender runs in a process of its own; its memory is the peak less what was taken before the step.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from neurocl.trajectory.blocks import Attention, PairGeometry
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.vqvae import TrajectoryVqVae, VqVaeConfig

MEMORY_BOUND, LOSS_ERROR = 3.0, 1e-4
NUM_AGENTS, NUM_OBSERVED, NUM_PREDICTED = 11, 10, 20


def dense_among_agents(self: Attention, x: Tensor, mask: Tensor | None, geometry: PairGeometry | None) -> Tensor:
    """Attention among agents as the flat layout writes it: scores of every agent with every other one of the batch."""
    scenes, agents, rows, width = x.shape
    size = width // self.heads
    flat = x.flatten(0, 1).transpose(0, 1)
    query, key, value = (
        part(flat).view(rows, scenes * agents, self.heads, size).transpose(1, 2)
        for part in (self.query, self.key, self.value)
    )
    scene = torch.arange(scenes, device=x.device).repeat_interleave(agents)
    allowed = scene[:, None] == scene
    scores = (query @ key.mT / size**0.5).masked_fill(~allowed, -torch.inf)
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    out: Tensor = self.out(mixed).transpose(0, 1).unflatten(0, (scenes, agents))
    return out


def walks(num_scenes: int) -> Scenes:
    """Complete scenes of agents that walk roughly straight."""
    generator = torch.Generator().manual_seed(0)
    steps = NUM_OBSERVED + NUM_PREDICTED
    velocity = 0.5 * torch.randn(num_scenes, NUM_AGENTS, 1, 2, generator=generator)
    track = velocity * torch.arange(steps)[:, None] + 5 * torch.randn(num_scenes, NUM_AGENTS, 1, 2, generator=generator)
    mask = torch.ones(num_scenes, NUM_AGENTS, dtype=torch.bool)
    return Scenes(
        past=track[:, :, :NUM_OBSERVED],
        future=track[:, :, NUM_OBSERVED:],
        agent_mask=mask,
        past_mask=mask[..., None].repeat(1, 1, NUM_OBSERVED),
        future_mask=mask[..., None].repeat(1, 1, NUM_PREDICTED),
        target_mask=mask,
        kind=torch.zeros(num_scenes, NUM_AGENTS, dtype=torch.int64),
        agent_id=torch.arange(NUM_AGENTS).repeat(num_scenes, 1),
        start=torch.zeros(num_scenes, dtype=torch.int64),
        recording=("walks",) * num_scenes,
        unit="m",
        hz=5.0,
    )


def measure(contender: str, num_scenes: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Peak MB above the start, seconds of a step, and the loss of the first one."""
    torch.manual_seed(0)
    if contender == "dense mask":
        Attention.among_agents = dense_among_agents  # type: ignore[method-assign]
    config = VqVaeConfig(num_observed=NUM_OBSERVED, num_predicted=NUM_PREDICTED, scale=5.0, dropout=0.0)
    if contender != "ours, default":
        config = VqVaeConfig.faithful(num_observed=NUM_OBSERVED, num_predicted=NUM_PREDICTED, scale=5.0, dropout=0.0)
    model = TrajectoryVqVae(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.5, 0.9))

    def step(scenes: Scenes) -> float:
        loss = torch.stack(list(model(scenes).losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    # What a first step allocates once (optimiser state, workspaces) is not what grows with the batch.
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    step(walks(1).to(device))
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.5, 0.9))
    scenes = walks(num_scenes).to(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = float(torch.cuda.memory_allocated(device))
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    loss = step(scenes)
    if on_gpu:
        peak = float(torch.cuda.max_memory_allocated(device))
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter() if on_gpu else time.process_time()
        step(scenes)
        seconds.append((time.perf_counter() if on_gpu else time.process_time()) - start)
    return {"megabytes": (peak - before) / 2**20, "seconds": statistics.median(seconds), "loss": loss}


def in_own_process(contender: str, options: argparse.Namespace, num_scenes: int) -> dict[str, float]:
    arguments = ["--contender", contender, "--scenes", str(num_scenes), "--device", options.device]
    arguments += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    result = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps")
    parser.add_argument("--scenes", type=int, help="scenes in the batch; 64")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="16 scenes, one timed step")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.quick:
        options.repeats = 1
    num_scenes = options.scenes or (16 if options.quick else 64)
    if options.contender:
        print(json.dumps(measure(options.contender, num_scenes, device, options.repeats)))
        return
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, one process each"
    print(f"torch {torch.__version__}, {machine}, {options.threads} thread(s)")
    print(f"stage 1, d = 64, {num_scenes} scenes of {NUM_AGENTS} agents, {NUM_OBSERVED} + {NUM_PREDICTED} steps")
    found: dict[str, Any] = {}
    for contender in ("dense mask", "ours", "ours, default"):
        found[contender] = in_own_process(contender, options, num_scenes)
        row = found[contender]
        print(f"  {contender:14} {row['megabytes']:8.0f} MB {row['seconds']:8.3f} s   loss {row['loss']:.5f}")
    peer, ours = found["dense mask"], found["ours"]
    ratio = peer["megabytes"] / ours["megabytes"]
    difference = abs(peer["loss"] - ours["loss"]) / abs(peer["loss"])
    print(
        f"  the dense mask takes {ratio:.1f} x the memory and {peer['seconds'] / ours['seconds']:.1f} x the time;",
        end=" ",
    )
    print(f"at least {MEMORY_BOUND:g} x the memory: {'met' if ratio >= MEMORY_BOUND else 'MISSED'};", end=" ")
    print(f"same loss within {LOSS_ERROR:g}: {'met' if difference < LOSS_ERROR else 'MISSED'} ({difference:.0e})")


if __name__ == "__main__":
    main()
