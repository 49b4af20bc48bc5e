"""Training and forecasting: the whole path on a small recording, resuming to the same bits, mistakes in one line."""

import hashlib
import os
import signal

import numpy as np
import pytest
import torch

from neurocl.config import validate
from neurocl.errors import Interrupted, UserError
from neurocl.runs import RunFolder
from neurocl.trajectory.codebook import InstanceCodebook
from neurocl.trajectory.config import AugmentConfig, budget, completed, resolve
from neurocl.trajectory.diffusion import MaskReplaceDiffusion
from neurocl.trajectory.forecaster import Forecaster, SamplingConfig, Shape
from neurocl.trajectory.training import Trainer, load_split, resume, train

SMALL = {
    "model": {"width": 16, "heads": 2, "hidden": 16, "num_codes": 8, "rank": 2},
    "trunk": {"width": 16, "heads": 2, "hidden": 16},
    "stage1": {"steps": 12, "batch_size": 16, "validate_every": 6},
    "stage2": {"steps": 8, "batch_size": 16, "validate_every": 4},
    "diffusion_steps": 10,
    "max_validation_scenes": 1000,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Five agents that walk on arcs for 240 frames, in the four-column text of ETH/UCY."""
    rng = np.random.default_rng(0)
    start, speed = rng.uniform(-5, 5, (5, 2)), rng.uniform(0.2, 0.6, 5)
    angle = rng.uniform(0, 6, 5)[:, None] + rng.normal(0, 0.05, (5, 240)).cumsum(axis=1)
    steps = speed[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    xy = start[:, None] + steps.cumsum(axis=1)
    rows = [
        f"{10 * t}\t{agent}\t{xy[agent, t, 0]:.4f}\t{xy[agent, t, 1]:.4f}" for t in range(240) for agent in range(5)
    ]
    path = tmp_path_factory.mktemp("recording") / "walk.txt"
    path.write_text("\n".join(rows) + "\n")
    return path


def config_for(recording, **changes):
    return resolve("small", SMALL, {"files": (recording,), **changes})


@pytest.fixture(scope="module")
def run(recording, tmp_path_factory):
    return train(config_for(recording), out=tmp_path_factory.mktemp("runs") / "run")


def tensors_of(path):
    (file,) = (path / "checkpoint").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_writes_configuration_metrics_model_and_result(run):
    assert {"config.yaml", "metrics.jsonl", "model.json", "result.json", "checkpoint"} <= {
        path.name for path in run.path.iterdir()
    }
    assert set(run.metrics) == {
        "min_ade_20_samples",
        "min_fde_20_samples",
        "min_ade_20_centroids",
        "min_fde_20_centroids",
    }
    assert all(0 < value < 20 for value in run.metrics.values())


@pytest.mark.parametrize("at", [("codes", 5), ("codes", 12), ("prior", 3)])
def test_a_stopped_run_goes_on_to_the_same_bits(recording, run, tmp_path, at):
    def stop(stage, step, steps, numbers):
        if (stage, step) == at:
            os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted, match="--resume"):
        train(config_for(recording), out=folder, say=stop)
    again = resume(folder)
    assert again.metrics == run.metrics
    assert tensors_of(folder) == tensors_of(run.path)
    assert (folder / "metrics.jsonl").read_text() == (run.path / "metrics.jsonl").read_text()


def test_other_seeds_give_other_weights(recording, run, tmp_path):
    other = train(config_for(recording, seed=1), out=tmp_path / "other")
    assert tensors_of(other.path) != tensors_of(run.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": "autoregressive"},
        {"prior": "flow"},
        {"prior": "ddim"},
        {"faithful": True},
        {"loss": "kl"},
        {"schedule": "cosine", "loss": "kl"},
        {"model": {"estimator": "gumbel"}, "revive_every": 3},
        {"augment": {"absent": 0.5}},
    ],
    ids=str,
)
def test_every_variant_trains_and_forecasts(recording, tmp_path, changes):
    result = train(config_for(recording, **changes), out=tmp_path / "run")
    forecaster = Forecaster.load(result.path)
    found = forecaster.forecast(torch.randn(8, 2).cumsum(0), None, 5)
    assert found.trajectories.shape == (5, 1, 12, 2)
    assert torch.isfinite(found.trajectories).all()
    torch.testing.assert_close(found.probabilities.sum(dim=0), torch.ones(1))


def test_the_loaded_forecaster_gives_the_measured_numbers_again(recording, run):
    from neurocl.trajectory.training import measured_and_calibrated

    validation = load_split(config_for(recording), "val")
    again = measured_and_calibrated(Forecaster.load(run.path), validation, seed=0)[0]
    assert again == pytest.approx(run.metrics, rel=1e-6)


def test_forecasts_move_with_the_agent(run):
    forecaster = Forecaster.load(run.path)
    past = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0)).cumsum(1)
    shift = torch.tensor([100.0, -50.0])
    here, there = forecaster.forecast(past, None, 4), forecaster.forecast(past + shift, None, 4)
    torch.testing.assert_close(there.trajectories, here.trajectories + shift, rtol=1e-4, atol=1e-3)


def test_a_seed_repeats_a_forecast_and_another_changes_it(run):
    forecaster, past = Forecaster.load(run.path), torch.randn(8, 2).cumsum(0)
    first = forecaster.forecast(past, None, 4, sampling=SamplingConfig(seed=1))
    again = forecaster.forecast(past, None, 4, sampling=SamplingConfig(seed=1))
    other = forecaster.forecast(past, None, 4, sampling=SamplingConfig(seed=2))
    assert torch.equal(first.trajectories, again.trajectories)
    assert not torch.equal(first.trajectories, other.trajectories)


def test_agents_that_appear_late_and_neighbours_are_taken(run):
    forecaster = Forecaster.load(run.path)
    past = torch.randn(2, 8, 2).cumsum(1)
    past[1, :5] = torch.nan
    found = forecaster.forecast(past, torch.randn(100, 8, 2), 3)
    assert found.trajectories.shape == (3, 2, 12, 2)
    assert torch.isfinite(found.trajectories).all()


def test_joint_forecasts_have_one_probability_for_all_agents(run):
    forecaster = Forecaster.load(run.path)
    found = forecaster.forecast(torch.randn(3, 8, 2), None, 4, sampling=SamplingConfig(joint=True))
    assert found.joint
    assert (found.probabilities == found.probabilities[:, :1]).all()


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (torch.zeros(7, 2), r"past must be \[8, 2\]"),
        (torch.zeros(2, 8, 3), r"past must be \[8, 2\]"),
        (torch.full((8, 2), torch.nan), "was not seen in any observed step"),
    ],
)
def test_a_past_that_does_not_fit_is_one_line(run, past, message):
    with pytest.raises(UserError, match=message):
        Forecaster.load(run.path).forecast(past)


def test_other_folders_are_no_forecasters(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        Forecaster.load(tmp_path)


def test_wrong_keys_and_presets_are_named():
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        resolve("tinny")
    with pytest.raises(UserError, match="unknown key 'stage3'"):
        resolve("small", {"stage3": {}})


def test_only_the_diffusion_hides_pasts():
    with pytest.raises(UserError, match="drop_past is for the diffusion prior, not for flow"):
        resolve("small", {"prior": "flow", "drop_past": 0.1})


def test_the_papers_schedule_is_that_of_its_code():
    config = resolve("paper")
    assert config.stage1.betas == (0.5, 0.9)
    assert (config.strength_from * 150_000, config.strength_to * 150_000) == (50_000, 100_000)


def test_guidance_pushes_codes_away_from_those_without_the_past(recording, run, tmp_path):
    past = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0)).cumsum(1)
    plain = Forecaster.load(run.path)
    with pytest.raises(UserError, match="drop_past"):
        plain.forecast(past, sampling=SamplingConfig(guidance=1.0))
    with pytest.raises(UserError, match="guidance"):
        validate(SamplingConfig, {"guidance": -1.0}, source="forecast")

    forecaster = Forecaster.load(train(config_for(recording, drop_past=0.3), out=tmp_path / "run").path)
    assert forecaster.shape.drop_past == 0.3
    found = [forecaster.forecast(past, sampling=SamplingConfig(guidance=scale)) for scale in (0.0, 1e-9, 2.0)]
    torch.testing.assert_close(found[0].trajectories, found[1].trajectories)
    assert not torch.allclose(found[0].trajectories, found[2].trajectories)
    assert not found[2].extra.keys() & {"radius_50", "radius_90"}  # calibration is of forecasts without it


def test_models_written_before_there_were_schedules_have_the_linear_one(run):
    document = Forecaster.load(run.path).shape.document()
    assert (document.pop("schedule"), document.pop("drop_past")) == ("linear", 0.0)
    assert Shape.read(document, "model.json") == Forecaster.load(run.path).shape


def test_a_forecaster_keeps_its_schedule(recording, tmp_path):
    folder = train(config_for(recording, schedule="cosine"), out=tmp_path / "run").path
    diffusion = Forecaster.load(folder).networks.diffusion
    assert torch.equal(diffusion.keep, MaskReplaceDiffusion(8, 10, "cosine").keep)


def test_dead_codes_are_revived_in_the_first_half_of_stage_1(recording, tmp_path, monkeypatch):
    revived = []
    monkeypatch.setattr(InstanceCodebook, "revive", lambda self, counts, generator: revived.append(counts))
    folder = RunFolder.create(tmp_path / "run", stem="x")
    trainer = Trainer(config_for(recording, revive_every=2), folder)
    trainer.run()
    assert len(revived) == 3
    whole = trainer.train_scenes.subset(torch.arange(min(256, len(trainer.train_scenes))))
    assert all(counts.sum() == pytest.approx(whole.num_targets * 12, rel=0.1) for counts in revived)


def test_a_stopped_run_revives_the_same_codes(recording, tmp_path):
    def stop(stage, step, steps, numbers):
        if (stage, step) == ("codes", 3):
            os.kill(os.getpid(), signal.SIGINT)

    config = config_for(recording, revive_every=2, model={"num_codes": 32})
    whole = train(config, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "stopped", say=stop)
    resume(tmp_path / "stopped")
    assert tensors_of(tmp_path / "stopped") == tensors_of(whole.path)


def test_what_is_left_open_is_taken_from_the_data_set():
    sdd = completed(resolve("small", {"dataset": "sdd"}))
    assert sdd.scale == 50.0
    assert sdd.augment is not None
    assert sdd.augment.rotation == 360
    nba = completed(resolve("small", {"dataset": "nba"}))
    assert nba.augment is not None
    assert nba.augment.rotation == 0
    assert nba.model == {"absolute": True, "heading": False, "neighbours": 0}
    assert completed(nba) == nba


def test_what_is_asked_for_is_kept():
    asked = {"dataset": "nba", "scale": 2.0, "max_agents": 3, "model": {"heading": True}, "stage1": {"steps": 7}}
    config = completed(resolve("small", asked))
    assert (config.scale, config.max_agents) == (2.0, 3)
    assert config.model == {"absolute": True, "heading": True, "neighbours": 0}
    assert budget(config.stage1)[::2] == (7, 2)
    resized = completed(resolve("small", {"dataset": "eth-ucy:eth", "augment": {"resize": 2.0}}))
    assert resized.augment == AugmentConfig(rotation=360, reflection=True, resize=2.0)
    faithful = completed(resolve("small", {"dataset": "nba", "faithful": True}))
    assert faithful.model == {}
    with pytest.raises(ValueError, match="not completed"):
        budget(resolve("small").stage1)


def test_an_epoch_holds_every_scene_once_and_batches_of_like_scenes(tmp_path):
    config = resolve("tiny", {"stage1": {"steps": 2, "batch_size": 16}, "stage2": {"steps": 1}, "max_agents": 6})
    folder = RunFolder.create(tmp_path / "run", stem="x")
    trainer = Trainer(config, folder)
    batches = trainer._epoch(0, 16)
    assert len(batches.unique()) == batches.numel() == len(trainer.train_scenes) // 16 * 16
    assert torch.equal(batches, trainer._epoch(0, 16))
    assert not torch.equal(batches, trainer._epoch(1, 16))
    spread = trainer.targets[batches].double().std(dim=1).mean()
    assert spread < 0.3 * trainer.targets.double().std()
    assert trainer._batch(torch.Generator().manual_seed(0)).num_agents <= 6
