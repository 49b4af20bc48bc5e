"""Tracks as a file holds them, and the dense scenes that models see.

``S`` scenes, ``A`` agents of a scene (padded), ``T_o`` observed and ``T_p`` predicted steps, ``M`` rows of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neurocl.errors import UserError

# What an agent is; the position in this list is its number in ``Scenes.kind``.
KINDS = ("pedestrian", "cyclist", "vehicle", "home", "visitor", "ball", "offence", "defence", "other")


@dataclass(frozen=True)
class TrackSet:
    """Positions of agents over time, as read from one file or recording.

    Attributes:
        name: what messages call it.
        time: seconds of each row, float64 [M].
        agent: agent of each row, int64 [M], an index into ``agent_names``.
        xy: positions in ``unit``, float64 [M, 2].
        agent_names: the names or numbers that the file gave its agents.
        kind: per agent, one of :data:`KINDS`.
        unit: ``"m"``, ``"px"``, ``"ft"`` or ``"yd"``.
        hz: rows of one agent per second.
        frame: the file's own frame number of each row, int64 [M], for messages and for writing back.

    Rows are sorted by (time, agent) and unique in it.

    Raises:
        UserError: arrays that do not fit together, rows out of order or twice.
    """

    name: str
    time: NDArray[np.float64]
    agent: NDArray[np.int64]
    xy: NDArray[np.float64]
    agent_names: tuple[str, ...]
    kind: tuple[str, ...]
    unit: str
    hz: float
    frame: NDArray[np.int64]

    def __post_init__(self) -> None:
        rows = len(self.time)
        if self.agent.shape != (rows,) or self.xy.shape != (rows, 2) or self.frame.shape != (rows,):
            raise UserError(f"{self.name}: time, agent, frame and xy do not have the same number of rows")
        if len(self.kind) != len(self.agent_names):
            raise UserError(f"{self.name}: {len(self.agent_names)} agents but {len(self.kind)} kinds")
        order = np.lexsort((self.agent, self.time))
        if rows and (order != np.arange(rows)).any():
            raise UserError(f"{self.name}: rows must be sorted by time, then agent")
        if rows > 1 and ((np.diff(self.time) == 0) & (np.diff(self.agent) == 0)).any():
            raise UserError(f"{self.name}: an agent has two rows at the same time")

    @property
    def num_agents(self) -> int:
        return len(self.agent_names)


@dataclass(frozen=True)
class Scenes:
    """Windows of tracks, padded to the same number of agents.

    Attributes:
        past: positions, float32 [S, A, T_o, 2]; where ``past_mask`` is false the value means nothing.
        future: positions, float32 [S, A, T_p, 2].
        agent_mask: bool [S, A]: the agent exists.
        past_mask: bool [S, A, T_o]: observed.
        future_mask: bool [S, A, T_p]: known.
        target_mask: bool [S, A]: agents that metrics and losses count.
        kind: int64 [S, A], see :data:`KINDS`.
        agent_id: int64 [S, A], the agent's index in its recording; -1 for padding.
        start: int64 [S], the recording's frame number of the first observed step.
        recording: name of the recording of every scene.
        unit: of the positions.
        hz: steps per second.
        name: of the data set.
    """

    past: torch.Tensor
    future: torch.Tensor
    agent_mask: torch.Tensor
    past_mask: torch.Tensor
    future_mask: torch.Tensor
    target_mask: torch.Tensor
    kind: torch.Tensor
    agent_id: torch.Tensor
    start: torch.Tensor
    recording: tuple[str, ...]
    unit: str
    hz: float
    name: str = ""

    def __len__(self) -> int:
        return len(self.past)

    @property
    def num_agents(self) -> int:
        """A."""
        return self.past.shape[1]

    @property
    def num_observed(self) -> int:
        """T_o."""
        return self.past.shape[2]

    @property
    def num_predicted(self) -> int:
        """T_p."""
        return self.future.shape[2]

    @property
    def num_targets(self) -> int:
        """Agents that metrics count, over all scenes."""
        return int(self.target_mask.sum())

    def subset(self, rows: torch.Tensor | Sequence[int]) -> Scenes:
        """Some scenes, cut to the agents that the fullest of them needs."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        mask = self.agent_mask[rows]
        width = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else 1
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                value = value[rows]
                values[item.name] = value[:, :width] if item.name != "start" else value
        values["recording"] = tuple(self.recording[int(row)] for row in rows)
        return replace(self, **values)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Scenes]:
        """Batches of at most ``size`` scenes, shuffled if there is a generator."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(size):
            yield self.subset(rows)

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        moved = {
            item.name: getattr(self, item.name).to(device)
            for item in fields(self)
            if isinstance(getattr(self, item.name), torch.Tensor)
        }
        return replace(self, **moved)

    @classmethod
    def joined(cls, parts: Sequence[Scenes]) -> Scenes:
        """All scenes of several sets of one unit and rate.

        Raises:
            UserError: nothing to join, or units, rates or lengths that differ.
        """
        if not parts:
            raise UserError("no scenes")
        first = parts[0]
        for part in parts:
            shape = (part.num_observed, part.num_predicted, part.unit, part.hz)
            if shape != (first.num_observed, first.num_predicted, first.unit, first.hz):
                raise UserError(f"{part.name} and {first.name} differ in steps, unit or rate and cannot be joined")
        width = max(part.num_agents for part in parts)
        values: dict[str, Any] = {
            item.name: torch.cat([_widened(getattr(part, item.name), width, item.name) for part in parts])
            for item in fields(cls)
            if isinstance(getattr(first, item.name), torch.Tensor)
        }
        return replace(first, **values, recording=tuple(name for part in parts for name in part.recording))


def _widened(value: torch.Tensor, width: int, name: str) -> torch.Tensor:
    """``value`` [S, A, ...] padded to ``width`` agents; ``start`` [S] stays."""
    if name == "start" or value.shape[1] == width:
        return value
    shape = (len(value), width - value.shape[1], *value.shape[2:])
    return torch.cat([value, value.new_full(shape, -1 if name == "agent_id" else 0)], dim=1)


@dataclass(frozen=True)
class Forecast:
    """Possible futures of the agents of one scene, with probabilities.

    Attributes:
        trajectories: positions in the unit of the input, float32 [K, A, T_p, 2].
        probabilities: float32 [K, A]; over K they add up to 1 for every agent. Joint forecasts have equal columns.
        agents: name of each agent, in the order of A.
        hz: steps per second.
        unit: of the positions.
        joint: whether forecast k of one agent goes with forecast k of the others.
        extra: more about the forecast: ``seconds`` that it took; if it is calibrated, ``radius_50`` and ``radius_90``:
            per step, how near to one of the forecasts the truth is with that probability.
    """

    trajectories: torch.Tensor
    probabilities: torch.Tensor
    agents: tuple[str, ...]
    hz: float
    unit: str
    joint: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
