"""Files of walking people: ETH/UCY text, obsmat and vsp, Stanford Drone tables, TrajNet++ lines."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurocl.trajectory.rows import (
    MAX_ROWS,
    RowGroups,
    Rows,
    agent_label,
    assembled,
    mistake,
    number_blocks,
    number_in,
    text_lines,
    too_many_rows,
    whole_in,
)
from neurocl.trajectory.scenes import KINDS, TrackSet

PEDESTRIAN_HZ = 2.5
VIDEO_SIZE = (720, 576)  # pixels of the UCY videos, whose splines count from the centre
VIDEO_FRAMES = 10  # the UCY splines are read every 0.4 s of a 25 Hz video
SDD_FRAMES_PER_SECOND = 30.0
SDD_KINDS = {"pedestrian": "pedestrian", "biker": "cyclist", "skater": "other", "car": "vehicle", "bus": "vehicle"}
SDD_KINDS["cart"] = "vehicle"


def read_four_columns(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """``frame agent x y`` per line, metres at 2.5 rows per second unless told otherwise (ETH/UCY and alike)."""
    return [_table(path, name, 4, (2, 3), hz or PEDESTRIAN_HZ, unit or "m")]


def read_obsmat(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """``frame agent x z y vx vz vy`` per line, the ETH annotation; z and the velocities are not kept."""
    return [_table(path, name, 8, (2, 4), hz or PEDESTRIAN_HZ, unit or "m")]


def _table(path: Path, name: str, columns: int, places: tuple[int, int], hz: float, unit: str) -> TrackSet:
    lines: list[NDArray[np.int64]] = []
    blocks: list[NDArray[np.float64]] = []
    kept = [0, 1, *places]
    total = 0
    for numbers, values in number_blocks(path, columns):
        total += len(numbers)
        if total > MAX_ROWS:
            raise too_many_rows(path, int(numbers[-1]))
        for column, what in ((0, "frame"), (1, "agent")):
            broken = np.flatnonzero(values[:, column] != np.round(values[:, column]))
            if len(broken):
                row = int(broken[0])
                raise mistake(path, int(numbers[row]), f"{what} {values[row, column]:g} is not a whole number")
        lines.append(numbers)
        blocks.append(values[:, kept])
    values = np.concatenate(blocks)
    numbers, agent = np.unique(values[:, 1], return_inverse=True)
    names = tuple(str(int(value)) for value in numbers)
    return assembled(
        path,
        name,
        frame=values[:, 0],
        agent=agent.astype(np.int64),
        xy=values[:, 2:],
        line=np.concatenate(lines),
        agent_names=names,
        kind=("pedestrian",) * len(names),
        unit=unit,
        hz=hz,
    )


def read_vsp(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """The spline points of UCY: straight lines between them, looked at every 0.4 s; pixels, y grows downwards.

    Positions are columns and rows of the image; :func:`neurocl.trajectory.resample.through_homography` brings them to
    the ground.
    """
    source = text_lines(path)

    def numbers(count: int) -> tuple[int, list[float]]:
        line, text = next(source, (0, ""))
        if not line:
            raise mistake(path, last, "the file ends inside a spline")
        cells = text.split()[:count]
        if len(cells) < count:
            raise mistake(path, line, f"{len(cells)} numbers where {count} belong")
        return line, [number_in(path, line, cell) for cell in cells]

    last = 1
    last, (splines,) = numbers(1)
    rows = Rows(path, name)
    for agent in range(int(splines)):
        last, (count,) = numbers(1)
        read = []
        for _ in range(int(count)):
            last, values = numbers(4)
            read.append(values[:3])
        if not read:
            continue
        points = np.array(read)
        if (np.diff(points[:, 2]) <= 0).any():
            raise mistake(path, last, f"the frames of spline {agent + 1} do not increase")
        if points[-1, 2] - points[0, 2] > MAX_ROWS * VIDEO_FRAMES:
            raise mistake(path, last, f"spline {agent + 1} has frames {points[0, 2]:g} to {points[-1, 2]:g}")
        first = np.ceil(points[0, 2] / VIDEO_FRAMES) * VIDEO_FRAMES
        frames = np.arange(first, points[-1, 2] + 1e-9, VIDEO_FRAMES)
        x = np.interp(frames, points[:, 2], points[:, 0]) + VIDEO_SIZE[0] / 2
        y = VIDEO_SIZE[1] / 2 - np.interp(frames, points[:, 2], points[:, 1])
        for frame, column, row in zip(frames, x, y, strict=True):
            rows.add(last, str(agent + 1), float(column), float(row), frame=float(frame))
        if len(rows) > MAX_ROWS:
            raise too_many_rows(path, last)
    return [rows.finished(unit=unit or "px", hz=hz or PEDESTRIAN_HZ)]


def read_sdd(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """``track xmin ymin xmax ymax frame lost occluded generated "label"``: box centres in pixels, 30 frames per second.

    Rows marked lost (outside of the picture) are left out.
    """
    groups = RowGroups(path)
    for line, text in text_lines(path):
        cells = text.split(None, 9)
        if len(cells) != 10:
            raise mistake(path, line, f"{len(cells)} columns where 10 belong")
        left, top, right, bottom = (number_in(path, line, cell) for cell in cells[1:5])
        frame, lost = whole_in(path, line, cells[5], "a frame number"), whole_in(path, line, cells[6], "0 or 1")
        if lost:
            continue
        kind = SDD_KINDS.get(cells[9].strip().strip('"').lower(), "other")
        agent = agent_label(cells[0])
        groups.of(name, line).add(line, agent, (left + right) / 2, (top + bottom) / 2, kind, frame=frame)
    scale = (hz / SDD_FRAMES_PER_SECOND) if hz else 1.0
    return groups.finished(
        lambda rows: rows.finished(unit=unit or "px", frames_per_second=SDD_FRAMES_PER_SECOND * scale)
    )


def read_trajnet_table(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """``split,scene,track,frame,x_px,y_px``: Stanford Drone tracks as papers split them, one recording per scene.

    Recordings are called ``split/scene``.
    """
    groups = RowGroups(path)
    source = text_lines(path)
    first, header = next(source)
    names = [cell.strip() for cell in header.split(",")]
    wanted = ("scene", "track", "frame", "x_px", "y_px")
    missing = [column for column in wanted if column not in names]
    if missing:
        raise mistake(path, first, f"no column {missing[0]}")
    places = [names.index(column) for column in wanted]
    split = names.index("split") if "split" in names else None
    for line, text in source:
        cells = text.split(",")
        if len(cells) != len(names):
            raise mistake(path, line, f"{len(cells)} columns where {len(names)} belong")
        scene, track, frame, x, y = (cells[place] for place in places)
        recording = scene if split is None else f"{cells[split]}/{scene}"
        groups.of(recording, line).add(
            line,
            agent_label(track),
            number_in(path, line, x),
            number_in(path, line, y),
            frame=whole_in(path, line, frame, "a frame number"),
        )
    scale = (hz / PEDESTRIAN_HZ) if hz else 1.0
    return groups.finished(
        lambda rows: rows.finished(unit=unit or "px", frames_per_second=SDD_FRAMES_PER_SECOND * scale)
    )


def read_ndjson(
    path: Path, name: str, *, hz: float | None = None, unit: str | None = None, scenes: bool = True
) -> list[TrackSet]:
    """TrajNet++: one JSON object per line, ``{"scene": ...}`` or ``{"track": {"f", "p", "x", "y"}}``, metres.

    Every scene is a recording ``name:id`` of the frames ``s`` to ``e``, whose agent 0 is the primary one ``p``; scenes
    may overlap. With ``scenes=False``, or if the file names none, all tracks are one recording. Forecasts in the file
    (rows with a ``prediction_number``) are left out.
    """
    rows = Rows(path, name)
    described: list[tuple[int, dict[str, Any]]] = []
    kinds: dict[str, str] = {}
    for line, text in text_lines(path):
        entry = _json_line(path, line, text)
        if "scene" in entry and isinstance(entry["scene"], dict):
            described.append((line, entry["scene"]))
            kinds.update({str(key): str(value) for key, value in dict(entry["scene"].get("kinds") or {}).items()})
            continue
        track = entry.get("track")
        if not isinstance(track, dict):
            raise mistake(path, line, "neither a scene nor a track")
        if "prediction_number" in track:
            continue
        missing = [key for key in ("f", "p", "x", "y") if key not in track]
        if missing:
            raise mistake(path, line, f"a track row without {missing[0]!r}")
        agent = agent_label(str(track["p"]))
        kind = kinds.get(agent, "pedestrian")
        rows.add(
            line,
            agent,
            number_in(path, line, track["x"]),
            number_in(path, line, track["y"]),
            kind if kind in KINDS else "other",
            frame=whole_in(path, line, track["f"], "a frame number"),
        )
        if len(rows) > MAX_ROWS:
            raise too_many_rows(path, line)
    facts = described[0][1] if described else {}
    rate = hz or _positive(path, described[0][0], facts["fps"]) if "fps" in facts else hz or PEDESTRIAN_HZ
    whole = rows.finished(unit=unit or str(facts.get("unit", "m")), hz=rate)
    if not scenes or len(described) < 2:
        return [whole]
    return [_scene(path, line, scene, whole) for line, scene in described]


def _json_line(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise mistake(path, line, f"not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise mistake(path, line, "not a JSON object")
    return entry


def _positive(path: Path, line: int, value: object) -> float:
    number = number_in(path, line, value, "a rate")
    if number <= 0:
        raise mistake(path, line, f"a rate must be above 0, got {number:g}")
    return number


def _scene(path: Path, line: int, scene: dict[str, Any], whole: TrackSet) -> TrackSet:
    """The rows of one scene, its primary agent first."""
    missing = [key for key in ("id", "p", "s", "e") if key not in scene]
    if missing:
        raise mistake(path, line, f"a scene without {missing[0]!r}")
    first, last = (whole_in(path, line, scene[key], "a frame number") for key in ("s", "e"))
    # Rows are sorted by time, so the frames are too.
    rows = slice(*np.searchsorted(whole.frame, [first, last + 1]))
    if rows.start == rows.stop:
        raise mistake(path, line, f"no rows in the frames {first} to {last} of scene {scene['id']}")
    present = np.unique(whole.agent[rows])
    names = [whole.agent_names[index] for index in present]
    primary = agent_label(str(scene["p"]))
    if primary not in names:
        raise mistake(path, line, f"the primary agent {primary} of scene {scene['id']} has no row in it")
    order = np.argsort([name != primary for name in names], kind="stable")
    place = np.empty(len(present), dtype=np.int64)
    place[order] = np.arange(len(present))
    agent = place[np.searchsorted(present, whole.agent[rows])]
    sorting = np.lexsort((agent, whole.time[rows]))
    return TrackSet(
        name=f"{whole.name}:{scene['id']}",
        time=whole.time[rows][sorting],
        agent=agent[sorting],
        xy=whole.xy[rows][sorting],
        agent_names=tuple(names[index] for index in order),
        kind=tuple(whole.kind[present[index]] for index in order),
        unit=whole.unit,
        hz=whole.hz,
        frame=whole.frame[rows][sorting],
    )


def split_line(path: Path, line: int, text: str, delimiter: str) -> list[str]:
    """The cells of one line of a table, quotes minded.

    Raises:
        UserError: quotes that do not close.
    """
    if '"' not in text:
        return text.split(delimiter)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise mistake(path, line, f"a damaged line ({error})") from error
