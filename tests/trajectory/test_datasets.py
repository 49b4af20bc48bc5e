"""Scenes of the known sets have the counts and the baseline errors that their protocols have."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory.datasets import FOLDS, load_scenes, scenes_of_tracks
from neurocl.trajectory.readers import read_tracks
from neurocl.trajectory.scenes import KINDS, Scenes
from tests.conftest import FIXTURES
from tests.trajectory.real_data import real_file

BASELINES = json.loads((FIXTURES / "trajectory" / "deterministic_baselines.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4


def targets(scenes: Scenes, without_ball: bool = False) -> torch.Tensor:
    mask = scenes.target_mask
    return mask & (scenes.kind != KINDS.index("ball")) if without_ball else mask


def predictions(past: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Past [M, T_o, 2] to futures [K, M, steps, 2] of the four deterministic forecasters."""
    observed = past.shape[1]
    last, velocity = past[:, -1], past[:, -1] - past[:, -2]
    ahead = torch.arange(1, steps + 1, dtype=torch.float64)[:, None]
    time = torch.arange(observed, dtype=torch.float64) - (observed - 1) / 2
    slope = torch.einsum("t,mti->mi", time, past) / (time**2).sum()
    line = past.mean(dim=1)[:, None] + slope[:, None] * (ahead + (observed - 1) / 2)
    angle = torch.linspace(-45, 45, 20, dtype=torch.float64) * (math.pi / 180)
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    x, y = velocity[:, 0], velocity[:, 1]
    turned = torch.stack([c * x - s * y, s * x + c * y], dim=-1)
    return {
        "stationary": last[None, :, None].expand(1, -1, steps, -1),
        "constant_velocity": (last[:, None] + velocity[:, None] * ahead)[None],
        "linear_least_squares": line[None],
        "cv_fan_20": last[None, :, None] + turned[:, :, None] * ahead,
    }


def assert_reproduces(scenes: Scenes, name: str, without_ball: bool = False) -> None:
    mask = targets(scenes, without_ball)
    past, future = scenes.past[mask].double(), scenes.future[mask].double()
    scene = mask.nonzero()[:, 0]
    expected = BASELINES[name]
    assert len(past) == expected["count"]
    for method, futures in predictions(past, scenes.num_predicted).items():
        distance = (futures - future).norm(dim=-1)
        for steps, (ade, fde) in expected[method].items():
            horizon = int(steps)
            assert distance[..., :horizon].mean(dim=2).amin(dim=0).mean().item() == pytest.approx(ade, abs=TOLERANCE)
            assert distance[..., horizon - 1].amin(dim=0).mean().item() == pytest.approx(fde, abs=TOLERANCE)
        if f"{method}_joint" in expected:
            for index, error in enumerate((distance.mean(dim=2), distance[..., -1])):
                total = torch.zeros(len(error), len(scenes), dtype=torch.float64).index_add_(1, scene, error)
                joint = (total / mask.sum(dim=1)).amin(dim=0).mean().item()
                assert joint == pytest.approx(expected[f"{method}_joint"][index], abs=TOLERANCE)


@pytest.mark.parametrize("fold", FOLDS)
def test_eth_ucy_test_folds_reproduce_the_reference_errors(fold: str) -> None:
    real_file("eth_ucy/splits.json")
    assert_reproduces(load_scenes(f"eth-ucy:{fold}", "test"), f"ethucy_{fold}_min2")
    assert_reproduces(load_scenes(f"eth-ucy:{fold}", "test", min_targets=1), f"ethucy_{fold}_min1")


@pytest.mark.parametrize(
    ("fold", "windows", "agents"),
    [("eth", 70, 181), ("hotel", 301, 1053), ("univ", 947, 24334), ("zara1", 602, 2253), ("zara2", 921, 5833)],
)
def test_eth_ucy_test_folds_have_the_windows_of_the_benchmark(fold: str, windows: int, agents: int) -> None:
    real_file("eth_ucy/splits.json")
    scenes = load_scenes(f"eth-ucy:{fold}", "test")
    assert (len(scenes), scenes.num_targets) == (windows, agents)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_eth_ucy_training_recordings_are_cut_where_the_source_cuts_them(fold: str, split: str) -> None:
    real_file("eth_ucy/splits.json")
    scenes = load_scenes(f"eth-ucy:{fold}", split)
    assert scenes.num_targets == BASELINES[f"ethucy_{fold}_{split}_count_min1"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_sdd_reproduces_the_reference_errors(split: str) -> None:
    real_file("sdd/sdd_trajnet.csv.gz")
    assert_reproduces(load_scenes("sdd", split), f"sdd_{split}_px")


def test_sdd_train_and_val_together_are_the_training_tracks_of_the_papers() -> None:
    real_file("sdd/sdd_trajnet.csv.gz")
    train, val = load_scenes("sdd", "train"), load_scenes("sdd", "val")
    assert not set(train.recording) & set(val.recording)
    assert_reproduces(Scenes.joined([train, val]), "sdd_train_px")


def test_sdd_test_has_each_track_once_and_its_neighbours_with_masks() -> None:
    real_file("sdd/sdd_trajnet.csv.gz")
    scenes = load_scenes("sdd", "test")
    assert (len(scenes), scenes.num_targets) == (1999, 2829)
    rows = scenes.target_mask.nonzero()
    tracks = {(scenes.recording[scene], int(scenes.agent_id[scene, slot])) for scene, slot in rows.tolist()}
    assert len(tracks) == 2829
    neighbours = scenes.agent_mask & ~scenes.target_mask
    assert neighbours.sum() > 2829
    assert scenes.past_mask[neighbours].any(dim=1).all()
    assert not scenes.past_mask[neighbours].all()
    assert scenes.past_mask[scenes.target_mask].all()
    assert scenes.future_mask[scenes.target_mask].all()


@pytest.mark.parametrize("split", ["val", "test"])
def test_nba_at_5_hz_reproduces_the_reference_errors(split: str) -> None:
    real_file("nba/nba_score_test.npz")
    scenes = load_scenes("nba", split)
    assert_reproduces(scenes, f"nba_5hz_{split}_m")
    if split == "test":
        assert_reproduces(scenes, "nba_5hz_test_players_only_m", without_ball=True)


def test_nba_rebounds_reproduce_the_reference_errors() -> None:
    real_file("nba/nba_rebound_test.npz")
    assert_reproduces(load_scenes("nba:rebound", "test"), "nba_rebound_test_ft_8_12_at_0.12s_players")


@pytest.mark.parametrize(
    ("stride", "train", "val", "test"), [(30, 3650, 465, 856), (15, 6097, 769, 1431), (5, 16047, 2025, 3796)]
)
def test_nba_has_the_documented_number_of_scenes(stride: int, train: int, val: int, test: int) -> None:
    real_file("nba/nba_score_train.npz")
    counts = {"train": train, "val": val, "test": test}
    assert {split: len(load_scenes("nba", split, stride=stride)) for split in counts} == counts


def test_nba_scenes_are_home_then_visitor_then_ball_on_the_court() -> None:
    real_file("nba/nba_score_test.npz")
    scenes = load_scenes("nba", "test")
    order = [KINDS.index(kind) for kind in ["home"] * 5 + ["visitor"] * 5 + ["ball"]]
    assert (scenes.kind == torch.tensor(order)).all()
    players = scenes.past[:, :10]
    assert players[..., 0].median().item() == pytest.approx(14, abs=4)
    assert players[..., 1].quantile(0.99).item() < 50 * 28 / 94 + 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_nfl_at_5_hz_reproduces_the_reference_errors(split: str) -> None:
    real_file("nfl/nfl_test.npz")
    assert_reproduces(load_scenes("nfl", split), f"nfl_5hz_{split}_m")


@pytest.mark.parametrize(
    ("split", "stride", "count"), [("val", 24, 280), ("train", 24, 2057), ("train", 8, 5835), ("train", 4, 11508)]
)
def test_nfl_has_the_documented_number_of_scenes(split: str, stride: int, count: int) -> None:
    real_file("nfl/nfl_train.npz")
    assert len(load_scenes("nfl", split, stride=stride)) == count


def test_every_reference_set_is_tested() -> None:
    names = {f"ethucy_{fold}_min{least}" for fold in FOLDS for least in (1, 2)}
    names |= {f"ethucy_{fold}_{split}_count_min1" for fold in FOLDS for split in ("train", "val")}
    names |= {"sdd_train_px", "sdd_val_px", "sdd_test_px", "nfl_5hz_val_m", "nfl_5hz_test_m", "nba_5hz_val_m"}
    names |= {"nba_5hz_test_m", "nba_5hz_test_players_only_m", "nba_rebound_test_ft_8_12_at_0.12s_players"}
    assert names == set(BASELINES)


def walkers(path: Path, rows: int, agents: int = 2, step: int = 10) -> Path:
    lines = [f"{row * step} {agent} {0.1 * row + agent} {agent}" for row in range(rows) for agent in range(agents)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_own_files_are_split_by_time_without_shared_steps(tmp_path: Path) -> None:
    path = walkers(tmp_path / "walk.txt", 400)
    parts = [load_scenes(path, split) for split in ("train", "val", "test")]
    total = 400 - 19
    assert len(parts[0]) == round(0.7 * total)
    for before, after in itertools.pairwise(parts):
        assert before.start.max() + 20 * 10 <= after.start.min()
    assert parts[2].start.max() == 10 * (400 - 20)
    assert all(part.num_targets == 2 * len(part) for part in parts)


def test_own_files_may_be_several_and_resampled(tmp_path: Path) -> None:
    files = [walkers(tmp_path / f"{name}.txt", 200) for name in "ab"]
    scenes = load_scenes(files, "train", hz=1.25, num_observed=4, num_predicted=6)
    assert scenes.hz == 1.25
    assert set(scenes.recording) == {"a", "b"}
    speed = (scenes.past[:, :, 1:] - scenes.past[:, :, :-1])[scenes.target_mask]
    assert torch.allclose(speed[..., 0], torch.tensor(0.2), atol=1e-4)


def test_files_too_short_for_a_split_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few for val"):
        load_scenes(walkers(tmp_path / "walk.txt", 30), "val")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eth-ucy:zara9", {}, "eth-ucy needs a fold"),
        ("nosuch.txt", {}, "neither a file nor a data set"),
        ("sdd", {"stride": 3}, "no stride"),
        ("sdd", {"num_predicted": 40}, "20 steps"),
        ("nba", {"hz": 3.0}, "own files"),
        ("crowd", {"num_observed": 0}, "num_observed must be at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_scenes(name, "train", **options)


def test_absent_data_name_the_option_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUROCL_DATA", raising=False)
    monkeypatch.setenv("NEUROCL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="--data-dir"):
        load_scenes("nfl", "test", data_dir=tmp_path)


def test_an_unknown_split_is_a_mistake() -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        load_scenes("crowd", "dev")


def test_scenes_of_tracks_interpolate_neighbours_that_lie_between_the_steps(tmp_path: Path) -> None:
    lines = [f"{12 * row} 1 {row} 0" for row in range(6)] + [f"{18 + 12 * row} 2 {row} 5" for row in range(6)]
    path = tmp_path / "walk.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    scenes = scenes_of_tracks(read_tracks(path), 3, 3, 12)
    assert scenes.start.tolist() == [0, 18]
    assert scenes.target_mask.tolist() == [[True, False], [True, False]]
    # In the first scene agent 2 comes in between step 1 and 2; in the second agent 1 leaves.
    assert scenes.past_mask[0, 1].tolist() == [False, False, True]
    assert scenes.past[0, 1, 2].tolist() == [0.5, 5.0]
    assert scenes.past[1, 1, :, 0].tolist() == [1.5, 2.5, 3.5]
    assert scenes.future_mask[1, 1].tolist() == [True, False, False]
