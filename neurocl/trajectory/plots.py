"""Pictures of forecasts: one scene still, and the same as an animation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from neurocl.errors import UserError
from neurocl.trajectory.scenes import Forecast

PAST, TRUTH, NEIGHBOUR = "0.15", "tab:green", "0.65"


def draw_forecast(
    forecast: Forecast,
    past: torch.Tensor,
    path: Path,
    *,
    neighbours: torch.Tensor | None = None,
    truth: torch.Tensor | None = None,
    title: str = "",
) -> None:
    """Past, possible futures (the likelier, the darker) and, if it is known, what happened, as PNG, SVG or PDF.

    Args:
        forecast: of A agents.
        past: observed positions, [A, T_o, 2]; NaN where an agent was not seen.
        path: of the picture.
        neighbours: others that were seen, [B, T_o, 2].
        truth: true futures, [A, T_p, 2].
        title: above the picture.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 6))
    _background(axes, forecast, past, neighbours)
    colors = plt.get_cmap("tab10").colors
    for agent in range(forecast.trajectories.shape[1]):
        color = colors[agent % len(colors)]
        _futures(axes, forecast, past, agent, color, forecast.trajectories.shape[2])
        if truth is not None:
            way = np.vstack([_last(past[agent]), truth[agent].numpy()])
            axes.plot(way[:, 0], way[:, 1], color=TRUTH, linewidth=1.6, linestyle="--", zorder=4)
    handles = [
        plt.Line2D([], [], color=PAST, marker="o", markersize=3, label="observed"),
        plt.Line2D([], [], color=colors[0], alpha=0.6, label=f"{len(forecast.trajectories)} forecasts"),
    ]
    if truth is not None:
        handles.append(plt.Line2D([], [], color=TRUTH, linestyle="--", label="what happened"))
    if neighbours is not None and len(neighbours):
        handles.append(plt.Line2D([], [], color=NEIGHBOUR, label="others"))
    axes.legend(handles=handles, fontsize=8, loc="best")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=140, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def animate_forecast(
    forecast: Forecast, past: torch.Tensor, path: Path, *, neighbours: torch.Tensor | None = None, fps: int = 5
) -> None:
    """The forecast growing step by step, as GIF, or as MP4 where ffmpeg is installed.

    Raises:
        UserError: another kind of file, or MP4 without ffmpeg.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise UserError(f"{path}: an animation is a .gif or .mp4 file")
    plt = _pyplot()
    from matplotlib import animation

    if path.suffix == ".mp4" and not animation.FFMpegWriter.isAvailable():
        raise UserError(f"{path}: writing mp4 needs ffmpeg; choose a .gif file")
    figure, axes = plt.subplots(figsize=(6, 5))
    colors = plt.get_cmap("tab10").colors
    span = _bounds(forecast, past, neighbours)

    def frame(steps: int) -> list[Any]:
        axes.clear()
        _background(axes, forecast, past, neighbours)
        for agent in range(forecast.trajectories.shape[1]):
            _futures(axes, forecast, past, agent, colors[agent % len(colors)], steps)
        axes.set_xlim(*span[0])
        axes.set_ylim(*span[1])
        axes.set_title(f"+ {steps / forecast.hz:.1f} s", fontsize=10)
        return []

    moving = animation.FuncAnimation(figure, frame, frames=forecast.trajectories.shape[2] + 1, blit=False)
    writer = animation.PillowWriter(fps=fps) if path.suffix == ".gif" else animation.FFMpegWriter(fps=fps)
    moving.save(path, writer=writer, dpi=90)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _last(track: torch.Tensor) -> Any:
    seen = torch.isfinite(track).all(dim=-1).nonzero()
    return track[int(seen[-1])].numpy()[None]


def _background(axes: Any, forecast: Forecast, past: torch.Tensor, neighbours: torch.Tensor | None) -> None:
    for track in neighbours if neighbours is not None else ():
        axes.plot(track[:, 0], track[:, 1], color=NEIGHBOUR, linewidth=1, zorder=1)
    for track in past:
        axes.plot(track[:, 0], track[:, 1], color=PAST, marker="o", markersize=2.5, linewidth=1.4, zorder=3)
    axes.set_aspect("equal")
    axes.set_xlabel(f"x in {forecast.unit}")
    axes.set_ylabel(f"y in {forecast.unit}")
    axes.spines[["top", "right"]].set_visible(False)


def _futures(axes: Any, forecast: Forecast, past: torch.Tensor, agent: int, color: Any, steps: int) -> None:
    share = forecast.probabilities[:, agent]
    strongest = float(share.max()) or 1.0
    for index, way in enumerate(forecast.trajectories[:, agent, :steps].numpy()):
        line = np.vstack([_last(past[agent]), way])
        alpha = 0.12 + 0.75 * float(share[index]) / strongest
        axes.plot(line[:, 0], line[:, 1], color=color, alpha=alpha, linewidth=1.2, zorder=2)
        if steps:
            axes.plot(line[-1:, 0], line[-1:, 1], ".", color=color, alpha=alpha, markersize=4, zorder=2)


def _bounds(forecast: Forecast, past: torch.Tensor, neighbours: torch.Tensor | None) -> list[tuple[float, float]]:
    parts = [forecast.trajectories.reshape(-1, 2), past.reshape(-1, 2)]
    if neighbours is not None:
        parts.append(neighbours.reshape(-1, 2))
    points = torch.cat(parts)
    points = points[torch.isfinite(points).all(dim=1)]
    low, high = points.min(dim=0).values, points.max(dim=0).values
    pad = 0.05 * float((high - low).max()) + 1e-6
    return [(float(low[axis]) - pad, float(high[axis]) + pad) for axis in range(2)]
