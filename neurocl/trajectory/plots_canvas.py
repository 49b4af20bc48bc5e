"""What pictures of scenes share: colours, paper and limits, tracks, the legend, and writing files whole or not at all.

``A`` agents, ``T_o`` observed steps. The colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.runs import write_atomically, write_error
from neurocl.trajectory.resample import METRES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurocl.trajectory.fields import Field

Floats = NDArray[np.float64]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
PAST, TRUTH, NEIGHBOUR = "0.3", "black", "0.7"
LEAST_SPAN_METRES, LEAST_SPAN_PIXELS = 3.0, 100.0
STILL_FORMS = (".png", ".svg", ".pdf")


def empty_figure(box: Floats, panels: int = 1) -> Figure:
    """An empty figure for panels side by side that all show ``box``."""
    from matplotlib.figure import Figure

    aspect = float(np.clip((box[1, 1] - box[1, 0]) / (box[0, 1] - box[0, 0]), 0.3, 1.8))
    width = min(8.0, 7.0 / aspect) if panels == 1 else min(4.2, 5.5 / aspect)
    size = (width * panels + 0.8, width * aspect + 1.2)
    return Figure(figsize=size, layout="constrained" if panels == 1 else "compressed")


def draw_frame(axes: Any, box: Floats, unit: str, field: Field | None) -> None:
    if field is not None:
        field.draw(axes)
    axes.set_aspect("equal")
    axes.set_xlim(*box[0])
    # Pixels count from the upper left corner.
    axes.set_ylim(*(box[1, ::-1] if unit == "px" else box[1]))
    axes.set_xlabel(f"x ({unit})")
    axes.set_ylabel(f"y ({unit})")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_tracks(axes: Any, tracks: torch.Tensor | None, color: str, *, zorder: float, linewidth: float = 1.0) -> None:
    """Observed ways [A, T_o, 2] with a dot for every step."""
    for track in tracks if tracks is not None else ():
        axes.plot(
            *track.double().numpy().T, color=color, marker="o", markersize=1.8, linewidth=linewidth, zorder=zorder
        )


def limits(
    unit: str, field: Field | None, futures: torch.Tensor, past: torch.Tensor, truth: torch.Tensor | None
) -> Floats:
    """From and to in x and in y, [2, 2]: all that is forecast with some room, not the others, who may be far away.

    A field is shown in its whole width.
    """
    parts = [futures.reshape(-1, 2), past.reshape(-1, 2)] + ([] if truth is None else [truth.reshape(-1, 2)])
    points = torch.cat([part.double() for part in parts])
    points = points[torch.isfinite(points).all(dim=1)]
    low, high = points.min(dim=0).values.numpy(), points.max(dim=0).values.numpy()
    room = 0.06 * float((high - low).max())
    low, high = low - room, high + room
    # Who stands still must not be magnified until noise looks like a walk.
    least = LEAST_SPAN_PIXELS if unit == "px" else LEAST_SPAN_METRES / METRES.get(unit, 1.0)
    missing = np.maximum(0.0, max(least, 0.4 * float((high - low).max())) - (high - low)) / 2
    low, high = low - missing, high + missing
    if field is not None:
        border = 0.03 * field.size[1]
        low[1], high[1] = min(low[1], -border), max(high[1], field.size[1] + border)
        # A field shown almost whole is shown whole.
        if high[0] - low[0] > 0.7 * field.size[0]:
            low[0], high[0] = min(low[0], -border), max(high[0], field.size[0] + border)
    return np.stack([low, high], axis=1)


def span(box: Floats) -> float:
    return float((box[:, 1] - box[:, 0]).max())


def legend_entry(**options: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **options)


def draw_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Below the picture, where it hides nothing, in as many columns as fit."""
    inches = [0.7 + 0.065 * len(str(handle.get_label())) for handle in handles]
    room = figure.get_figwidth()
    columns = len(handles) if sum(inches) <= room else max(1, int(room / max(inches)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, SVG or PDF; what stood there before is replaced only by a whole picture.

    Raises:
        UserError: another kind of file.
        RunError: the file cannot be written.
    """
    check_form(path)
    import matplotlib

    # No dates and no random names: the same picture gives the same bytes.
    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "neurocl"}):
        figure.savefig(stream, format=path.suffix[1:], dpi=140, metadata=metadata)
    write_atomically(path, stream.getvalue())


def check_form(path: Path) -> None:
    if path.suffix not in STILL_FORMS:
        raise UserError(f"{path}: a picture is a {', '.join(STILL_FORMS[:-1])} or {STILL_FORMS[-1]} file")


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a temporary sibling, then put it in the place of ``path``."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)
