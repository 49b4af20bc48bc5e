"""Heat maps of samples: they keep their mass, lie where the samples are, and are told for the right times."""

import numpy as np
import pytest
import torch

from neurocl.trajectory import plots_density


def test_a_density_map_adds_up_to_the_agents():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 3, 2, generator=generator)
    box = np.array([[-12.0, 12.0], [-8.0, 8.0]])
    grid = plots_density.density_map(points, box, width=0.5, cells=120)
    assert grid.shape == (80, 120)
    assert grid.sum() * (24 / 120) ** 2 == pytest.approx(3, rel=1e-6)


def test_a_density_map_of_one_place_is_a_gaussian_around_it():
    box = np.array([[0.0, 6.0], [0.0, 6.0]])
    grid = plots_density.density_map(torch.tensor([[[2.0, 4.0]]]), box, width=0.5, cells=240)
    row, column = np.unravel_index(grid.argmax(), grid.shape)
    assert (column * 6 / 240, row * 6 / 240) == pytest.approx((2.0, 4.0), abs=0.03)
    assert grid.max() == pytest.approx(1 / (2 * np.pi * 0.25), rel=1e-2)


def test_the_density_picture_shows_three_times_and_where_agents_were_then():
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(2, 4, 2, generator=generator).cumsum(dim=1)
    ways = past[:, -1:] + torch.randn(51, 2, 6, 2, generator=generator).cumsum(dim=2)
    samples, truth = ways[1:], ways[0]
    figure = plots_density.density_figure(samples, past, hz=2.5, unit="m", truth=truth, title="walk")
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["after 0.8 s", "after 1.6 s", "after 2.4 s"]
    for axes, step in zip(panels, (2, 4, 6), strict=True):
        (cross,) = (line for line in axes.lines if line.get_marker() == "x")
        np.testing.assert_allclose(np.stack(cross.get_data(), axis=1), truth[:, step - 1], rtol=1e-6)
