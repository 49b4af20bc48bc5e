"""Lines of a basketball court and a football field, to draw below players.

Measures are those of the NBA (94 x 50 ft) and the NFL (120 x 53 1/3 yd with both end zones), the origin in a corner as
in the recordings. In metres they follow :data:`neurocl.trajectory.resample.METRES`, like the players: there 94 ft are
28 m, not 28.65 m.

``P`` points of a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.registry import did_you_mean
from neurocl.trajectory.resample import FIELD_YARDS, METRES

Line = NDArray[np.float64]

COURT_FEET = (94.0, 50.0)
HOOP = (5.25, 25.0)
PAINT, LINE = "#f6f1e7", "#b9b2a3"


@dataclass(frozen=True)
class Field:
    """Lines on the ground, in one unit.

    Attributes:
        name: of the sport's league.
        size: length along x and width along y.
        lines: polylines [P, 2]; the first one is the boundary.
        numbers: (x, y, text, turn in degrees) of what is written on the ground.
    """

    name: str
    size: tuple[float, float]
    lines: tuple[Line, ...]
    numbers: tuple[tuple[float, float, str, float], ...] = ()

    def draw(self, axes: Any) -> None:
        """Draw it on matplotlib axes, below everything else; the limits stay as they are."""
        from matplotlib.collections import LineCollection
        from matplotlib.patches import Rectangle

        axes.add_patch(Rectangle((0, 0), *self.size, facecolor=PAINT, edgecolor="none", zorder=0))
        axes.add_collection(LineCollection(list(self.lines), colors=LINE, linewidths=0.9, zorder=0.5), autolim=False)
        for x, y, text, turn in self.numbers:
            axes.text(
                *(x, y, text), color=LINE, fontsize=9, rotation=turn, ha="center", va="center", zorder=0.5, clip_on=True
            )


FIELDS = ("nba", "nfl")


def field(name: str, unit: str = "m") -> Field:
    """The court of the NBA or the field of the NFL.

    Args:
        name: ``"nba"`` or ``"nfl"``.
        unit: of the positions that are drawn on it.

    Raises:
        UserError: another name, or a unit that is no length.
    """
    if name not in FIELDS:
        raise UserError(f"no field {name!r}{did_you_mean(name, FIELDS)} (there are {', '.join(FIELDS)})")
    if unit not in METRES:
        raise UserError(f"a field can be drawn below positions in {', '.join(METRES)}, not in {unit!r}")
    size, lines, numbers, own = (*_court(), "ft") if name == "nba" else (*_football(), "yd")
    scale = METRES[own] / METRES[unit]
    return Field(
        name,
        (size[0] * scale, size[1] * scale),
        tuple(line * scale for line in lines),
        tuple((x * scale, y * scale, text, turn) for x, y, text, turn in numbers),
    )


Drawing = tuple[tuple[float, float], list[Line], list[tuple[float, float, str, float]]]


def _court() -> Drawing:
    """Boundary, half-way line, circles, and per side: lane, free-throw circle, three-point line, hoop and backboard."""
    length, width = COURT_FEET
    x, y = HOOP
    corner = 22.0  # the three-point line is straight where it is 22 ft from the hoop, and else an arc of 23.75 ft
    angle = np.arcsin(corner / 23.75)
    half = [
        _polyline((0, y - 8), (19, y - 8), (19, y + 8), (0, y + 8)),
        _arc(19, y, 6),
        np.concatenate([[(0.0, y - corner)], _arc(x, y, 23.75, -angle, angle), [(0.0, y + corner)]], dtype=np.float64),
        _arc(x, y, 4, -np.pi / 2, np.pi / 2),
        _arc(x, y, 0.75),
        _polyline((4, y - 3), (4, y + 3)),
    ]
    lines = [_rectangle(length, width), _polyline((length / 2, 0), (length / 2, width))]
    lines += [_arc(length / 2, width / 2, radius) for radius in (6, 2)]
    lines += half + [np.array([length, 0.0]) + line * np.array([-1.0, 1.0]) for line in half]
    return COURT_FEET, lines, []


def _football() -> Drawing:
    """Boundary, goal lines, a line every 5 yards, hash marks every yard, and the yards to the nearer goal line."""
    length, width = FIELD_YARDS
    lines = [_rectangle(length, width)]
    lines += [_polyline((x, 0), (x, width)) for x in np.arange(10.0, length - 9, 5)]
    hash_mark = (70 + 9 / 12) / 3  # yards from the side line
    for x in np.arange(11.0, length - 10):
        for y in (0.0, hash_mark, width - hash_mark - 2 / 3, width - 2 / 3):
            lines.append(_polyline((x, y), (x, y + 2 / 3)))
    numbers = [
        (x, y, str(round(min(x, length - x) - 10)), turn)
        for x in np.arange(20.0, length - 19, 10)
        for y, turn in ((13.0, 0.0), (width - 13.0, 180.0))
    ]
    return FIELD_YARDS, lines, numbers


def _polyline(*points: tuple[float, float]) -> Line:
    return np.array(points, dtype=np.float64)


def _rectangle(length: float, width: float) -> Line:
    return _polyline((0, 0), (length, 0), (length, width), (0, width), (0, 0))


def _arc(x: float, y: float, radius: float, start: float = 0.0, end: float = 2 * np.pi) -> Line:
    angle = np.linspace(start, end, 61)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)
