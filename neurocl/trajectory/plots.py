"""Pictures of forecasts: a scene still and moving.

``K`` forecasts, ``A`` agents, ``B`` others around, ``T_o`` and ``T_p`` observed and predicted steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import torch

from neurocl.errors import UserError
from neurocl.trajectory.plots_canvas import (
    NEIGHBOUR,
    PALETTE,
    PAST,
    TRUTH,
    Floats,
    check_form,
    draw_frame,
    draw_legend,
    draw_tracks,
    empty_figure,
    legend_entry,
    limits,
    replace_whole,
    save_figure,
)
from neurocl.trajectory.scenes import Forecast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurocl.trajectory.fields import Field

KIND_COLORS = {
    "home": PALETTE[0],
    "offence": PALETTE[0],
    "visitor": PALETTE[1],
    "defence": PALETTE[1],
    "ball": PALETTE[2],
    "pedestrian": PALETTE[0],
    "cyclist": PALETTE[1],
    "vehicle": PALETTE[2],
    "other": PALETTE[3],
}
MOST_NAMES = 30


class SceneOptions(TypedDict, total=False):
    """What else than forecasts and past a picture of a scene shows, see :func:`forecast_figure`."""

    neighbours: torch.Tensor | None
    truth: torch.Tensor | None
    kinds: Sequence[str]
    field: Field | None
    title: str


def forecast_figure(
    forecast: Forecast,
    past: torch.Tensor,
    *,
    neighbours: torch.Tensor | None = None,
    truth: torch.Tensor | None = None,
    kinds: Sequence[str] = (),
    field: Field | None = None,
    title: str = "",
) -> Figure:
    """Past, possible futures (the likelier, the stronger) and, if it is known, what happened.

    Args:
        forecast: of A agents.
        past: observed positions, [A, T_o, 2]; NaN where an agent was not seen.
        neighbours: others that were seen, [B, T_o, 2].
        truth: true futures, [A, T_p, 2]; NaN where they are not known.
        kinds: what the agents are, see :data:`neurocl.trajectory.scenes.KINDS`; if they differ, they give the colours.
        field: court or field below, in the unit of the forecast.
        title: above the picture.
    """
    return _Scene(
        forecast, past, neighbours=neighbours, truth=truth, kinds=kinds, field=field, title=title, moving=False
    ).figure


def draw_forecast(forecast: Forecast, past: torch.Tensor, path: Path, **options: Unpack[SceneOptions]) -> None:
    """The picture of :func:`forecast_figure`, with its options, as PNG, SVG or PDF.

    Raises:
        UserError: another kind of file.
        RunError: the file cannot be written.
    """
    check_form(path)
    save_figure(forecast_figure(forecast, past, **options), path)


def animate_forecast(
    forecast: Forecast, past: torch.Tensor, path: Path, *, fps: int = 5, **options: Unpack[SceneOptions]
) -> None:
    """The forecast growing step by step in T_p + 1 frames, as GIF, or as MP4 where ffmpeg is installed.

    Args:
        forecast: of A agents.
        past: observed positions, [A, T_o, 2].
        path: of the animation.
        fps: frames per second.
        options: those of :func:`forecast_figure`.

    Raises:
        UserError: another kind of file, or MP4 without ffmpeg.
        RunError: the file cannot be written.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise UserError(f"{path}: an animation is a .gif or .mp4 file")
    from matplotlib import animation

    if path.suffix == ".mp4" and not animation.FFMpegWriter.isAvailable():
        raise UserError(f"{path}: writing mp4 needs ffmpeg; choose a .gif file")
    scene = _Scene(forecast, past, moving=True, **options)
    writer = animation.PillowWriter(fps=fps) if path.suffix == ".gif" else animation.FFMpegWriter(fps=fps)

    def write(temporary: Path) -> None:
        with writer.saving(scene.figure, str(temporary), dpi=90):
            for steps in range(forecast.trajectories.shape[2] + 1):
                scene.show(steps)
                writer.grab_frame()

    replace_whole(path, write)


class _Scene:
    """The picture of one forecast; :meth:`show` grows its futures."""

    def __init__(
        self,
        forecast: Forecast,
        past: torch.Tensor,
        *,
        moving: bool,
        neighbours: torch.Tensor | None = None,
        truth: torch.Tensor | None = None,
        kinds: Sequence[str] = (),
        field: Field | None = None,
        title: str = "",
    ) -> None:
        self.hz, self.title, self.moving = forecast.hz, title, moving
        count, agents, steps = forecast.trajectories.shape[:3]
        anchors = np.stack([_last(track) for track in past])
        box = limits(forecast.unit, field, forecast.trajectories, past, truth)
        self.figure = empty_figure(box)
        self.axes = self.figure.subplots()
        by_kind = len(set(kinds)) > 1
        colors = [PALETTE[agent % len(PALETTE)] for agent in range(agents)]
        if by_kind:
            colors = [KIND_COLORS[kind] for kind in kinds]
        crowded = agents > 6
        draw_tracks(self.axes, neighbours, NEIGHBOUR, zorder=1)
        self._futures(forecast, anchors, colors, 0.7 if crowded else 1.2)
        draw_tracks(self.axes, past, PAST, zorder=4, linewidth=1.0 if crowded else 1.4)
        self.axes.scatter(anchors[:, 0], anchors[:, 1], s=28, c=colors, edgecolors="white", linewidths=0.8, zorder=6)
        self.true_ways: Floats | None = None
        if truth is not None:
            self.true_ways = np.concatenate([anchors[:, None], truth.double().numpy()], axis=1)
            self.truth_lines = self._outlined(1.0 if crowded else 1.5)
            self.true_ends = self.axes.scatter([], [], s=18, c=TRUTH, marker="x", linewidths=1.2, zorder=5)
        draw_frame(self.axes, box, forecast.unit, field)
        handles = [legend_entry(color=PAST, marker="o", markersize=3, label="observed")]
        if by_kind:
            named = dict(zip(kinds, colors, strict=True))
            handles += [legend_entry(color=color, label=f"{count} forecasts, {kind}") for kind, color in named.items()]
        else:
            handles.append(legend_entry(color=colors[0], label=f"{count} forecasts; the likelier, the stronger"))
        if truth is not None:
            handles.append(legend_entry(color=TRUTH, linestyle="--", label="what happened"))
        if neighbours is not None and len(neighbours):
            handles.append(legend_entry(color=NEIGHBOUR, label="others"))
        draw_legend(self.figure, handles)
        self.show(steps)
        self.figure.draw_without_rendering()
        if moving:  # the frames must not jump
            self.figure.set_layout_engine("none")
        if 1 < agents <= MOST_NAMES:
            _names(self.axes, forecast.agents, anchors, colors)

    def _futures(self, forecast: Forecast, anchors: Floats, colors: Sequence[str], width: float) -> None:
        """One line per agent and forecast, the likeliest ones on top."""
        from matplotlib.collections import LineCollection
        from matplotlib.colors import to_rgba

        count, agents = forecast.trajectories.shape[:2]
        start = np.broadcast_to(anchors, (count, agents, 2))[:, :, None]
        ways = np.concatenate([start, forecast.trajectories.double().numpy()], axis=2)
        share = forecast.probabilities.double().numpy()
        # Full strength is for forecasts that stand out; where all are alike, all are faint.
        strength = 0.1 + 0.8 * share / np.maximum(share.max(axis=0), 3 / count)
        order = np.argsort(share, axis=None, kind="stable")
        self.ways = ways.reshape(count * agents, -1, 2)[order]
        rgba = [(*to_rgba(colors[row % agents])[:3], strength.flat[row]) for row in order]
        self.lines = LineCollection([], colors=rgba, linewidths=width, zorder=2, capstyle="round")
        self.axes.add_collection(self.lines, autolim=False)
        self.ends = self.axes.scatter([], [], s=12 * width, linewidths=0, zorder=3)
        self.rgba = rgba

    def _outlined(self, width: float) -> Any:
        from matplotlib.collections import LineCollection

        white = LineCollection([], colors="white", linewidths=width + 1.4, alpha=0.8, zorder=4.5)
        black = LineCollection([], colors=TRUTH, linewidths=width, linestyles=(0, (3, 1.5)), zorder=5)
        for lines in (white, black):
            self.axes.add_collection(lines, autolim=False)
        return white, black

    def show(self, steps: int) -> None:
        """Show that many predicted steps."""
        grown = self.ways[:, : steps + 1]
        self.lines.set_segments(list(grown))
        self.ends.set_offsets(grown[:, -1] if steps else np.empty((0, 2)))
        self.ends.set_facecolor(self.rgba if steps else [])
        if self.true_ways is not None:
            for lines in self.truth_lines:
                lines.set_segments(list(self.true_ways[:, : steps + 1]))
            self.true_ends.set_offsets(self.true_ways[:, steps] if steps else np.empty((0, 2)))
        time = f"+ {steps / self.hz:.1f} s" if self.moving else ""
        self.axes.set_title("   ".join(part for part in (self.title, time) if part), fontsize=10)


def _last(track: torch.Tensor) -> Floats:
    """Where an agent [T_o, 2] was last seen."""
    seen = torch.isfinite(track).all(dim=-1).nonzero()
    place: Floats = track[int(seen[-1])].double().numpy()
    return place


def _names(axes: Any, names: Sequence[str], anchors: Floats, colors: Sequence[str]) -> None:
    """Each name beside its agent, in the first direction that is free; left out where every direction is taken."""
    from matplotlib.patheffects import withStroke

    points = axes.transData.transform(anchors)
    scale = axes.figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = [(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    for index, name in enumerate(names):
        width, height = scale * (4.6 * len(name) + 2), scale * 8
        for across, up in ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1.4), (0, -1.4)):
            x = points[index, 0] + across * (width / 2 + 4 * scale)
            y = points[index, 1] + up * 7 * scale
            own = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if not any(own[0] < b[2] and b[0] < own[2] and own[1] < b[3] and b[1] < own[3] for b in taken):
                taken.append(own)
                shift = ((x - points[index, 0]) / scale, (y - points[index, 1]) / scale)
                axes.annotate(
                    name,
                    anchors[index],
                    xytext=shift,
                    textcoords="offset points",
                    color=colors[index],
                    fontsize=7.5,
                    fontweight="bold",
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                    ha="center",
                    va="center",
                    zorder=7,
                )
                break
