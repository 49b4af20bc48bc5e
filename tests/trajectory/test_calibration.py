"""Calibration: the temperature that made the masses, radii that hold what they promise, and a file that is checked."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory import training
from neurocl.trajectory.calibration import (
    Calibration,
    fit_calibration,
    fit_temperature,
    inside,
    log_likelihood,
    nearest_forecast,
    tempered,
)
from neurocl.trajectory.forecaster import Forecaster, SamplingConfig, num_drawn
from neurocl.trajectory.selection import select
from neurocl.trajectory.writers import write_forecast
from tests.trajectory.scene_examples import walks
from tests.trajectory.small_run import small_run

FIT = {"num_samples": 200, "steps": 10, "sampler": "posterior", "select": "centroids", "unit": "m"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A forecaster that has learnt next to nothing."""
    return small_run(tmp_path_factory.mktemp("small"))


def drawn_masses(count, forecasts=20, seed=0):
    """Masses [K, M] of as many agents, and which of their forecasts came true, drawn with just these probabilities."""
    generator = torch.Generator().manual_seed(seed)
    masses = (1.5 * torch.randn(forecasts, count, generator=generator, dtype=torch.float64)).softmax(dim=0)
    return masses, torch.multinomial(masses.T, 1, generator=generator)[:, 0]


# the temperature


def test_masses_that_are_right_have_a_temperature_of_one():
    masses, nearest = drawn_masses(40_000)
    assert fit_temperature(masses, nearest, num_samples=10**9) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("temperature", [0.5, 1.7, 4.0])
def test_sharpened_masses_give_back_the_temperature_that_they_were_sharpened_with(temperature):
    masses, nearest = drawn_masses(40_000, seed=1)
    sharp = (masses.log() * temperature).softmax(dim=0)
    assert fit_temperature(sharp, nearest, num_samples=10**12) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0, 10.0])
def test_the_temperature_is_exact_where_frequencies_are(temperature):
    true = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    nearest = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])  # as often as they should
    masses = true.pow(temperature) / true.pow(temperature).sum()
    found = fit_temperature(masses[:, None].expand(-1, 8), nearest, num_samples=10**12)
    assert found == pytest.approx(temperature, rel=1e-9)


def test_the_temperature_of_two_forecasts_has_a_closed_form():
    masses = torch.tensor([0.9, 0.1], dtype=torch.float64)[:, None].expand(-1, 10)
    nearest = torch.tensor([0] * 7 + [1] * 3)
    expected = math.log(0.9 / 0.1) / math.log(0.7 / 0.3)
    assert fit_temperature(masses, nearest, num_samples=200) == pytest.approx(expected, rel=1e-9)
    probabilities = tempered(masses, expected, num_samples=200)
    torch.testing.assert_close(probabilities[0], torch.full((10,), 0.7, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(8))
def test_fitting_is_never_worse_than_leaving_the_masses_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.multinomial(torch.rand(50, 20, generator=generator), 40, replacement=True, generator=generator)
    masses = torch.nn.functional.one_hot(counts, 20).sum(dim=1).T / 40
    nearest = torch.randint(20, (50,), generator=generator)
    temperature = fit_temperature(masses, nearest, 40)
    best = log_likelihood(tempered(masses.double(), temperature, 40), nearest)
    for other in (1.0, 0.97 * temperature, 1.03 * temperature):
        if 0.2 <= other <= 100:
            assert best >= log_likelihood(tempered(masses.double(), other, 40), nearest) - 1e-12


def test_masses_that_say_nothing_or_are_always_right_end_at_a_bound():
    masses = torch.tensor([0.8, 0.2])[:, None].expand(-1, 4)
    assert fit_temperature(torch.full((5, 7), 0.2), torch.zeros(7, dtype=torch.int64), 100) == 1
    assert fit_temperature(torch.empty(5, 0), torch.empty(0, dtype=torch.int64), 100) == 1
    assert fit_temperature(masses, torch.ones(4, dtype=torch.int64), 100) == pytest.approx(100)
    assert fit_temperature(masses, torch.zeros(4, dtype=torch.int64), 100) == pytest.approx(0.2)


def test_tempering_keeps_the_order_and_gives_every_forecast_a_probability():
    masses = torch.tensor([[0.7, 0.25], [0.3, 0.25], [0.0, 0.5]])
    for temperature in (0.2, 1.0, 3.0, 100.0):
        probabilities = tempered(masses, temperature, num_samples=200)
        torch.testing.assert_close(probabilities.sum(dim=0), torch.ones(2))
        assert (probabilities > 0).all()
        assert torch.equal(probabilities.argsort(dim=0, stable=True), masses.argsort(dim=0, stable=True))
    torch.testing.assert_close(tempered(masses, 1.0, 200)[:, 1], masses[:, 1])
    torch.testing.assert_close(tempered(masses, 1.0, 200)[2, 0], torch.tensor(0.0025 / 1.0025))
    torch.testing.assert_close(tempered(masses, 1e9, 200), torch.full((3, 2), 1 / 3))


def test_the_nearest_forecast_is_the_one_of_the_smallest_mean_distance():
    truth = torch.zeros(2, 3, 2)
    pred = torch.zeros(2, 2, 3, 2)
    pred[0, 0, :, 0], pred[1, 0, -1, 0] = 1.0, 2.5  # agent 0: mean 1 against 2.5 / 3
    pred[0, 1, 0, 1], pred[1, 1, :, 1] = 0.3, 0.2  # agent 1: 0.1 against 0.2
    assert nearest_forecast(pred, truth).tolist() == [1, 0]


# the radii


def exchangeable(count, seed):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(count, 4, 2, generator=generator, dtype=torch.float64).cumsum(dim=1)
    return torch.randn(5, count, 4, 2, generator=generator, dtype=torch.float64).cumsum(dim=2), truth


@pytest.mark.parametrize("count", [19, 100, 1001])
def test_the_radii_hold_at_least_their_share_of_what_they_were_fitted_on(count):
    pred, truth = exchangeable(count, seed=count)
    found = fit_calibration(pred, truth, torch.full((5, count), 0.2), **FIT)
    for level, radii in ((0.5, found.radius_50), (0.9, found.radius_90)):
        share = inside(pred, truth, torch.tensor(radii, dtype=torch.float64)).double().mean(dim=0)
        assert (share >= level).all()
        assert (share <= level + 2 / count + 1e-9).all()


def test_the_radii_hold_their_share_of_new_agents_within_binomial_bounds():
    count = 4000
    pred, truth = exchangeable(count, seed=1)
    found = fit_calibration(pred, truth, torch.full((5, count), 0.2), **FIT)
    pred, truth = exchangeable(count, seed=2)
    for level, radii in ((0.5, found.radius_50), (0.9, found.radius_90)):
        share = inside(pred, truth, torch.tensor(radii, dtype=torch.float64)).double().mean(dim=0)
        deviation = math.sqrt(2 * level * (1 - level) / count)  # of the fit and of the count
        assert ((share - level).abs() < 4 * deviation).all()


def test_a_radius_that_too_few_agents_cannot_vouch_for_is_left_out():
    pred, truth = exchangeable(5, seed=0)
    found = fit_calibration(pred, truth, torch.full((5, 5), 0.2), **FIT)
    assert found.radius_90 is None
    assert set(found.radii()) == {"radius_50"}
    nobody = fit_calibration(pred[:, :0], truth[:0], torch.empty(5, 0), **FIT)
    assert (nobody.temperature, nobody.radii(), nobody.num_agents) == (1.0, {}, 0)


# the file


def calibration(**changes):
    radii = {"radius_50": (0.1, 0.25), "radius_90": (1 / 3, math.pi)}
    values = {"temperature": 1.3, **radii, "num_forecasts": 20, "num_agents": 100, **FIT, **changes}
    return Calibration.model_validate(values)


@pytest.mark.parametrize("changes", [{}, {"radius_90": None}])
def test_a_calibration_survives_the_file_to_the_last_bit(tmp_path, changes):
    calibration(**changes).write(tmp_path)
    assert Calibration.read(tmp_path, num_predicted=2, unit="m") == calibration(**changes)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_a_folder_without_one_has_none(tmp_path):
    assert Calibration.read(tmp_path, num_predicted=2, unit="m") is None


DAMAGE = {
    "half of it": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "nothing": (lambda text: "", "not valid JSON"),
    "no text": (lambda text: "\x00\x01", "not valid JSON"),
    "a list": (lambda text: "[1, 2]", "not a calibration"),
    "another schema": (lambda text: text.replace('"schema": 1', '"schema": 2'), "not a calibration"),
    "a temperature of zero": (lambda text: text.replace("1.3", "0"), "temperature"),
    "a temperature that is no number": (lambda text: text.replace("1.3", "NaN"), "temperature"),
    "a word for a temperature": (lambda text: text.replace("1.3", '"warm"'), "temperature"),
    "a negative radius": (lambda text: text.replace("0.25", "-0.25"), "radius_50"),
    "an infinite radius": (lambda text: text.replace("0.25", "Infinity"), "radius_50"),
    "a step too few": (lambda text: text.replace("0.1,", ""), "radius_50 has 1 steps, the model forecasts 2"),
    "no steps": (lambda text: json.dumps(json.loads(text) | {"radius_90": []}), "radius_90"),
    "an unknown key": (lambda text: text.replace('"steps"', '"stepps": 10, "steps"'), "did you mean 'steps'"),
    "other units": (lambda text: text.replace('"m"', '"px"'), "in px, the model was trained in m"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, how):
    change, message = DAMAGE[how]
    calibration().write(tmp_path)
    path = tmp_path / "calibration.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as error:
        Calibration.read(tmp_path, num_predicted=2, unit="m")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# a trained model


def test_training_ends_with_a_calibration_that_the_forecaster_loads(run):
    document = json.loads((run / "calibration.json").read_text())
    found = Forecaster.load(run).calibration
    assert document.pop("schema") == 1
    assert found.model_dump(mode="json") == document
    assert (found.num_forecasts, found.num_samples, found.select, found.unit) == (20, 200, "centroids", "m")
    assert len(found.radius_90) == 12
    assert all(small <= large for small, large in zip(found.radius_50, found.radius_90, strict=True))


@pytest.mark.parametrize("how", ["centroids", "medoids", "samples"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_probabilities_add_up_to_one_however_forecasts_are_chosen(run, how, joint, count):
    sampling = SamplingConfig(select=how, joint=joint, steps=2)
    found = Forecaster.load(run).forecast_scenes(walks(2, 3), count, sampling)
    torch.testing.assert_close(found.probabilities.sum(dim=0), torch.ones(2, 3))


def test_only_forecasts_like_those_of_the_fit_are_tempered(run):
    forecaster, scenes = Forecaster.load(run), walks(1, 2)
    forecaster.calibration = forecaster.calibration.model_copy(update={"temperature": 2.0})

    def factor(count=20, **changes):
        """Whether forecasts are tempered: with 2, probabilities go like the square roots of the masses."""
        sampling = SamplingConfig(**{"steps": 2, **changes})
        generator = torch.Generator().manual_seed(0)
        samples, present = forecaster.draw(scenes, num_drawn(count, sampling), sampling, generator)
        how = {"how": sampling.select, "joint": sampling.joint, "smoothing": sampling.smoothing}
        masses = select(samples, count, agent_mask=present, generator=generator, **how).probabilities
        found = forecaster.forecast_scenes(scenes, count, sampling).probabilities
        roots = tempered(masses, 2.0, num_drawn(count, sampling))
        assert torch.equal(found, masses) or torch.equal(found, roots)
        return 2.0 if torch.equal(found, roots) else 1.0

    assert [factor(count) for count in (9, 10, 20, 40, 41)] == [1, 2, 2, 2, 1]
    assert factor(select="medoids") == 2
    assert factor(joint=True) == factor(temperature=0.8) == factor(top_p=0.9) == 1
    assert not forecaster.calibrates(20, SamplingConfig(select="samples"))


def test_radii_come_with_forecasts_of_exactly_the_kind_that_was_measured(run, tmp_path):
    forecaster, past = Forecaster.load(run), torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).cumsum(0)
    found = forecaster.forecast(past, None, 20)
    assert found.extra["radius_90"] == list(forecaster.calibration.radius_90)
    assert found.extra["radius_50"] == list(forecaster.calibration.radius_50)
    for count, changes in (
        (19, {}),
        (20, {"steps": 7}),
        (20, {"select": "medoids"}),
        (20, {"num_samples": 100}),
        (20, {"smoothing": 0.2}),
    ):
        assert "radius_90" not in forecaster.forecast(past, None, count, sampling=SamplingConfig(**changes)).extra
    write_forecast(tmp_path / "f.json", found)
    write_forecast(tmp_path / "f.npz", found)
    assert json.loads((tmp_path / "f.json").read_text())["radius_90"] == found.extra["radius_90"]
    with np.load(tmp_path / "f.npz") as arrays:
        assert arrays["radius_50"].tolist() == found.extra["radius_50"]


def test_a_run_without_a_calibration_forecasts_plain_masses(run):
    plain = Forecaster(Forecaster.load(run).shape, Forecaster.load(run).networks)
    found = plain.forecast(torch.randn(8, 2).cumsum(0), None, 20)
    shares = found.probabilities * 1000  # of 200 samples and four smoothed copies of each
    torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-4)
    assert set(found.extra) == {"seconds"}


def test_calibrating_again_gives_the_same_bits(run, tmp_path):
    before = (run / "calibration.json").read_bytes()
    (run / "calibration.json").unlink()
    training.resume(run)
    assert (run / "calibration.json").read_bytes() == before


def test_many_validation_scenes_are_cut_to_about_as_many_agents_as_are_needed(monkeypatch):
    monkeypatch.setattr(training, "MAX_VALIDATION_TARGETS", 10)
    scenes = walks(num_scenes=50, num_agents=4)
    few = training._few_scenes(scenes, seed=0)
    assert len(few) == 3
    assert torch.equal(few.start, training._few_scenes(scenes, seed=0).start)
    assert not torch.equal(few.start, training._few_scenes(scenes, seed=1).start)
    assert torch.equal(training._few_scenes(few, seed=3).start, few.start)
    scenes.target_mask[::2, 1:] = False
    assert (training._few_scenes(scenes, seed=0).target_mask.sum(dim=1).diff() >= 0).all()


def test_a_forecaster_with_a_damaged_calibration_does_not_load(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "calibration.json").write_text("{}")
    with pytest.raises(UserError, match=r"copy/calibration\.json: not a calibration"):
        Forecaster.load(copy)
