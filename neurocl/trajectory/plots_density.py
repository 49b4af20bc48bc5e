"""Where agents may be, as a heat map of many samples.

``N`` samples, ``A`` agents, ``B`` others around, ``T_o`` and ``T_p`` observed and predicted steps, ``M`` numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from neurocl.trajectory.plots_canvas import (
    NEIGHBOUR,
    PALETTE,
    PAST,
    Floats,
    draw_frame,
    draw_legend,
    draw_tracks,
    empty_figure,
    legend_entry,
    limits,
    span,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurocl.trajectory.fields import Field


def density_figure(
    samples: torch.Tensor,
    past: torch.Tensor,
    *,
    hz: float,
    unit: str,
    neighbours: torch.Tensor | None = None,
    truth: torch.Tensor | None = None,
    field: Field | None = None,
    title: str = "",
) -> Figure:
    """Where agents may be after a third, two thirds and all of the predicted time: a map of many samples.

    Args:
        samples: sampled futures, [N, A, T_p, 2].
        past: observed positions, [A, T_o, 2]; NaN where an agent was not seen.
        hz: steps per second.
        unit: of the positions.
        neighbours: others that were seen, [B, T_o, 2].
        truth: true futures, [A, T_p, 2]; a cross shows where the agents were at that time.
        field: court or field below, in the same unit.
        title: above the picture.
    """
    from matplotlib.colors import LogNorm

    last = samples.shape[2]
    steps = sorted({max(1, round(last * part / 3)) for part in (1, 2, 3)})
    box = limits(unit, field, samples, past, truth)
    # The ends of the samples say how fine the map can be: Silverman's factor times their spread.
    spread = float(samples[:, :, -1].double().std(dim=0, correction=0).mean())
    width = max(0.9 * spread * len(samples) ** -0.2, 0.01 * span(box))
    maps = {step: density_map(samples[:, :, step - 1], box, width) for step in steps}
    highest = max(float(grid.max()) for grid in maps.values())
    figure = empty_figure(box, panels=len(steps))
    panels = figure.subplots(1, len(steps), sharex=True, sharey=True, squeeze=False)[0]
    for axes, step in zip(panels, steps, strict=True):
        picture = axes.imshow(
            np.ma.masked_less(maps[step], highest / 300),
            extent=(*box[0], *box[1]),
            origin="lower",
            cmap="YlGnBu",
            norm=LogNorm(highest / 300, highest),
            zorder=1,
            alpha=0.9,
        )
        draw_tracks(axes, neighbours, NEIGHBOUR, zorder=2)
        draw_tracks(axes, past, PAST, zorder=3)
        if truth is not None:
            there = truth[:, step - 1].numpy()
            axes.plot(there[:, 0], there[:, 1], "x", color=PALETTE[1], markersize=6, markeredgewidth=1.6, zorder=4)
        draw_frame(axes, box, unit, field)
        axes.set_title(f"after {step / hz:.1f} s", fontsize=9)
        axes.label_outer()
    figure.colorbar(picture, ax=panels, label=f"agents per {unit}$^2$", fraction=0.05, pad=0.01)
    handles = [legend_entry(color=PAST, marker="o", markersize=3, label="observed")]
    if truth is not None:
        handles.append(legend_entry(color=PALETTE[1], marker="x", linestyle="none", label="what happened"))
    if neighbours is not None and len(neighbours):
        handles.append(legend_entry(color=NEIGHBOUR, label="others"))
    draw_legend(figure, handles)
    figure.suptitle(title, fontsize=10)
    return figure


def density_map(points: torch.Tensor, box: Floats, width: float, cells: int = 240) -> Floats:
    """Expected number of agents per area, from samples of where each is; [rows, columns], y upwards.

    A Gaussian of standard deviation ``width`` is laid on every sample; over the whole plane the map adds up to A.

    Args:
        points: samples of positions, [N, A, 2].
        box: from and to in x and in y, [2, 2].
        width: of the Gaussians, in the unit of the points.
        cells: along the longer side.
    """
    sides = box[:, 1] - box[:, 0]
    size = float(sides.max()) / cells
    edges = [box[axis, 0] + size * np.arange(max(1, round(sides[axis] / size)) + 1) for axis in range(2)]
    flat = points.reshape(-1, 2).double().numpy()
    # The Gaussian is a product of one in x and one in y, integrated over the cells of each axis.
    along = [_shares(flat[:, axis], edges[axis], width) for axis in range(2)]
    grid: Floats = along[1].T @ along[0] / len(points) / size**2
    return grid


def _shares(values: Floats, edges: Floats, width: float) -> Floats:
    """Share of a Gaussian around each value [M] that lies between neighbouring edges, [M, edges - 1]."""
    below = torch.special.ndtr(torch.from_numpy((edges[None] - values[:, None]) / width)).numpy()
    return np.diff(below, axis=1)
