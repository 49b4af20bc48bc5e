"""Evaluation: the numbers of the references, a perfect forecaster without error, paired intervals, readable tables."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from neurocl.cli.main import app
from neurocl.errors import UserError
from neurocl.trajectory import evaluation, evaluation_tables
from neurocl.trajectory.calibration import Calibration
from neurocl.trajectory.config import resolve
from neurocl.trajectory.evaluation import Thresholds, compared, default_horizons, evaluate, scores, thresholds_for
from neurocl.trajectory.forecaster import Forecaster, Networks, SamplingConfig, shape_for
from tests.conftest import reference
from tests.trajectory.scene_examples import walks
from tests.trajectory.small_run import SMALL, small_run

RADII = tuple(0.1 * step for step in range(1, 13))
CALIBRATION = Calibration(
    temperature=1.5,
    radius_50=RADII,
    radius_90=tuple(3 * radius for radius in RADII),
    num_forecasts=6,
    num_samples=60,
    steps=3,
    sampler="unmask",
    select="centroids",
    smoothing=0.5,
    num_agents=100,
    unit="m",
)
SAMPLING = SamplingConfig(steps=3)
HOW = {"num_forecasts": 6, "sampling": SAMPLING}


def test_scenes_forecast_side_by_side_are_alike_and_bounded_in_scenes_and_agents():
    many, few = walks(20, 100), walks(90, 5)
    for scenes, sizes in ((many, [7, 7, 6]), (few, [32, 32, 26])):
        rows = list(evaluation.alike(scenes, 32))
        assert [len(part) for part in rows] == sizes
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(len(scenes)))
    assert [len(part) for part in evaluation.alike(walks(2, 1000), 32)] == [1, 1]


class Perfect(Forecaster):
    """Every sample is what happens."""

    def draw(self, scenes, num_samples, sampling, generator):
        return scenes.future.expand(num_samples, *scenes.future.shape), scenes.target_mask


def small(kind=Forecaster, **options):
    torch.manual_seed(0)
    shape = shape_for(resolve("small", SMALL), walks())
    return kind(shape, Networks(shape), **options)


@pytest.fixture(scope="module")
def scenes():
    return walks(num_scenes=12, num_agents=4, seed=1)


@pytest.fixture(scope="module")
def found(scenes):
    torch.set_num_threads(1)  # as the tests have it: with more, k-means may round to other clusters
    forecaster = small(calibration=CALIBRATION)
    return evaluate(forecaster, scenes, train=walks(40, 4, seed=2), counts=(1, 3), **HOW)


def by_name(found):
    return {row.name: row for row in found.rows}


# the numbers of one forecaster


@pytest.mark.parametrize("name", ["metrics_0", "metrics_1", "metrics_2"])
def test_scores_are_those_of_the_reference(name):
    case = reference(f"trajectory/{name}")
    predicted, truth = torch.from_numpy(case["pred"]), torch.from_numpy(case["gt"])
    scene, half = torch.arange(len(truth)) // int(case["n_agents"]), truth.shape[1] // 2
    thresholds = Thresholds(miss=2.0, touch=0.1)
    row, _ = scores("one", predicted, truth, scene, thresholds=thresholds, horizons=(half,))
    keys = {
        "minADE": "minADE",
        "minFDE": "minFDE",
        "minJADE": "minJADE",
        "minJFDE": "minJFDE",
        "meanADE": "meanADE",
        "meanFDE": "meanFDE",
        "miss rate": "miss_rate_2.0",
        "NLL": "KDE_NLL",
        "diversity (APD)": "APD",
        "collisions": "collision_agent_rate_0.1",
        f"minADE@{half}": "minADE_half",
        f"minFDE@{half}": "minFDE_half",
    }
    for ours, theirs in keys.items():
        assert row.numbers[ours] == pytest.approx(float(np.mean(case[theirs])), rel=1e-5), ours


def test_scores_are_what_their_formulas_say():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(4, 10, 5, 2, generator=generator, dtype=torch.float64)
    truth = torch.randn(10, 5, 2, generator=generator, dtype=torch.float64)
    share = torch.rand(4, 10, generator=generator, dtype=torch.float64).softmax(dim=0)
    thresholds = Thresholds(miss=1.0, touch=None, field=(1.0, 2.0))
    row, each = scores("one", predicted, truth, torch.arange(10), thresholds=thresholds, probabilities=share)
    distance = np.linalg.norm(predicted.numpy() - truth.numpy(), axis=-1)
    best = distance[..., -1].argmin(axis=0)
    end = distance[..., -1].min(axis=0)
    x, y = predicted.numpy()[..., 0], predicted.numpy()[..., 1]
    expected = {
        "minADE": distance.mean(axis=-1).min(axis=0).mean(),
        "minFDE": end.mean(),
        "meanADE": distance.mean(),
        "meanFDE": distance[..., -1].mean(),
        "median minADE": np.median(distance.mean(axis=-1).min(axis=0)),
        "median minFDE": np.median(end),
        "minJADE": distance.mean(axis=-1).min(axis=0).mean(),  # scenes of one agent each
        "miss rate": (end > 1).mean(),
        "brier-minFDE": (end + (1 - share.numpy()[best, np.arange(10)]) ** 2).mean(),
        "off the field": ((x < 0) | (x > 1) | (y < 0) | (y > 2)).any(axis=-1).mean(),
    }
    for name, value in expected.items():
        assert row.numbers[name] == pytest.approx(value, rel=1e-12), name
    assert "collisions" not in row.numbers
    assert set(each) == set(row.intervals) == {"minADE", "minFDE", "minJADE", "minJFDE", "miss rate", "NLL"}
    for name, (low, high) in row.intervals.items():
        assert low <= row.numbers[name] <= high


# thresholds and horizons


@pytest.mark.parametrize(
    ("unit", "hz", "expected"),
    [
        ("m", 2.5, (2.0, 0.1)),
        ("ft", 2.5, (2.0 * 94 / 28, 0.1 * 94 / 28)),
        ("yd", 5.0, (2.0 / 0.9144, 0.1 / 0.9144)),
        ("m", 8.0, (0.5, 0.1)),  # a forecast of 1.5 s
        ("px", 2.5, (None, None)),
    ],
)
def test_thresholds_are_lengths_in_the_unit_of_the_scenes(scenes, unit, hz, expected):
    found = thresholds_for(replace(scenes, unit=unit, hz=hz))
    assert (found.miss, found.touch) == pytest.approx(expected)
    assert thresholds_for(replace(scenes, unit=unit, hz=hz), miss=7.5).miss == 7.5
    with pytest.raises(UserError, match="above 0, got 0"):
        thresholds_for(scenes, miss=0.0)


def test_a_field_is_known_for_both_sports(scenes):
    assert thresholds_for(replace(scenes, name="nba")).field == pytest.approx((28, 50 * 28 / 94))
    assert thresholds_for(replace(scenes, name="nba:rebound", unit="ft")).field == pytest.approx((94, 50))
    assert thresholds_for(replace(scenes, name="nfl")).field == pytest.approx((109.728, 48.768))
    assert thresholds_for(scenes).field is None


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("sdd", 12, (4, 8, 12)),
        ("eth-ucy:zara1", 12, (4, 8, 12)),
        ("nba", 20, (5, 10, 15, 20)),
        ("nfl", 16, (5, 10, 16)),
        ("nba:rebound", 12, (3, 6, 9, 12)),
        ("crowd", 12, (3, 6, 9, 12)),
        ("nba", 30, (8, 15, 22, 30)),
        ("walk.txt", 1, (1,)),
    ],
)
def test_horizons_are_those_of_the_papers_or_quarters(name, steps, expected):
    scenes = replace(walks(num_predicted=steps), name=name)
    assert default_horizons(scenes) == expected


# paired comparisons


def test_a_forecaster_less_itself_is_nothing_for_sure():
    values, scene = torch.rand(40), torch.arange(40) // 4
    assert compared("itself", values, values, scene) == ("itself", 0.0, 0.0, 0.0)
    assert not compared("itself", values, values, scene).clear


def test_a_difference_that_is_the_same_everywhere_has_no_spread():
    values, scene = torch.rand(40, dtype=torch.float64), torch.arange(40) // 4
    found = compared("other", values - 0.25, values, scene)
    assert found[1:] == pytest.approx((-0.25, -0.25, -0.25))
    assert found.clear


def test_turning_a_comparison_round_turns_its_interval_round():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(60, generator=generator).double(), torch.rand(60, generator=generator).double()
    scene = torch.arange(60) // 3
    there, back = compared("", one, other, scene), compared("", other, one, scene)
    assert (-back.difference, -back.high, -back.low) == pytest.approx(there[1:])
    assert there.difference == pytest.approx(float((one - other).mean()))


def test_pairing_sees_a_small_difference_that_two_intervals_hide():
    generator = torch.Generator().manual_seed(1)
    hard = 5 * torch.rand(100, generator=generator).double()
    scene = torch.arange(100)
    one, other = hard + 0.1 * torch.rand(100, generator=generator), hard + 0.1
    assert compared("", one, other, scene).high < 0
    apart = [evaluation.metrics.bootstrap(values, scene) for values in (one, other)]
    assert apart[0].high > apart[1].low


def test_the_interval_is_that_of_the_difference_of_means():
    generator = torch.Generator().manual_seed(2)
    one, other = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    found = compared("", one, other, torch.arange(400))
    error = float((one - other).std()) / 20
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


# a model beside baselines


def test_a_perfect_forecaster_makes_no_error_and_beats_everybody(scenes):
    found = evaluate(small(Perfect, calibration=CALIBRATION), scenes, train=walks(40, 4, seed=2), counts=(2,), **HOW)
    for row in found.rows[:2]:
        for name in ("minADE", "minFDE", "minJADE", "minJFDE", "meanADE", "median minADE", "miss rate", "minFDE@12"):
            assert row.numbers[name] == pytest.approx(0, abs=1e-6), name
        assert row.by_count[2]["minJFDE"] == pytest.approx(0, abs=1e-6)
        for name in ("minADE", "minFDE", "minJADE", "minJFDE", "NLL"):
            assert row.best_baseline[name].high < 0, name
    assert found.coverage == {"0.5": [1.0] * 12, "0.9": [1.0] * 12}
    table = evaluation_tables.main_table(found)
    assert {(0, column) for column in range(2, 6)} <= table.best or {
        (1, column) for column in range(2, 6)
    } <= table.best
    assert table.rows[-1][0] == "less best baseline"
    assert all(cell.startswith("-") and cell.endswith("*") for cell in table.rows[-1][2:6])


def test_scenes_of_different_sizes_keep_their_forecasts():
    scenes = walks(num_scenes=12, num_agents=4, seed=3)
    mask = torch.arange(4) < 1 + torch.randperm(12, generator=torch.Generator().manual_seed(0))[:, None] % 4
    uneven = replace(scenes, target_mask=mask)
    found = evaluation.draw_targets(small(Perfect), uneven, 6, SAMPLING, batch_size=5, counts=(2,))
    for predicted in (found.predicted, found.fewer[2]):
        torch.testing.assert_close(predicted, scenes.future[mask].expand_as(predicted))


def test_every_forecaster_is_compared_with_the_baseline_of_the_smallest_mean(found):
    models, baselines = found.rows[:2], found.rows[2:]
    assert [row.name for row in models] == ["model, 6 samples", "model, centroids"]
    for model in models:
        for metric, versus in model.best_baseline.items():
            smallest = min(row.numbers[metric] for row in baselines if metric in row.numbers)
            assert by_name(found)[versus.baseline].numbers[metric] == smallest
            assert versus.difference == pytest.approx(model.numbers[metric] - smallest, abs=1e-9)
            assert versus.low <= versus.difference <= versus.high
    assert all(not row.best_baseline for row in baselines)


def test_forecasts_of_a_row_are_those_that_the_forecaster_gives(found, scenes):
    forecaster = small(calibration=CALIBRATION)
    predicted = forecaster.forecast_scenes(scenes, 6, SAMPLING)
    error = (predicted.trajectories - scenes.future).norm(dim=-1)
    numbers = by_name(found)["model, centroids"].numbers
    assert numbers["minADE"] == pytest.approx(float(error.mean(dim=-1).amin(dim=0).mean()), rel=1e-5)
    end, best = error[..., -1].min(dim=0)
    share = predicted.probabilities.gather(0, best[None])[0]
    assert numbers["brier-minFDE"] == pytest.approx(float((end + (1 - share).square()).mean()), rel=1e-5)


def test_fewer_samples_are_the_first_ones_and_fewer_never_do_better(found, scenes):
    rows = by_name(found)
    first = small().forecast_scenes(scenes, 6, SAMPLING.model_copy(update={"select": "samples"})).trajectories[:1]
    error = (first - scenes.future).norm(dim=-1).mean()
    assert rows["model, 6 samples"].by_count[1]["minADE"] == pytest.approx(float(error), rel=1e-5)
    few, more = (rows["model, 6 samples"].by_count[count]["minADE"] for count in (1, 3))
    assert few >= more >= rows["model, 6 samples"].numbers["minADE"]
    assert rows["constant velocity"].by_count[1]["minADE"] == rows["constant velocity"].numbers["minADE"]


def test_asking_for_fewer_forecasts_too_changes_nothing_else(scenes):
    with_fewer = evaluate(small(calibration=CALIBRATION), scenes, counts=(1, 3), batch_size=5, **HOW)
    without = evaluate(small(calibration=CALIBRATION), scenes, batch_size=5, **HOW)
    assert [row.numbers for row in without.rows] == [row.numbers for row in with_fewer.rows]
    assert without.rows[0].by_count == {}


def test_reliability_tells_masses_and_tempered_probabilities_apart(found, scenes):
    assert set(found.reliability) == {"masses", "tempered"}
    for worth in found.reliability.values():
        assert len(worth.bins) == 10
        assert sum(count for _, _, count in worth.bins) == 6 * scenes.num_targets
        mean = sum(observed * count for _, observed, count in worth.bins) / (6 * scenes.num_targets)
        assert mean == pytest.approx(1 / 6)
        gap = sum(abs(predicted - observed) * count for predicted, observed, count in worth.bins)
        assert worth.error == pytest.approx(gap / (6 * scenes.num_targets))
        assert worth.log_loss > 0
    flat = small(calibration=CALIBRATION.model_copy(update={"temperature": 100.0}))
    assert evaluate(flat, scenes, **HOW).reliability["tempered"].log_loss == pytest.approx(math.log(6), rel=0.02)


def test_coverage_is_the_share_of_truths_within_the_radii(found, scenes):
    predicted = small().forecast_scenes(scenes, 6, SAMPLING).trajectories
    distance = (predicted - scenes.future).norm(dim=-1).amin(dim=0).flatten(0, 1)
    for level, factor in (("0.5", 1), ("0.9", 3)):
        expected = (distance <= factor * torch.tensor(RADII)).double().mean(dim=0)
        assert found.coverage[level] == pytest.approx(expected.tolist(), abs=0.011)


def test_without_a_calibration_that_fits_nothing_is_claimed(scenes):
    plain = evaluate(small(), scenes, **HOW)
    assert (set(plain.reliability), plain.coverage) == ({"masses"}, {})
    assert any("the run has no calibration" in note for note in plain.notes)
    joint = evaluate(
        small(calibration=CALIBRATION), scenes, num_forecasts=6, sampling=SamplingConfig(steps=3, joint=True)
    )
    assert any("the calibration is for other forecasts" in note for note in joint.notes)


def test_pixels_have_no_miss_rate_unless_a_distance_is_named(scenes):
    pixels = replace(scenes, unit="px")
    found = evaluate(small(), pixels, **HOW)
    assert "miss rate" not in found.rows[0].numbers
    assert "collisions" not in found.rows[0].numbers
    assert any("2 m have no meaning in px" in note for note in found.notes)
    assert "miss rate" in evaluate(small(), pixels, miss=50.0, **HOW).rows[0].numbers


def test_plain_samples_are_one_row(scenes):
    sampling = SamplingConfig(steps=3, select="samples")
    found = evaluate(small(), scenes, num_forecasts=3, sampling=sampling)
    assert [row.name for row in found.rows] == ["model, 3 samples"]
    assert found.reliability == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizons": (13,)}, "horizons must be from 1 to 12 steps, got 13"),
        ({"counts": (1, 7)}, "counts must be from 1 to 6, got 1, 7"),
        ({"miss": -1.0}, "above 0, got -1"),
    ],
    ids=["horizon", "count", "miss"],
)
def test_what_is_out_of_range_is_one_line(scenes, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(small(), scenes, **HOW, **options)


# what is written and shown


def test_the_files_hold_everything(found, tmp_path):
    found.write(tmp_path / "new" / "folder", evaluation_tables.markdown(found))
    document = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert document["schema"] == 1
    told = {"num_forecasts": 6, "num_samples": 60, "steps": 3, "seed": 0, "select": "centroids", "unit": "m", "miss": 2}
    assert told.items() <= document["settings"].items()
    assert {"device", "threads"} <= document["settings"]["machine"].keys()
    assert {"neurocl", "torch"} <= document["settings"]["versions"].keys()
    assert document["horizons"] == [3, 6, 9, 12]
    assert len(document["rows"]) == len(found.rows) == 10
    model = document["rows"][1]
    assert set(model["best_baseline"]["minADE"]) == {"baseline", "difference", "low", "high", "clear"}
    assert model["scenes_per_second"] == pytest.approx(1000 / model["milliseconds"])
    assert set(model["by_count"]) == {"1", "3"}
    assert document["coverage"].keys() == {"0.5", "0.9"}
    page = (tmp_path / "new" / "folder" / "evaluation.md").read_text()
    for row in found.rows:
        assert row.name in page
    for words in ("less best baseline", "by horizon", "Calibration", "Radii of 90%", "A miss: "):
        assert words in page


def test_the_best_of_every_column_stands_out(found):
    table = evaluation_tables.main_table(found)
    for index, metric in enumerate(evaluation.COMPARED):
        values = [row.numbers.get(metric, math.inf) for row in found.rows]
        assert (values.index(min(values)), index + 2) in table.best
    assert f"**{table.rows[min(row for row, column in table.best if column == 2)][2]}**" in table.markdown()


def test_tables_fit_a_terminal_of_80_columns(found):
    wide = replace(
        found, rows=[replace(row, numbers={k: 97 * v for k, v in row.numbers.items()}) for row in found.rows]
    )
    for shown in (found, wide):
        for table in (
            evaluation_tables.main_table(shown, short=True),
            evaluation_tables.horizon_table(shown, short=True),
            evaluation_tables.count_table(shown, short=True),
        ):
            widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
            assert sum(widths) + len(widths) - 1 <= 80
    lines = [*evaluation_tables.summary(found), *evaluation_tables.verdicts(found)]
    assert all(len(line) <= 80 for line in [*lines, *evaluation_tables.calibration_lines(found)])


def test_every_number_is_in_the_table_for_spreadsheets(found):
    table = evaluation_tables.every_number(found)
    for row, cells in zip(found.rows, table.rows, strict=True):
        values = dict(zip(table.header, cells, strict=True))
        assert {name: float(values[name]) for name in row.numbers} == pytest.approx(row.numbers, rel=1e-8)
        assert float(values["minADE low"]) == pytest.approx(row.intervals["minADE"][0], rel=1e-8)


# the command


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """``neurocl trajectory evaluate`` on a small run, in a terminal of 80 columns."""
    run = small_run(tmp_path_factory.mktemp("small"))

    def call(*words):
        how = ("--num-samples", "4", "--steps", "2", "--max-scenes", "4", "--threads", "1")
        arguments = ["trajectory", "evaluate", str(run), *how, *map(str, words)]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})

    return call


def test_the_command_prints_rows_of_one_line_each(command):
    lines = command("--horizons", "--counts", "1,2").stdout.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    for start in ("model, 4 samples", "model, centroids", "CV + velocity noise", "neighbours + k-means"):
        assert sum(line.startswith(f"{start} ") for line in lines) == 3, start
    told = "\n".join(lines)
    for words in ("less best baseline", "walk.txt: 4 scenes", "4 centroids of 40 samples", "by horizon", "1 thread"):
        assert words in told


def test_the_command_writes_files_once(command, tmp_path):
    first = command("--no-baselines", "--out", tmp_path / "ev", "--seed", "3", "--miss-distance", "0.7")
    assert first.exit_code == 0
    settings = json.loads((tmp_path / "ev" / "evaluation.json").read_text())["settings"]
    assert (settings["seed"], settings["miss"], settings["split"]) == (3, 0.7, "test")
    before = (tmp_path / "ev" / "evaluation.json").read_bytes()
    again = command("--out", tmp_path / "ev")
    assert isinstance(again.exception, UserError)
    assert "holds an evaluation already" in str(again.exception)
    assert (tmp_path / "ev" / "evaluation.json").read_bytes() == before


def test_counts_that_are_no_numbers_are_one_line(command):
    result = command("--counts", "1;5")
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == "--counts expects whole numbers such as 1,5,10, got '1;5'"
