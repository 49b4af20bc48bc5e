"""Scenes of the known data sets and of one's own files, cut and split as their protocols say.

``S`` scenes, ``A`` agents, ``T = T_o + T_p`` steps.

=================  ===================  =================================================================
name               observed, predicted  protocol
=================  ===================  =================================================================
``eth-ucy:FOLD``   8, 12 at 2.5 Hz, m   leave one out of eth, hotel, univ, zara1, zara2; stride 1
``sdd``            8, 12 at 2.5 Hz, px  the TrajNet tracks, everybody else around as neighbours
``nba``            10, 20 at 5 Hz, m    sequences before a made shot, ball and ten players
``nba:rebound``    8, 12 at 8.3 Hz, ft  sequences around a rebound, the ball as neighbour only; stride 1
``nfl``            8, 16 at 5 Hz, m     highlight plays from before the snap, ball and 22 players
``crowd``          8, 12 at 2.5 Hz, m   synthetic, see :mod:`neurocl.trajectory.crowd`
files              8, 12 at their rate  first 70 % of the windows train, then 15 % val, 15 % test
=================  ===================  =================================================================

``val`` is never part of the test data: eth-ucy cuts it off the end of the training recordings, sdd holds back four
scenes, nba and nfl hold back games. ``train`` leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from neurocl.data.locate import find_file, search_roots
from neurocl.errors import UserError
from neurocl.trajectory.crowd import crowd_scenes
from neurocl.trajectory.readers import read_recordings
from neurocl.trajectory.readers_sports import NBA_FRAMES_PER_SECOND, NBA_STEP, NFL_HZ, Matches, load_matches
from neurocl.trajectory.resample import METRES, dense_linear
from neurocl.trajectory.scenes import Scenes, TrackSet
from neurocl.trajectory.windows import aligned, cut, cut_dense, without_overlap

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
FOLDS = ("eth", "hotel", "univ", "zara1", "zara2")
DATASETS = (*(f"eth-ucy:{fold}" for fold in FOLDS), "sdd", "nba", "nba:rebound", "nfl", "crowd")

SHARES = (0.70, 0.15, 0.15)
SDD_ROWS = 20
SDD_FRAMES = 12  # video frames per step
NBA_TRAIN_STRIDE = 5
NFL_TRAIN_STRIDE = 4
MATCH_HZ = 5.0


def load_scenes(
    name: str | Path | Sequence[str | Path],
    split: Split,
    *,
    data_dir: Path | None = None,
    num_observed: int | None = None,
    num_predicted: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    hz: float | None = None,
    min_targets: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Scenes:
    """The scenes of one split.

    Args:
        name: one of :data:`DATASETS`, or one or several files.
        split: ``train``, ``val`` or ``test``.
        data_dir: folder that holds ``trajectory/``; else ``$NEUROCL_DATA``, else the user's cache.
        num_observed: T_o; by default that of the protocol.
        num_predicted: T_p, likewise.
        stride: from one window to the next, in steps (rows of 0.1 s for nfl). By default windows of ``val`` and
            ``test`` of nba and nfl do not overlap, those of ``train`` start every second (nba) or 0.4 s (nfl);
            everything else has stride 1. Not for sdd, whose windows start where its tracks do.
        seed: of the synthetic crowd.
        hz: resample own files to this rate.
        min_targets: complete agents that a window must have. By default 2 for ``test`` of eth-ucy, as most papers count
            (1 gives the newer way to count), else 1.
        columns: for own tables, see :func:`neurocl.trajectory.readers.read_table`.

    Raises:
        UserError: an unknown name or split, data that are not there, a split without scenes.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    for value, what in ((num_observed, "num_observed"), (num_predicted, "num_predicted"), (stride, "stride")):
        if value is not None and value < 1:
            raise UserError(f"{what} must be at least 1, got {value}")
    known = name if isinstance(name, str) and not Path(name).exists() else ""
    if known and hz is not None:
        raise UserError("hz is for own files; the data sets have the rates of their protocols")
    if known.startswith("eth-ucy"):
        fold = known.partition(":")[2]
        least = min_targets if min_targets is not None else 2 if split == "test" else 1
        scenes = _eth_ucy(fold, split, data_dir, num_observed or 8, num_predicted or 12, stride or 1, least)
    elif known == "sdd":
        scenes = _sdd(split, data_dir, num_observed or 8, num_predicted or 12, stride)
    elif known == "nba":
        scenes = _nba(split, data_dir, num_observed or 10, num_predicted or 20, stride)
    elif known == "nba:rebound":
        scenes = _nba_rebound(split, data_dir, num_observed or 8, num_predicted or 12, stride or 1)
    elif known == "nfl":
        scenes = _nfl(split, data_dir, num_observed or 8, num_predicted or 16, stride)
    elif known == "crowd":
        scenes = crowd_scenes(
            split, seed, num_observed=num_observed or 8, num_predicted=num_predicted or 12, stride=stride or 1
        )
    else:
        files = [name] if isinstance(name, (str, Path)) else list(name)
        scenes = _own(
            files, split, num_observed or 8, num_predicted or 12, stride or 1, hz, min_targets or 1, columns or {}
        )
    if min_targets is not None:
        scenes = with_targets(scenes, min_targets)
    if not len(scenes):
        steps = f"{scenes.num_observed} + {scenes.num_predicted} steps"
        raise UserError(f"{scenes.name}: no scene of {steps} in {split}; the recordings are too short")
    return scenes


def with_targets(scenes: Scenes, least: int) -> Scenes:
    """The scenes with at least ``least`` agents that metrics count."""
    enough = scenes.target_mask.sum(dim=1) >= least
    return scenes if bool(enough.all()) else scenes.subset(enough.nonzero()[:, 0])


def _found(folder: str, names: Sequence[str], data_dir: Path | None) -> Path:
    path = find_file(["trajectory"], [f"{folder}/{name}" for name in names], data_dir)
    if path is None:
        roots = ", ".join(str(root) for root in search_roots(data_dir))
        raise UserError(f"trajectory/{folder}/{names[0]} is not in {roots}; name its folder with --data-dir")
    return path


def _eth_ucy(
    fold: str,
    split: Split,
    data_dir: Path | None,
    num_observed: int,
    num_predicted: int,
    stride: int,
    min_targets: int,
) -> Scenes:
    if fold not in FOLDS:
        raise UserError(f"eth-ucy needs a fold, eth-ucy:{'|'.join(FOLDS)}, got {fold!r}")
    listing = _found("eth_ucy", ["splits.json"], data_dir)
    splits = json.loads(listing.read_text(encoding="utf-8"))
    files = splits["folds"][fold]["test" if split == "test" else "train_val"]
    recordings = []
    for stem in files:
        path = next((path for path in listing.parent.glob(f"{stem}.txt*") if path.suffix in (".txt", ".gz")), None)
        if path is None:
            raise UserError(f"{listing.parent}: no {stem}.txt or {stem}.txt.gz")
        tracks = read_recordings(path, "eth-text")[0]
        if split != "test":
            later = tracks.frame >= int(splits["val_from_frame"][stem])
            tracks = _rows(tracks, later if split == "val" else ~later)
        recordings.append(tracks)
    return cut(recordings, num_observed, num_predicted, stride=stride, min_targets=min_targets, name=f"eth-ucy:{fold}")


def _rows(tracks: TrackSet, kept: NDArray[np.bool_]) -> TrackSet:
    return replace(
        tracks, time=tracks.time[kept], agent=tracks.agent[kept], xy=tracks.xy[kept], frame=tracks.frame[kept]
    )


def _sdd(split: Split, data_dir: Path | None, num_observed: int, num_predicted: int, stride: int | None) -> Scenes:
    if stride is not None:
        raise UserError("sdd has no stride: its windows start where its tracks do")
    if num_observed + num_predicted > SDD_ROWS:
        raise UserError(f"the tracks of sdd have {SDD_ROWS} steps, got {num_observed} + {num_predicted}")
    path = _found("sdd", ["sdd_trajnet.csv.gz", "sdd_trajnet.csv"], data_dir)
    held_back = json.loads(_found("sdd", ["val_scenes.json"], data_dir).read_text(encoding="utf-8"))["val_scenes"]
    parts = []
    for tracks in read_recordings(path, "trajnet-csv"):
        part, _, scene = tracks.name.partition("/")
        if part == "train" and scene in held_back:
            part = "val"
        if part == split:
            parts.append(scenes_of_tracks(replace(tracks, name=scene), num_observed, num_predicted, SDD_FRAMES))
    if not parts:
        raise UserError(f"{path}: no scene of {split}")
    return replace(Scenes.joined(parts), name="sdd")


def scenes_of_tracks(tracks: TrackSet, num_observed: int, num_predicted: int, frame_step: int) -> Scenes:
    """One scene for every frame in which a track begins; who begins there is a target.

    All other tracks that overlap the observed steps are neighbours, linearly interpolated where their rows lie between
    the steps of the scene.

    Args:
        tracks: tracks of one length, all with rows every ``frame_step`` frames.
        num_observed: T_o.
        num_predicted: T_p.
        frame_step: frame numbers per step.

    Raises:
        UserError: tracks with gaps or of different lengths.
    """
    order = np.lexsort((tracks.time, tracks.agent))
    rows = len(order) // tracks.num_agents
    counts = np.bincount(tracks.agent, minlength=tracks.num_agents)
    if (counts != rows).any():
        raise UserError(f"{tracks.name}: the tracks do not all have {rows} rows")
    xy = tracks.xy[order].reshape(tracks.num_agents, rows, 2)
    frames = tracks.frame[order].reshape(tracks.num_agents, rows)
    if (np.diff(frames, axis=1) != frame_step).any():
        raise UserError(f"{tracks.name}: a track without a row every {frame_step} frames")
    begin = frames[:, 0]
    starts, scene_of_target = np.unique(begin, return_inverse=True)
    # Pairs of a scene and a track that was there during its observed steps.
    ends = starts[:, None] + (num_observed - 1) * frame_step
    there = (begin[None] <= ends) & (begin[None] + (rows - 1) * frame_step >= starts[:, None])
    scene, agent = np.nonzero(there)
    target = scene_of_target[agent] == scene
    sorting = np.lexsort((agent, ~target, scene))
    scene, agent, target = scene[sorting], agent[sorting], target[sorting]
    length = num_observed + num_predicted
    at = (starts[scene] - begin[agent])[:, None] / frame_step + np.arange(length)
    inside = (at > -1e-9) & (at < rows - 1 + 1e-9)
    # Who is between two of its own rows at every step may have none within the observed ones.
    seen = inside[:, :num_observed].any(axis=1)
    scene, agent, target, at, inside = scene[seen], agent[seen], target[seen], at[seen], inside[seen]
    left = np.clip(np.floor(at + 1e-9).astype(np.int64), 0, rows - 1)
    right = np.minimum(left + 1, rows - 1)
    share = np.clip(at - left, 0.0, 1.0)[..., None]
    places = xy[agent[:, None], left] * (1 - share) + xy[agent[:, None], right] * share
    sizes = np.bincount(scene, minlength=len(starts))
    slot = np.arange(len(scene)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shape = (len(starts), int(sizes.max()))
    values = torch.zeros(*shape, length, 2)
    mask = torch.zeros(*shape, length, dtype=torch.bool)
    present = torch.zeros(shape, dtype=torch.bool)
    targets = torch.zeros(shape, dtype=torch.bool)
    identity = torch.full(shape, -1, dtype=torch.int64)
    values[scene, slot] = torch.from_numpy(np.where(inside[..., None], places, 0.0)).float()
    mask[scene, slot] = torch.from_numpy(inside)
    present[scene, slot] = True
    targets[scene, slot] = torch.from_numpy(target)
    identity[scene, slot] = torch.from_numpy(agent)
    return Scenes(
        past=values[:, :, :num_observed].contiguous(),
        future=values[:, :, num_observed:].contiguous(),
        agent_mask=present,
        past_mask=mask[:, :, :num_observed].contiguous(),
        future_mask=mask[:, :, num_observed:].contiguous(),
        target_mask=targets,
        kind=torch.zeros(shape, dtype=torch.int64),
        agent_id=identity,
        start=torch.from_numpy(starts),
        recording=(tracks.name,) * len(starts),
        unit=tracks.unit,
        hz=tracks.hz,
        name=tracks.name,
    )


def _nba(split: Split, data_dir: Path | None, num_observed: int, num_predicted: int, stride: int | None) -> Scenes:
    matches = load_matches(_found("nba", [f"nba_score_{split}.npz"], data_dir), "nba")
    length = num_observed + num_predicted
    every = stride or (NBA_TRAIN_STRIDE if split == "train" else length)
    source_step = NBA_STEP / NBA_FRAMES_PER_SECOND
    grids = [
        dense_linear(matches.xy[first:last], source_step, 1 / MATCH_HZ) * METRES["ft"]
        for first, last in zip(matches.start[:-1], matches.start[1:], strict=True)
    ]
    starts = np.cumsum([0, *(len(grid) for grid in grids)])
    sequence, local = _slide(np.diff(starts), np.zeros(len(grids), dtype=np.int64), every, length)
    return cut_dense(
        np.concatenate(grids),
        (starts[sequence] + local)[:, None] + np.arange(length),
        num_observed,
        kind=matches.kind,
        start=local * round(NBA_FRAMES_PER_SECOND / MATCH_HZ),
        recording=[matches.names[index] for index in sequence],
        unit="m",
        hz=MATCH_HZ,
        name="nba",
    )


def _nba_rebound(split: Split, data_dir: Path | None, num_observed: int, num_predicted: int, stride: int) -> Scenes:
    matches = load_matches(_found("nba", [f"nba_rebound_{split}.npz"], data_dir), "nba:rebound")
    length = num_observed + num_predicted
    sequence, local = _slide(_lengths(matches), np.zeros(len(matches.names), dtype=np.int64), stride, length)
    return cut_dense(
        matches.xy,
        (matches.start[sequence] + local)[:, None] + np.arange(length),
        num_observed,
        kind=matches.kind,
        start=local * NBA_STEP,
        recording=[matches.names[index] for index in sequence],
        unit="ft",
        hz=NBA_FRAMES_PER_SECOND / NBA_STEP,
        name="nba:rebound",
        counted=[kind != "ball" for kind in matches.kind],
    )


def _nfl(split: Split, data_dir: Path | None, num_observed: int, num_predicted: int, stride: int | None) -> Scenes:
    matches = load_matches(_found("nfl", [f"nfl_{split}.npz"], data_dir), "nfl")
    every_row = round(NFL_HZ / MATCH_HZ)
    length = num_observed + num_predicted
    stride = stride or (NFL_TRAIN_STRIDE if split == "train" else 24)
    first = matches.snap - num_observed * every_row
    # Plays that are recorded from later on begin at the first of the same starts.
    first = np.where(first < 0, first % stride, first)
    play, local = _slide(_lengths(matches), first, stride, length * every_row)
    return cut_dense(
        matches.xy * METRES["yd"],
        (matches.start[play] + local)[:, None] + np.arange(length) * every_row,
        num_observed,
        kind=matches.kind,
        start=local,
        recording=[matches.names[index] for index in play],
        unit="m",
        hz=MATCH_HZ,
        name="nfl",
    )


def _lengths(matches: Matches) -> NDArray[np.int64]:
    return np.diff(matches.start)


def _slide(
    lengths: NDArray[np.int64], first: NDArray[np.int64], stride: int, window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sequence and first row of every window of ``window`` rows, from row ``first`` of each sequence on."""
    counts = np.maximum(0, (lengths - window - first) // stride + 1)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    return sequence, first[sequence] + number * stride


def _own(
    files: Sequence[str | Path],
    split: Split,
    num_observed: int,
    num_predicted: int,
    stride: int,
    hz: float | None,
    min_targets: int,
    columns: Mapping[str, str],
) -> Scenes:
    if not files:
        raise UserError("no files named")
    for file in files:
        if not Path(file).exists():
            raise UserError(f"{file}: neither a file nor a data set; there are {', '.join(DATASETS)}")
    recordings = [
        aligned(tracks, hz) for file in files for tracks in read_recordings(file, columns=columns if columns else None)
    ]
    title = ", ".join(Path(file).name for file in files[:3]) + (", ..." if len(files) > 3 else "")
    scenes = cut(recordings, num_observed, num_predicted, stride=stride, min_targets=min_targets, name=title)
    step = max(_frame_step(tracks) for tracks in recordings)
    rows = without_overlap(scenes, SHARES, step * (num_observed + num_predicted))[SPLITS.index(split)]
    if not len(rows):
        raise UserError(
            f"{title}: {len(scenes)} windows of {num_observed} + {num_predicted} steps are too few for {split} "
            "to share no step with the other parts; give longer recordings"
        )
    return scenes.subset(rows)


def _frame_step(tracks: TrackSet) -> int:
    frames = np.unique(tracks.frame)
    return int(np.median(np.diff(frames))) if len(frames) > 1 else 1
