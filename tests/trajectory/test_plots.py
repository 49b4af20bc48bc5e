"""Pictures of forecasts: lines where the forecasts are, as strong as they are likely."""

import numpy as np
import pytest
import torch
from PIL import Image

from neurocl.errors import RunError, UserError
from neurocl.trajectory import plots
from neurocl.trajectory.fields import field
from neurocl.trajectory.plots_canvas import LEAST_SPAN_METRES
from neurocl.trajectory.scenes import Forecast


def example(num_agents=3, num_forecasts=5, num_predicted=6, unit="m", seed=0):
    """A forecast, the past it starts from and a truth, of agents on noisy walks."""
    generator = torch.Generator().manual_seed(seed)
    past = torch.randn(num_agents, 4, 2, generator=generator).cumsum(dim=1)
    moves = torch.randn(num_forecasts + 1, num_agents, num_predicted, 2, generator=generator)
    ways = past[:, -1:] + moves.cumsum(dim=2)
    share = torch.rand(num_forecasts, num_agents, generator=generator)
    names = tuple(f"a{index}" for index in range(num_agents))
    return Forecast(ways[1:], share / share.sum(dim=0), names, 2.5, unit), past, ways[0]


def lines_of(figure):
    """All segments of the line collections of the first panel, with their colours."""
    from matplotlib.collections import LineCollection

    found = []
    for collection in figure.axes[0].collections:
        if isinstance(collection, LineCollection):
            colors = collection.get_colors()
            for index, segment in enumerate(collection.get_segments()):
                found.append((segment, tuple(colors[index % len(colors)])))
    return found


def has_line(lines, points):
    return any(segment.shape == points.shape and np.allclose(segment, points) for segment, _ in lines)


@pytest.mark.parametrize("num_agents", [1, 3, 23])
def test_every_forecast_is_a_line_from_the_last_seen_place_through_its_positions(num_agents):
    forecast, past, truth = example(num_agents)
    lines = lines_of(plots.forecast_figure(forecast, past, truth=truth))
    for agent in range(num_agents):
        for way in (*forecast.trajectories[:, agent], truth[agent]):
            assert has_line(lines, torch.cat([past[agent, -1:], way]).double().numpy())


def test_the_likelier_forecast_is_the_stronger_line():
    forecast, past, _ = example(num_agents=2)
    alphas = {}
    for segment, color in lines_of(plots.forecast_figure(forecast, past)):
        alphas[tuple(segment[-1].round(4))] = color[3]
    for agent in range(2):
        ends = [tuple(end.double().numpy().round(4)) for end in forecast.trajectories[:, agent, -1]]
        order = forecast.probabilities[:, agent].argsort()
        strengths = [alphas[ends[index]] for index in order]
        assert strengths == sorted(strengths)
        assert 0 < strengths[0] < strengths[-1] <= 1


def test_a_gap_in_the_past_is_left_open_and_futures_begin_where_the_agent_was_last_seen():
    forecast, past, _ = example(num_agents=1)
    past[0, 3] = torch.nan
    figure = plots.forecast_figure(forecast, past)
    assert all(np.allclose(segment[0], past[0, 2]) for segment, _ in lines_of(figure))
    (track,) = (line for line in figure.axes[0].lines if len(line.get_xdata()) == 4)
    np.testing.assert_array_equal(np.isnan(track.get_xdata()), [False, False, False, True])


def test_teams_have_colours_and_agents_of_one_kind_have_their_own():
    forecast, past, _ = example(num_agents=3)
    teams = plots.forecast_figure(forecast, past, kinds=["home", "visitor", "home"])
    apart = plots.forecast_figure(forecast, past, kinds=["pedestrian"] * 3)

    def colors(figure):
        return {
            tuple(past[agent, -1].tolist()): {
                color[:3] for segment, color in lines_of(figure) if np.allclose(segment[0], past[agent, -1])
            }
            for agent in range(3)
        }

    first, second, third = colors(teams).values()
    assert first == third != second
    assert len({color for found in colors(apart).values() for color in found}) == 3
    labels = [text.get_text() for text in teams.legends[0].get_texts()]
    assert "5 forecasts, visitor" in labels


def test_everything_forecast_lies_within_the_limits_and_far_neighbours_do_not_widen_them():
    forecast, past, truth = example()
    near = plots.forecast_figure(forecast, past, truth=truth).axes[0]
    far = torch.full((1, 4, 2), 1000.0)
    same = plots.forecast_figure(forecast, past, truth=truth, neighbours=far).axes[0]
    assert (near.get_xlim(), near.get_ylim()) == (same.get_xlim(), same.get_ylim())
    points = torch.cat([forecast.trajectories.reshape(-1, 2), past.reshape(-1, 2), truth.reshape(-1, 2)])
    for axis, (low, high) in enumerate((near.get_xlim(), near.get_ylim())):
        assert low < points[:, axis].min()
        assert points[:, axis].max() < high


def test_who_stands_still_is_not_magnified_and_pixels_count_downwards():
    past = torch.zeros(1, 4, 2)
    still = Forecast(torch.zeros(2, 1, 3, 2), torch.full((2, 1), 0.5), ("a",), 2.5, "m")
    axes = plots.forecast_figure(still, past).axes[0]
    assert np.ptp(axes.get_xlim()) >= LEAST_SPAN_METRES
    forecast, past, _ = example(unit="px")
    top_first = plots.forecast_figure(forecast, past).axes[0].get_ylim()
    assert top_first[0] > top_first[1]


def test_a_field_lies_below_and_is_seen_in_its_whole_width():
    forecast, past, _ = example()
    court = field("nba", "m")
    axes = plots.forecast_figure(forecast, past + 7, field=court).axes[0]
    low, high = axes.get_ylim()
    assert low < 0
    assert high > court.size[1]
    (ground,) = axes.patches
    assert (ground.get_width(), ground.get_height()) == pytest.approx(court.size)


@pytest.mark.parametrize("num_agents", [2, 23])
def test_names_do_not_overlap(num_agents):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    forecast, past, _ = example(num_agents)
    figure = plots.forecast_figure(forecast, past)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) >= min(num_agents, 10)
    assert {text.get_text() for text in figure.axes[0].texts} <= set(forecast.agents)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_an_animation_has_a_frame_for_now_and_one_for_every_step(tmp_path):
    forecast, past, truth = example(num_predicted=6)
    plots.animate_forecast(forecast, past, tmp_path / "walk.gif", truth=truth, fps=5)
    with Image.open(tmp_path / "walk.gif") as moving:
        assert moving.n_frames == 6 + 1
        frames = []
        for index in range(moving.n_frames):
            moving.seek(index)
            assert moving.info["duration"] == 200
            frames.append(np.asarray(moving.convert("L"), dtype=np.int64))
    # Futures only grow, so every frame has more ink than the one before.
    ink = [(255 - frame).sum() for frame in frames]
    assert ink == sorted(ink)
    assert [path.name for path in tmp_path.iterdir()] == ["walk.gif"]


def test_growing_the_futures_shows_their_first_steps():
    forecast, past, truth = example(num_agents=1, num_forecasts=1)
    scene = plots._Scene(forecast, past, truth=truth, title="walk", moving=True)
    for steps in (0, 2, 6):
        scene.show(steps)
        expected = torch.cat([past[0, -1:], forecast.trajectories[0, 0, :steps]])
        np.testing.assert_allclose(scene.lines.get_segments()[0], expected, rtol=1e-6)
        assert scene.axes.get_title() == f"walk   + {steps / 2.5:.1f} s"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_picture_is_the_same_bytes(tmp_path, suffix):
    forecast, past, truth = example()
    for name in ("first", "second"):
        plots.draw_forecast(forecast, past, tmp_path / f"{name}{suffix}", truth=truth, title="walk")
    assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()


def test_files_of_another_kind_are_refused_before_anything_is_drawn(tmp_path):
    forecast, past, _ = example()
    with pytest.raises(UserError, match=r"\.png, \.svg or \.pdf"):
        plots.draw_forecast(forecast, past, tmp_path / "walk.bmp")
    with pytest.raises(UserError, match=r"\.gif or \.mp4"):
        plots.animate_forecast(forecast, past, tmp_path / "walk.avi")


def test_a_picture_that_cannot_be_written_is_one_clear_error(tmp_path):
    forecast, past, _ = example()
    for name in ("walk.png", "walk.gif"):
        draw = plots.draw_forecast if name.endswith("png") else plots.animate_forecast
        with pytest.raises(RunError, match=f"cannot write .*{name}"):
            draw(forecast, past, tmp_path / "missing" / name)
