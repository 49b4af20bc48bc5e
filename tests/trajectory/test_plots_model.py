"""Pictures of a forecaster: bars that equal the codes, errors that equal the metrics, curves that equal the log."""

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory import metrics, plots_model
from neurocl.trajectory.baselines import ConstantVelocity, target_tracks
from neurocl.trajectory.forecaster import Forecaster, Networks, SamplingConfig, Shape
from neurocl.trajectory.vqvae import VqVaeConfig
from tests.trajectory.scene_examples import padded, trunk, walks

NUM_CODES = 8


@pytest.fixture(scope="module")
def forecaster():
    """An untrained small one; pictures are as true of it as of a good one."""
    torch.manual_seed(0)
    config = VqVaeConfig(width=16, heads=2, hidden=16, num_codes=NUM_CODES, rank=2, dropout=0.0)
    shape = Shape(config, trunk(context_width=16, width=16, heads=2, hidden=16), "diffusion", 10, "m", 2.5)
    return Forecaster(shape, Networks(shape))


RECORDS = [
    {"stage": "codes", "step": 5, "reconstruction": 2.0, "codebook": 0.5, "val_reconstruction_ade": 1.5},
    {"stage": "codes", "step": 10, "reconstruction": 1.0, "codebook": 0.2, "val_reconstruction_ade": 0.9},
    {"stage": "codes", "step": 15, "reconstruction": 0.9, "codebook": 0.1, "val_reconstruction_ade": 1.0},
    {"stage": "prior", "step": 4, "prior": 3.0, "val_min_ade": 1.2},
    {"stage": "prior", "step": 8, "prior": 2.0, "val_min_ade": 1.1},
]


def test_learning_curves_are_the_numbers_of_the_log():
    figure = plots_model.learning_figure(RECORDS, unit="m", fading=(3, 8))
    codes, prior, losses, _ = figure.axes
    np.testing.assert_allclose(codes.lines[0].get_xydata(), [(5, 1.5), (10, 0.9), (15, 1.0)])
    np.testing.assert_allclose(prior.lines[0].get_xydata(), [(4, 1.2), (8, 1.1)])
    assert "lowest 0.9 m at step 10" in codes.get_title()
    drawn = {line.get_label(): line.get_ydata() for line in losses.lines}
    np.testing.assert_allclose(drawn["reconstruction"], [2.0, 1.0, 0.9])
    np.testing.assert_allclose(drawn["codebook"], [0.5, 0.2, 0.1])


def test_a_run_in_its_first_stage_has_one_column_and_one_that_measured_nothing_is_refused():
    assert len(plots_model.learning_figure(RECORDS[:2]).axes) == 2
    with pytest.raises(UserError, match="nothing was measured yet"):
        plots_model.learning_figure([])


def test_bars_are_how_often_the_codes_stand_for_true_futures(forecaster):
    scenes = walks(num_scenes=5, num_agents=4)
    counts = plots_model.code_use(forecaster, scenes, batch_size=2)
    indices, _ = forecaster.networks.vqvae.indices(scenes)
    expected = np.bincount(indices.flatten().numpy(), minlength=NUM_CODES)
    figure = plots_model.code_use_figure(counts)
    assert [bar.get_height() for bar in figure.axes[0].patches] == expected.tolist()
    share = expected[expected > 0] / expected.sum()
    perplexity = np.exp(-(share * np.log(share)).sum())
    assert f"perplexity {perplexity:.1f} of 8 codes" in figure.axes[0].get_title()


def test_only_agents_that_metrics_count_use_codes(forecaster):
    scenes = walks(num_scenes=3, num_agents=4)
    torch.testing.assert_close(
        plots_model.code_use(forecaster, padded(scenes, 2)), plots_model.code_use(forecaster, scenes)
    )
    scenes.target_mask[:, 2:] = False
    assert plots_model.code_use(forecaster, scenes).sum() == 3 * 2 * 12


def test_equal_use_has_the_perplexity_of_the_number_of_codes_and_unused_codes_are_told():
    for counts, title in (
        ([3.0] * 6, "perplexity 6.0 of 6 codes"),
        ([4.0, 0.0, 4.0, 0.0], "perplexity 2.0 of 4 codes, 2 never used"),
    ):
        assert plots_model.code_use_figure(torch.tensor(counts)).axes[0].get_title() == title


def test_the_meaning_of_a_code_is_what_the_decoder_makes_of_it_at_every_step(forecaster):
    scenes = walks(num_scenes=1, num_agents=3)
    view = plots_model.codebook_view(forecaster, scenes, num_agents=3)
    vqvae = forecaster.networks.vqvae
    context = vqvae.encode_context(scenes)
    order = (scenes.past[0, :, 1:] - scenes.past[0, :, :-1]).norm(dim=-1).mean(dim=1).argsort()
    torch.testing.assert_close(view.books, context.codebook[0, order].double())
    for code in (0, NUM_CODES - 1):
        moves = vqvae.decode_indices(torch.full((1, 1, 3, 12), code), context)[0, 0, order]
        # Turned into the heading frame, distances stay; the networks compute in float32.
        torch.testing.assert_close(view.ways[:, code].norm(dim=-1).float(), moves.norm(dim=-1))
    # In that frame the last step of everybody leads along x to the origin.
    torch.testing.assert_close(view.pasts[:, -1], torch.zeros(3, 2, dtype=torch.float64))
    assert (view.pasts[:, -2, 0] < 0).all()
    assert view.pasts[:, -2, 1].abs().max() < 1e-6
    assert (view.speeds.diff() >= 0).all()


def test_without_the_instance_part_all_agents_have_the_static_codes():
    config = VqVaeConfig(width=16, heads=2, hidden=16, num_codes=NUM_CODES, rank=0, code_dim=1, dropout=0.0)
    shape = Shape(config, trunk(context_width=16, width=16, heads=2, hidden=16), "diffusion", 10, "m", 2.5)
    view = plots_model.codebook_view(Forecaster(shape, Networks(shape)), walks())
    torch.testing.assert_close(view.books, view.static.expand_as(view.books))
    plots_model.codebook_figure(view)  # codes of one number have no second component


@pytest.mark.parametrize("num_agents", [1, 3, 4])
def test_the_codebook_picture_has_every_code_of_every_agent(forecaster, num_agents):
    view = plots_model.codebook_view(forecaster, walks(), num_agents=num_agents)
    figure = plots_model.codebook_figure(view)
    plane = figure.subfigs[0].axes[0]
    dots = [line for line in plane.lines if line.get_label().startswith("agent at")]
    assert [len(line.get_xdata()) for line in dots] == [NUM_CODES] * num_agents
    shown = [axes for axes in figure.subfigs[1].axes if axes.get_title().startswith("agent at")]
    for index, axes in enumerate(shown):
        ends = {tuple(line.get_xydata()[-1].round(6)) for line in axes.lines if len(line.get_xdata()) == 13}
        assert ends == {tuple(end) for end in view.ways[index, :, -1].numpy().round(6)}
    assert len(shown) == num_agents


def test_horizon_errors_end_at_the_metrics_of_the_whole_forecast():
    scenes = walks(num_scenes=6)
    past, truth = target_tracks(scenes)
    predicted = ConstantVelocity(12, heading_noise=25.0).forecast(past, 5, torch.Generator().manual_seed(0))
    found = plots_model.horizon_errors("cv", predicted, truth)
    assert found.min_ade[-1] == pytest.approx(float(metrics.min_ade(predicted, truth).mean()))
    assert found.min_fde[-1] == pytest.approx(float(metrics.min_fde(predicted, truth).mean()))
    assert found.min_ade[0] == pytest.approx(found.min_fde[0])
    distance = (predicted - truth).norm(dim=-1)
    np.testing.assert_allclose(found.min_fde, distance.min(dim=0).values.mean(dim=0), rtol=1e-12)


def test_horizons_of_model_and_baselines_come_from_the_same_scenes(forecaster):
    scenes, train = walks(num_scenes=4), walks(num_scenes=60, seed=1)
    rows = plots_model.measure_horizons(
        forecaster, scenes, train, num_forecasts=4, sampling=SamplingConfig(select="samples", steps=2)
    )
    assert [row.name for row in rows] == ["model, 4 samples", "constant velocity", "ridge + anchors, 4 forecasts"]
    past, truth = target_tracks(scenes)
    plain = ConstantVelocity(12).forecast(past, 1, torch.Generator())[0]
    np.testing.assert_allclose(rows[1].min_fde, (plain - truth).norm(dim=-1).mean(dim=0), rtol=1e-9)
    figure = plots_model.horizon_figure(rows, hz=2.5, unit="m")
    for row, line in zip(rows, figure.axes[1].lines, strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, 13) / 2.5)
        np.testing.assert_allclose(line.get_ydata(), row.min_fde)
