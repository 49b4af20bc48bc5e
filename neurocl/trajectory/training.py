"""Training a forecaster: the codes first, then the prior over them; stopped at any step, it goes on unchanged.

Everything random is a function of (seed, stage, step), so a checkpoint needs no generator states: a resumed run draws
what the unbroken one would have drawn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neurocl.config import to_yaml, validate
from neurocl.devices import Runtime, generator_for, machine, peak_memory_mb, prepare, seed_everything, versions
from neurocl.errors import Interrupted, RunError, UserError
from neurocl.runs import RunFolder
from neurocl.stopping import StopRequest
from neurocl.trajectory.augment import augmented, cropped
from neurocl.trajectory.calibration import Calibration, fit_calibration
from neurocl.trajectory.config import Budget, StageConfig, TrajectoryConfig, budget, completed
from neurocl.trajectory.continuous import ContinuousPrior
from neurocl.trajectory.datasets import Split, load_scenes
from neurocl.trajectory.forecaster import Forecaster, Networks, SamplingConfig, num_drawn, shape_for, write_shape
from neurocl.trajectory.metrics import min_ade, min_fde
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.schedules import cosine_ramp
from neurocl.trajectory.selection import select
from neurocl.trajectory.vqvae import reconstruction

SAVE_SECONDS = 60.0
STAGES = ("codes", "prior")
LAST_RATE = 0.01  # share of the learning rate at the end
MAX_VALIDATION_TARGETS = 700  # agents that forecasts are measured and calibrated on
BATCHES_SORTED = 16  # batches that are sorted by their number of agents together
MAX_REVIVAL_SCENES = 256  # training scenes whose codes are counted before dead ones are revived
RAMP_SHARE, RAMP_STEPS = 0.1, 3000  # the codebook's loss is faded in over a tenth of the steps, at most 3000


@dataclass(frozen=True)
class TrajectoryResult:
    """A finished training run.

    Attributes:
        path: its folder.
        metrics: of the validation scenes.
    """

    path: Path
    metrics: dict[str, float]


Say = Callable[[str, int, int, dict[str, float]], None]


def load_split(config: TrajectoryConfig, split: Split) -> Scenes:
    """The scenes of one split of a configuration."""
    return load_scenes(
        list(config.files) if config.files else config.dataset,
        split,
        data_dir=config.data_dir,
        num_observed=config.num_observed,
        num_predicted=config.num_predicted,
        stride=config.stride if split == "train" else None,
        seed=config.seed,
    )


class Trainer:
    """One run in its folder.

    Args:
        config: of the run.
        folder: where it is kept.
        say: called with stage, step, steps and numbers of that step.
    """

    def __init__(self, config: TrajectoryConfig, folder: RunFolder, say: Say | None = None) -> None:
        self.config = config = completed(config)
        self.folder = folder
        self.say = say or (lambda stage, step, steps, numbers: None)
        self.runtime: Runtime = prepare(config.device, config.precision, config.threads)
        self.train_scenes = load_split(config, "train")
        validation = load_split(config, "val")
        order = torch.randperm(len(validation), generator=generator_for(config.seed, 5))
        self.val_scenes = validation.subset(order[: config.max_validation_scenes].sort().values)
        self.max_agents = config.max_agents or self.train_scenes.num_agents
        self.targets = self.train_scenes.target_mask.sum(dim=1).clamp(max=self.max_agents)
        self._order: tuple[tuple[int, int], Tensor] = (-1, -1), torch.empty(0)
        self.shape = shape_for(config, self.train_scenes)
        seed_everything(config.seed)
        self.networks = Networks(self.shape).to(self.runtime.device)
        self.best = {name: value.clone() for name, value in self.networks.state_dict().items()}
        self.stage, self.step = 0, 0
        self.best_value = math.inf
        self.seconds = {stage: 0.0 for stage in STAGES}
        self.average: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    # what is trained in each stage

    def module(self) -> nn.Module:
        """The part that the current stage trains."""
        return self.networks.vqvae if self.stage == 0 else self.networks.prior

    def stage_config(self) -> StageConfig:
        return self.config.stage1 if self.stage == 0 else self.config.stage2

    def budget(self) -> Budget:
        """Of the current stage."""
        return budget(self.stage_config())

    def strength(self, step: int) -> float:
        """Of the instance part of the codebook at a step of stage 1."""
        if self.shape.vqvae.rank == 0:
            return 0.0
        steps = budget(self.config.stage1).steps
        start, end = self.config.strength_from * steps, self.config.strength_to * steps
        return cosine_ramp(step, start, end) if end > start else float(step >= end)

    def run(self) -> TrajectoryResult:
        """Train what is not trained yet.

        Raises:
            RunError: the loss is not finite.
            Interrupted: SIGINT or SIGTERM; a checkpoint is written.
        """
        with StopRequest().listen() as stop:
            while self.stage < len(STAGES):
                self.run_stage(stop)
                self.finish_stage()
        return self._finish()

    def run_stage(self, stop: StopRequest) -> None:
        """The rest of the current stage; its best weights are in ``best``.

        Raises:
            RunError: the loss is not finite.
            Interrupted: asked to stop; a checkpoint is written.
        """
        how = self.budget()
        if self.optimizer is None:
            self._begin_stage()
        started = saved = time.monotonic()
        while self.step < how.steps:
            losses = self._train_step()
            self.step += 1
            self._revive_codes()
            if self.step % how.validate_every == 0 or self.step == how.steps:
                self._validate(losses)
            self.say(STAGES[self.stage], self.step, how.steps, losses)
            now = time.monotonic()
            if stop.requested or now - saved > SAVE_SECONDS:
                self.seconds[STAGES[self.stage]] += now - started
                started = saved = now
                self.save()
            if stop.requested:
                raise Interrupted(
                    f"stopped in the {STAGES[self.stage]} stage after step {self.step}; "
                    f"go on with: neurocl trajectory train --resume {self.folder.path}"
                )
        self.seconds[STAGES[self.stage]] += time.monotonic() - started

    def _begin_stage(self) -> None:
        how = self.stage_config()
        self.optimizer = torch.optim.AdamW(
            self.module().parameters(), lr=how.lr, weight_decay=how.weight_decay, betas=how.betas
        )
        self.average = {name: value.detach().clone() for name, value in self.module().state_dict().items()}
        self.best_value = math.inf
        if self.stage == 1 and isinstance(self.networks.prior, ContinuousPrior):
            self._fit_statistics(self.networks.prior)

    def _fit_statistics(self, prior: ContinuousPrior) -> None:
        from neurocl.trajectory.codebook import gather_codes

        rows = torch.randperm(len(self.train_scenes), generator=generator_for(self.config.seed, 6))[:512]
        scenes = self.train_scenes.subset(rows.sort().values).to(self.runtime.device)
        self.networks.vqvae.eval()
        indices, context = self.networks.vqvae.indices(scenes)
        prior.fit_statistics(gather_codes(context.codebook, indices[None])[0], context.present)

    def _batch(self, generator: torch.Generator) -> Scenes:
        """The scenes of this step."""
        size = min(self.budget().batch_size, len(self.train_scenes))
        epoch, place = divmod(self.step, len(self.train_scenes) // size)
        if self._order[0] != (self.stage, epoch):
            self._order = (self.stage, epoch), self._epoch(epoch, size)
        scenes = cropped(self.train_scenes.subset(self._order[1][place]), self.max_agents, generator)
        assert self.config.augment is not None
        return augmented(scenes, generator, **self.config.augment.model_dump()).to(self.runtime.device)

    def _epoch(self, epoch: int, size: int) -> Tensor:
        """Rows of the batches of an epoch, [batches, size].

        Scenes of about as many targets come together, so that little is padded: a seeded permutation is sorted by
        them in pieces of a few batches, and the batches are shuffled again.
        """
        generator = generator_for(self.config.seed, 1, self.stage, epoch)
        order = torch.randperm(len(self.train_scenes), generator=generator)
        order = order[: len(order) // size * size]
        piece = torch.arange(len(order)) // (size * BATCHES_SORTED)
        batches = order[(piece * (self.max_agents + 1) + self.targets[order]).argsort(stable=True)].view(-1, size)
        return batches[torch.randperm(len(batches), generator=generator)]

    def _train_step(self) -> dict[str, float]:
        how = self.stage_config()
        assert self.optimizer is not None
        generator = generator_for(self.config.seed, 2, self.stage, self.step)
        torch.manual_seed(int(torch.randint(1 << 62, (1,), generator=generator)))  # dropout
        scenes = self._batch(generator)
        steps = self.budget().steps
        progress = self.step / max(1, steps - 1)
        rate = how.lr * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Batches differ in agents, but every agent counts the same.
        share = float(scenes.target_mask.sum()) / (float(self.targets.float().mean()) * len(scenes))
        self.networks.train()
        with self.runtime.autocast():
            if self.stage == 0:
                ramp = min(RAMP_STEPS, max(1, round(RAMP_SHARE * steps)))
                weight = cosine_ramp(self.step, 0, ramp)
                terms = self.networks.vqvae(scenes, self.strength(self.step), weight).losses
            else:
                self.networks.vqvae.eval()
                indices, context = self.networks.vqvae.indices(scenes)
                loss = self.networks.prior_loss(indices, context.detach(), kind=self.config.loss, generator=generator)
                terms = {"prior": loss}
        total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        (total * share).backward()
        nn.utils.clip_grad_norm_(self.module().parameters(), how.clip)
        self.optimizer.step()
        value = float(total.detach())
        if not math.isfinite(value):
            raise RunError(f"the loss is {value} at step {self.step + 1} of the {STAGES[self.stage]} stage; lower lr")
        self._average(how)
        return {name: float(term.detach()) for name, term in terms.items()}

    def _revive_codes(self) -> None:
        """From time to time in the first half of stage 1; what is dead follows from the weights alone."""
        every, last = self.config.revive_every, budget(self.config.stage1).steps // 2
        if self.stage or not every or self.step % every or self.step > last:
            return
        generator = generator_for(self.config.seed, 9, self.step)
        rows = torch.randperm(len(self.train_scenes), generator=generator)[:MAX_REVIVAL_SCENES]
        network = self.networks.vqvae.eval()
        used = reconstruction(network, self.train_scenes.subset(rows), self.strength(self.step - 1)).counts
        network.codebook.revive(used, generator)

    @torch.no_grad()
    def _average(self, how: StageConfig) -> None:
        # the average follows faster while it is young, or it would remember the start
        decay = min(how.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.module().state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def _validate(self, losses: dict[str, float]) -> None:
        """Measure the averaged weights and keep them if they are the best of the stage."""
        own = {name: value.clone() for name, value in self.module().state_dict().items()}
        self.module().load_state_dict(self.average)
        self.networks.eval()
        if self.stage == 0:
            found = reconstruction(self.networks.vqvae, self.val_scenes, self.strength(self.step - 1))
            losses |= {"val_perplexity": found.perplexity, "val_code_changes": found.changes}
            value = found.ade
        else:
            value = self._forecast_error()
        name = "val_reconstruction_ade" if self.stage == 0 else "val_min_ade"
        losses[name] = value
        full = self.stage == 1 or self.strength(self.step - 1) >= 1 or self.shape.vqvae.rank == 0
        last = self.step == self.budget().steps
        if (full and value < self.best_value) or (last and not math.isfinite(self.best_value)):
            self.best_value = value
            self.best = {key: tensor.detach().clone() for key, tensor in self.networks.state_dict().items()}
        self.folder.log({"stage": STAGES[self.stage], "step": self.step, **losses})
        self.module().load_state_dict(own)

    @torch.no_grad()
    def _forecast_error(self) -> float:
        """minADE of twenty plain samples on validation scenes."""
        forecaster = Forecaster(self.shape, self.networks, self.runtime.device)
        generator = torch.Generator(self.runtime.device).manual_seed(self.config.seed)
        total = count = 0.0
        for scenes in _few_scenes(self.val_scenes, self.config.seed).batches(64):
            chosen = forecaster.forecast_scenes(scenes, 20, SamplingConfig(select="samples"), generator=generator)
            mask = scenes.target_mask
            predicted, truth = chosen.trajectories.cpu()[:, mask], scenes.future[mask]
            if len(truth):
                total, count = total + float(min_ade(predicted, truth).sum()), count + len(truth)
        return total / max(1.0, count)

    def finish_stage(self) -> None:
        """Take the best weights and go to the next stage."""
        self.networks.load_state_dict(self.best)
        self.stage, self.step, self.optimizer, self.average = self.stage + 1, 0, None, {}
        self.save()

    def _finish(self) -> TrajectoryResult:
        write_shape(self.folder, self.shape)
        forecaster = Forecaster(self.shape, self.networks, self.runtime.device)
        metrics, calibration = measured_and_calibrated(forecaster, self.val_scenes, self.config.seed)
        calibration.write(self.folder.path)
        self.folder.write_result(
            {
                "status": "complete",
                "config": self.config.model_dump(mode="json"),
                "protocol": "trajectory",
                "method": "faithful" if self.config.faithful else "default",
                "dataset": self.train_scenes.name,
                "seed": self.config.seed,
                "accuracy": {},
                "metrics": {"validation": metrics},
                "seconds": self.seconds,
                "parameters": sum(value.numel() for value in self.networks.parameters()),
                "unit": self.shape.unit,
                "machine": machine(self.runtime.device),
                "memory_mb": peak_memory_mb(self.runtime.device),
                "versions": versions(),
            }
        )
        return TrajectoryResult(self.folder.path, metrics)

    # checkpoints

    def save(self) -> None:
        """Write everything that is needed to go on."""
        tensors = {f"model.{name}": value for name, value in self.networks.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        if self.optimizer is not None:
            for index, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        best_value = None if math.isinf(self.best_value) else self.best_value
        state = {"stage": self.stage, "step": self.step, "best_value": best_value, "seconds": self.seconds}
        self.folder.save_checkpoint({name: value.cpu().clone() for name, value in tensors.items()}, state)

    def load(self) -> None:
        """Take up the last checkpoint."""
        checkpoint = self.folder.load_checkpoint()
        self.folder.rewind_metrics(checkpoint.state["metrics_bytes"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "average": {}, "optimizer": {}}
        for name, value in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = value
        self.networks.load_state_dict(parts["model"])
        self.best = parts["best"]
        self.stage, self.step = int(checkpoint.state["stage"]), int(checkpoint.state["step"])
        self.seconds = dict(checkpoint.state["seconds"])
        if self.stage < len(STAGES) and parts["average"]:
            self._begin_stage()
            self.average = {name: value.to(self.runtime.device) for name, value in parts["average"].items()}
            self.networks.load_state_dict(parts["model"])
            self._restore_optimizer(parts["optimizer"])
            found = checkpoint.state["best_value"]
            self.best_value = math.inf if found is None else float(found)

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        assert self.optimizer is not None
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        document = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state, "param_groups": document["param_groups"]})


def measured_and_calibrated(forecaster: Forecaster, scenes: Scenes, seed: int) -> tuple[dict[str, float], Calibration]:
    """minADE and minFDE of twenty samples and of twenty centroids, and what the clusters' masses are worth.

    Args:
        forecaster: trained; its own calibration plays no part.
        scenes: that it was not trained on; of many, a seeded choice with about 700 agents that count.
        seed: of that choice and of the draws.
    """
    num_forecasts, sampling = 20, SamplingConfig(seed=seed)
    num_samples = num_drawn(num_forecasts, sampling)
    generator = torch.Generator(forecaster.device).manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"samples": [], "centroids": [], "masses": [], "truth": []}
    for batch in _few_scenes(scenes, seed).batches(32):
        samples, present = forecaster.draw(batch, num_samples, sampling, generator)
        chosen = select(samples, num_forecasts, agent_mask=present, smoothing=sampling.smoothing, generator=generator)
        mask = batch.target_mask[:, : present.shape[1]]
        parts["samples"].append(samples[:num_forecasts].cpu()[:, mask])
        parts["centroids"].append(chosen.trajectories.cpu()[:, mask])
        parts["masses"].append(chosen.probabilities.cpu()[:, mask])
        parts["truth"].append(batch.future[batch.target_mask])
    truth = torch.cat(parts.pop("truth"))
    drawn = {name: torch.cat(part, dim=1) for name, part in parts.items()}
    found = {}
    for name in ("samples", "centroids"):
        count = max(1, len(truth))
        found[f"min_ade_20_{name}"] = float(min_ade(drawn[name], truth).sum()) / count
        found[f"min_fde_20_{name}"] = float(min_fde(drawn[name], truth).sum()) / count
    calibration = fit_calibration(
        drawn["centroids"],
        truth,
        drawn["masses"],
        num_samples=num_samples,
        steps=sampling.steps,
        sampler=sampling.sampler,
        select="centroids",
        smoothing=sampling.smoothing,
        unit=scenes.unit,
    )
    return found, calibration


def _few_scenes(scenes: Scenes, seed: int) -> Scenes:
    """As many scenes as hold about ``MAX_VALIDATION_TARGETS`` agents that count, at least one; the emptiest first.

    Batches of scenes of about as many agents hold little padding.
    """
    order = torch.randperm(len(scenes), generator=generator_for(seed, 8))
    sizes = scenes.target_mask.sum(dim=1)
    rows = order[sizes[order].cumsum(dim=0) - sizes[order] < MAX_VALIDATION_TARGETS].sort().values
    return scenes.subset(rows[sizes[rows].argsort(stable=True)])


def train(config: TrajectoryConfig, *, out: Path | None = None, say: Say | None = None) -> TrajectoryResult:
    """Train a forecaster in a new run folder.

    Args:
        config: of the run.
        out: the folder; None makes one under ``runs/``.
        say: called after every step with stage, step, steps and that step's numbers.

    Raises:
        UserError: data that are not there, a wrong option, or a folder in use.
        RunError: the loss is not finite, or the disk is full.
        Interrupted: stopped by the user; a checkpoint is written.
    """
    name = config.files[0].stem if config.files else config.dataset.replace(":", "-")
    folder = RunFolder.create(
        out, stem=f"trajectory-{'faithful' if config.faithful else 'default'}-{name}-{config.seed}"
    )
    folder.acquire()
    try:
        trainer = Trainer(config, folder, say)
        folder.write_config(to_yaml(trainer.config))
        return trainer.run()
    finally:
        folder.release()


def resume(path: Path, *, say: Say | None = None) -> TrajectoryResult:
    """Go on with an interrupted run.

    Raises:
        UserError: not a trajectory run, in use, or with a damaged checkpoint.
    """
    folder = RunFolder.open(path)
    config = load_config(folder)
    folder.acquire()
    try:
        trainer = Trainer(config, folder, say)
        if folder.has_checkpoint():
            trainer.load()
        else:
            folder.rewind_metrics()
        return trainer.run()
    finally:
        folder.release()


def load_config(folder: RunFolder) -> TrajectoryConfig:
    """The configuration of a run.

    Raises:
        UserError: a run of another area.
    """
    values: dict[str, Any] = folder.config
    if "stage1" not in values:
        raise UserError(f"{folder.path} is not a trajectory run")
    return validate(TrajectoryConfig, values, source=str(folder.path / "config.yaml"))
