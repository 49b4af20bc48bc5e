"""Writing tracks and forecasts to files: TrajNet++ JSON lines, csv, npz and JSON.

``K`` forecasts, ``A`` agents, ``T_p`` steps.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from neurocl.errors import UserError
from neurocl.trajectory.scenes import Forecast, TrackSet

WRITTEN = ("ndjson", "csv", "npz", "json")


def write_tracks(path: str | Path, tracks: TrackSet | Sequence[TrackSet], format: str | None = None) -> None:
    """Write recordings so that :func:`neurocl.trajectory.readers.read_recordings` gives them back exactly.

    Args:
        path: the file, ``.gz`` packs it (not npz); it is written under another name and then renamed.
        tracks: one recording, or several (not in ndjson, where agents of different recordings would mix).
        format: ``ndjson``, ``csv``, ``npz`` or ``json``; by default the ending of the name.

    Raises:
        UserError: an unknown format, nothing to write, or the file cannot be written.
    """
    path = Path(path)
    recordings = [tracks] if isinstance(tracks, TrackSet) else list(tracks)
    if not recordings or not all(len(recording.time) for recording in recordings):
        raise UserError(f"{path}: no rows of tracks to write")
    chosen = _format(path, format)
    if chosen == "ndjson" and len(recordings) > 1:
        raise UserError(f"{path}: ndjson holds one recording, got {len(recordings)}; write csv, npz or json")
    if chosen == "npz":
        _write_bytes(path, lambda stream: np.savez_compressed(stream, **_track_arrays(recordings)))
        return
    writer = {"ndjson": _track_ndjson, "csv": _track_csv, "json": _track_json}[chosen]
    _write_text(path, writer(recordings))


def write_forecast(
    path: str | Path,
    forecast: Forecast,
    format: str | None = None,
    *,
    first_frame: int = 1,
    frame_step: int = 1,
    scene: int = 0,
) -> None:
    """Write a forecast.

    csv has a row per forecast, agent and step; ndjson is TrajNet++ with ``prediction_number`` (and a probability, which
    other readers skip); npz holds the arrays; JSON is nested by agent. npz and JSON hold the radii of a calibrated
    forecast too.

    Args:
        path: the file, see :func:`write_tracks`.
        forecast: of one scene.
        format: as in :func:`write_tracks`.
        first_frame: frame number of the first predicted step.
        frame_step: frame numbers per step.
        scene: number of the scene, for TrajNet++.

    Raises:
        UserError: an unknown format, or the file cannot be written.
    """
    path = Path(path)
    chosen = _format(path, format)
    frames = first_frame + frame_step * np.arange(forecast.trajectories.shape[2])
    if chosen == "npz":
        arrays: dict[str, Any] = {
            "trajectories": forecast.trajectories.cpu().numpy(),
            "probabilities": forecast.probabilities.cpu().numpy(),
            "agents": np.array(forecast.agents, dtype=np.str_),
            "frame": frames,
            "unit": np.array(forecast.unit),
            "hz": np.array(forecast.hz),
            "joint": np.array(forecast.joint),
            **{name: np.array(values) for name, values in _radii(forecast).items()},
        }
        _write_bytes(path, lambda stream: np.savez_compressed(stream, **arrays))
        return
    values = forecast.trajectories.double().cpu().numpy()
    shares = forecast.probabilities.double().cpu().numpy()
    if chosen == "csv":
        lines = _forecast_csv(forecast, values.tolist(), shares.tolist(), frames.tolist())
    elif chosen == "ndjson":
        lines = _forecast_ndjson(forecast, values.tolist(), shares.tolist(), frames.tolist(), scene)
    else:
        lines = _forecast_json(forecast, values, shares, frames.tolist())
    _write_text(path, lines)


def _format(path: Path, format: str | None) -> str:
    chosen = format or path.name.removesuffix(".gz").rpartition(".")[2].lower()
    chosen = "ndjson" if chosen == "jsonl" else chosen
    if chosen not in WRITTEN:
        raise UserError(f"{path}: cannot write {chosen!r}; there are {', '.join(WRITTEN)}")
    return chosen


def _label(name: str) -> int | str:
    """Numbers stay numbers in JSON, as other TrajNet++ tools want them."""
    return int(name) if name.lstrip("-").isdecimal() and str(int(name)) == name else name


def _track_ndjson(recordings: Sequence[TrackSet]) -> Iterator[str]:
    tracks = recordings[0]
    scene: dict[str, Any] = {
        "id": 0,
        "p": _label(tracks.agent_names[tracks.agent[0]]),
        "s": int(tracks.frame[0]),
        "e": int(tracks.frame[-1]),
        "fps": tracks.hz,
        "tag": 0,
    }
    if tracks.unit != "m":
        scene["unit"] = tracks.unit
    kinds = {name: kind for name, kind in zip(tracks.agent_names, tracks.kind, strict=True) if kind != "pedestrian"}
    if kinds:
        scene["kinds"] = kinds
    yield json.dumps({"scene": scene}) + "\n"
    labels = [_label(name) for name in tracks.agent_names]
    for frame, agent, (x, y) in zip(tracks.frame.tolist(), tracks.agent.tolist(), tracks.xy.tolist(), strict=True):
        yield json.dumps({"track": {"f": frame, "p": labels[agent], "x": x, "y": y}}) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',";\t') else text


def _track_csv(recordings: Sequence[TrackSet]) -> Iterator[str]:
    yield "recording,frame,time,agent,kind,x,y,unit,hz\n"
    for tracks in recordings:
        labels = [f"{_quoted(name)},{kind}" for name, kind in zip(tracks.agent_names, tracks.kind, strict=True)]
        name, ending = _quoted(tracks.name), f"{tracks.unit},{tracks.hz!r}\n"
        rows = zip(tracks.frame.tolist(), tracks.time.tolist(), tracks.agent.tolist(), tracks.xy.tolist(), strict=True)
        for frame, time, agent, (x, y) in rows:
            yield f"{name},{frame},{time!r},{labels[agent]},{x!r},{y!r},{ending}"


def _track_json(recordings: Sequence[TrackSet]) -> Iterator[str]:
    yield '{"recordings": [\n'
    for index, tracks in enumerate(recordings):
        points: dict[str, list[list[float]]] = {name: [] for name in tracks.agent_names}
        rows = zip(tracks.frame.tolist(), tracks.time.tolist(), tracks.agent.tolist(), tracks.xy.tolist(), strict=True)
        for frame, time, agent, (x, y) in rows:
            points[tracks.agent_names[agent]].append([time, x, y, frame])
        entry = {
            "name": tracks.name,
            "unit": tracks.unit,
            "hz": tracks.hz,
            "kind": dict(zip(tracks.agent_names, tracks.kind, strict=True)),
            "tracks": points,
        }
        yield json.dumps(entry) + (",\n" if index + 1 < len(recordings) else "\n")
    yield "]}\n"


def _track_arrays(recordings: Sequence[TrackSet]) -> dict[str, Any]:
    def joined(values: Iterable[Any]) -> Any:
        return np.concatenate([np.asarray(value) for value in values])

    def starts(counts: Iterable[int]) -> Any:
        return np.cumsum([0, *counts])

    return {
        "name": np.array([tracks.name for tracks in recordings], dtype=np.str_),
        "start": starts(len(tracks.time) for tracks in recordings),
        "agent_start": starts(tracks.num_agents for tracks in recordings),
        "time": joined(tracks.time for tracks in recordings),
        "agent": joined(tracks.agent for tracks in recordings),
        "xy": joined(tracks.xy for tracks in recordings),
        "frame": joined(tracks.frame for tracks in recordings),
        "agent_name": np.array([name for tracks in recordings for name in tracks.agent_names], dtype=np.str_),
        "kind": np.array([kind for tracks in recordings for kind in tracks.kind], dtype=np.str_),
        "unit": np.array([tracks.unit for tracks in recordings], dtype=np.str_),
        "hz": np.array([tracks.hz for tracks in recordings]),
    }


def _forecast_csv(forecast: Forecast, values: Any, shares: Any, frames: list[int]) -> Iterator[str]:
    yield "forecast,probability,agent,frame,step,x,y,unit,hz\n"
    ending = f"{forecast.unit},{forecast.hz!r}\n"
    for k, agents in enumerate(values):
        for name, share, points in zip(forecast.agents, shares[k], agents, strict=True):
            start = f"{k},{share:.8g},{_quoted(name)}"
            for step, (frame, (x, y)) in enumerate(zip(frames, points, strict=True)):
                yield f"{start},{frame},{step + 1},{x:.9g},{y:.9g},{ending}"


def _forecast_ndjson(forecast: Forecast, values: Any, shares: Any, frames: list[int], scene: int) -> Iterator[str]:
    facts: dict[str, Any] = {
        "id": scene,
        "p": _label(forecast.agents[0]) if forecast.agents else -1,
        "s": frames[0],
        "e": frames[-1],
        "fps": forecast.hz,
        "tag": 0,
    }
    if forecast.unit != "m":
        facts["unit"] = forecast.unit
    yield json.dumps({"scene": facts}) + "\n"
    for k, agents in enumerate(values):
        for name, share, points in zip(forecast.agents, shares[k], agents, strict=True):
            for frame, (x, y) in zip(frames, points, strict=True):
                row = {"f": frame, "p": _label(name), "x": _short(x), "y": _short(y)}
                row |= {"prediction_number": k, "scene_id": scene, "probability": _short(share)}
                yield json.dumps({"track": row}) + "\n"


def _short(value: float) -> float:
    """As many digits as a float32 has."""
    return float(f"{value:.9g}")


def _forecast_json(forecast: Forecast, values: Any, shares: Any, frames: list[int]) -> Iterator[str]:
    agents = {
        name: {
            "probabilities": [_short(value) for value in shares[:, index].tolist()],
            "trajectories": [[[_short(x), _short(y)] for x, y in path] for path in values[:, index].tolist()],
        }
        for index, name in enumerate(forecast.agents)
    }
    facts = {"unit": forecast.unit, "hz": forecast.hz, "joint": forecast.joint, "frames": frames}
    yield json.dumps({**facts, **_radii(forecast), "agents": agents}) + "\n"


def _radii(forecast: Forecast) -> dict[str, list[float]]:
    """Per step, how near to a forecast the truth is with the probability in the name, if that is known."""
    return {name: forecast.extra[name] for name in ("radius_50", "radius_90") if name in forecast.extra}


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_bytes(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    with _replacing(path) as stream:
        write(stream)


def _write_text(path: Path, lines: Iterator[str]) -> None:
    with _replacing(path) as stream:
        # Without a time stamp the same content gives the same bytes.
        target = gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) if path.name.endswith(".gz") else stream
        text = io.TextIOWrapper(target, encoding="utf-8", newline="\n")
        for line in lines:
            text.write(line)
        text.detach()
        if target is not stream:
            target.close()
