"""Live feeds: positions that come in instant by instant, what has to be remembered of them, and a forecast after each.

``K`` forecasts, ``A`` agents, ``T_o`` and ``T_p`` observed and predicted steps, ``R`` remembered rows of an agent.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.registry import did_you_mean
from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
from neurocl.trajectory.resample import MAX_GAP_SECONDS
from neurocl.trajectory.rows import MAX_LINE, agent_label
from neurocl.trajectory.scenes import KINDS, Forecast, TrackSet

MAX_AGENTS = 100
MIN_HZ = 2 / MAX_GAP_SECONDS  # a feed that is thinned to less would have gaps that are not filled
MAX_POSITION = 1e9  # beyond, float32 is no use and squares of distances may overflow
CLOCK_SLACK = 1e-3  # of a step; rows as near to a step as this lie on it


@dataclass
class _Track:
    """What is remembered of an agent: rows (t, x, y), the newest last."""

    kind: str
    rows: deque[tuple[float, float, float]]


class Streamer:
    """Forecasts a scene while it happens.

    The positions remembered are put on the model's steps, which count back from the newest time: rows that lie on a
    step as they are, others on straight lines between rows that are at most half a second apart; wider gaps, and what
    was before an agent came, are masked. So a forecast is possible from the first update on. An agent that was not seen
    for longer than the observed span is forgotten, and is a new one when it comes back.

    A forecast depends on what was fed in and on ``sampling.seed``, never on the clock of the machine. Of a window that
    lies on the model's steps it is the one of :meth:`Forecaster.forecast_tracks`, bit for bit, if the recording lists
    its agents in the order in which they came: draws go to agents by their order.

    At most ``max_agents`` agents with about 3.3 s times ``hz`` rows (8 steps at 2.5 Hz and half a second) are
    remembered, however long the feed.

    Args:
        forecaster: positions come in the unit of its training data.
        hz: rows per second and agent that are remembered, at least 4 and the model's rate. Faster feeds are thinned,
            but the newest row always counts.
        every: seconds of the feed's time that lie at least between forecasts; 0 forecasts at every update.
        num_samples: K forecasts of each agent.
        sampling: see :class:`SamplingConfig`.
        max_agents: remembered at a time. When more come, those who left first are forgotten; more of them in one update
            are a mistake.

    Raises:
        UserError: a rate, time or number out of range.
    """

    def __init__(
        self,
        forecaster: Forecaster,
        hz: float = 100.0,
        *,
        every: float = 0.0,
        num_samples: int = 20,
        sampling: SamplingConfig | None = None,
        max_agents: int = MAX_AGENTS,
    ) -> None:
        rate = forecaster.shape.hz
        slowest = max(MIN_HZ, rate)
        if not slowest <= hz < math.inf:
            raise UserError(f"hz must be at least {slowest:g} for a model of {rate:g} steps per second, got {hz}")
        if not 0 <= every < math.inf:
            raise UserError(f"every must be 0 or more seconds, got {every}")
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, got {num_samples}")
        if max_agents < 1:
            raise UserError(f"max_agents must be at least 1, got {max_agents}")
        self.forecaster = forecaster
        self.every = every
        self.num_samples = num_samples
        self.sampling = sampling
        self.max_agents = max_agents
        self._slack = CLOCK_SLACK / rate
        self._steps = np.arange(1 - forecaster.num_observed, 1) / rate
        span = -float(self._steps[0])
        self._memory = max(span, MAX_GAP_SECONDS) + self._slack
        # A row before the first step may still be one end of a line to a row after it.
        self._reach = span + MAX_GAP_SECONDS + self._slack
        # A little less than 1 / hz, so that times that tremble around the full rate are all kept.
        self._spacing = 0.9 / hz
        self._max_rows = math.ceil(self._reach / self._spacing) + 2
        self._tracks: dict[str, _Track] = {}
        self._now = -math.inf
        self._last_forecast = -math.inf

    @property
    def agents(self) -> tuple[str, ...]:
        """Names of the agents that are remembered, in the order in which they came."""
        return tuple(self._tracks)

    def update(
        self, t: float, positions: Mapping[Any, Sequence[float]], kinds: Mapping[Any, str] | None = None
    ) -> Forecast | None:
        """Take in the positions of one instant, and forecast those who are there.

        Args:
            t: seconds, later than in the update before; from any zero.
            positions: (x, y) of each agent that is seen now; may be empty.
            kinds: what agents are, see :data:`KINDS`; remembered as long as the agent, at first ``pedestrian``.

        Returns: the forecast, with ``t`` in its ``extra``; None if nobody is there or ``every`` has not passed.
        Raises:
            UserError: a time that does not go on, a position that is not two finite numbers, an agent that is there
                twice, an unknown kind, too many agents. Nothing of the update is remembered.
        """
        rows, named = self._checked(t, positions, kinds or {})
        self._now = t
        self._forget(rows)
        for name, (x, y) in rows.items():
            track = self._tracks.get(name)
            if track is None:
                track = self._tracks[name] = _Track("pedestrian", deque(maxlen=self._max_rows))
            own = track.rows
            if len(own) > 1 and own[-1][0] - own[-2][0] < self._spacing:
                own.pop()
            own.append((t, x, y))
            while own[0][0] < t - self._reach:
                own.popleft()
        for name, kind in named.items():
            self._tracks[name].kind = kind
        if not rows or t < self._last_forecast + self.every - self._slack:
            return None
        found, _ = self.forecaster.forecast_tracks(self.window(), self.num_samples, sampling=self.sampling)
        self._last_forecast = t
        return replace(found, extra={"t": t, **found.extra})

    def window(self) -> TrackSet:
        """What the model sees: the remembered agents on its T_o steps, the last of which is the newest time."""
        names = list(self._tracks)
        seen = np.zeros((len(names), len(self._steps)), dtype=np.bool_)
        xy = np.zeros((*seen.shape, 2))
        for index, track in enumerate(self._tracks.values()):
            xy[index], seen[index] = self._on_steps(np.array(track.rows))
        kept = np.flatnonzero(seen.any(axis=1))
        step, agent = np.nonzero(seen[kept].T)
        return TrackSet(
            name="the feed",
            time=step / self.forecaster.shape.hz,
            agent=agent.astype(np.int64),
            xy=xy[kept[agent], step],
            agent_names=tuple(names[index] for index in kept),
            kind=tuple(self._tracks[names[index]].kind for index in kept),
            unit=self.forecaster.shape.unit,
            hz=self.forecaster.shape.hz,
            frame=step.astype(np.int64),
        )

    def _on_steps(self, rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Positions [T_o, 2] of rows [R, 3] on the steps, and where they are known."""
        time, xy = rows[:, 0] - self._now, rows[:, 1:]
        before = np.searchsorted(time, self._steps + self._slack, side="right") - 1
        left, right = np.maximum(before, 0), np.minimum(before + 1, len(time) - 1)
        exact = (before >= 0) & (time[left] >= self._steps - self._slack)
        width = time[right] - time[left]
        between = (before >= 0) & (right > left) & (width <= MAX_GAP_SECONDS + self._slack)
        share = np.where(exact | ~between, 0.0, (self._steps - time[left]) / np.where(between, width, 1.0))[:, None]
        # Rows on a step are taken as they are: a weighted mean would differ in the last bit.
        return np.where(share > 0, xy[left] * (1 - share) + xy[right] * share, xy[left]), exact | between

    def _checked(
        self, t: float, positions: Mapping[Any, Sequence[float]], kinds: Mapping[Any, str]
    ) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
        if not math.isfinite(t):
            raise UserError(f"time {t} is not a finite number of seconds")
        if t == self._now:
            raise UserError(f"time {t:.15g} was given already")
        if t < self._now:
            raise UserError(f"time {t:.15g} comes after {self._now:.15g}; time must not go backwards")
        if len(positions) > self.max_agents:
            raise UserError(f"{len(positions)} agents at time {t:.15g}, at most {self.max_agents} are followed")
        rows: dict[str, tuple[float, float]] = {}
        for agent, value in positions.items():
            name = str(agent)
            if name in rows:
                raise UserError(f"agent {reprlib.repr(name)} is there twice at time {t:.15g}")
            rows[name] = checked_position(name, value)
        named = {str(agent): kind for agent, kind in kinds.items()}
        for name, kind in named.items():
            if name not in rows:
                raise UserError(f"agent {reprlib.repr(name)} has a kind but no position at time {t:.15g}")
            if kind not in KINDS:
                hint = did_you_mean(str(kind), KINDS)
                raise UserError(f"unknown kind {reprlib.repr(kind)}{hint} (choose from {', '.join(KINDS)})")
        return rows, named

    def _forget(self, rows: Mapping[str, object]) -> None:
        """Drop who was not seen for too long, and then, if the new ones do not fit, who was not seen for longest."""
        for name in [name for name, track in self._tracks.items() if track.rows[-1][0] < self._now - self._memory]:
            del self._tracks[name]
        absent = [name for name in self._tracks if name not in rows]
        surplus = len(absent) + len(rows) - self.max_agents
        if surplus > 0:
            for name in sorted(absent, key=lambda name: self._tracks[name].rows[-1][0])[:surplus]:
                del self._tracks[name]


def checked_position(name: str, value: Sequence[float]) -> tuple[float, float]:
    """The position of an agent as two numbers.

    Raises:
        UserError: it is something else, not finite, or too large.
    """
    try:
        xy = np.asarray(value)
    except ValueError:  # lists of several lengths
        xy = np.empty(0)
    if xy.shape != (2,) or xy.dtype.kind not in "iuf":
        raise UserError(f"the position of agent {reprlib.repr(name)} must be two numbers, got {reprlib.repr(value)}")
    x, y = float(xy[0]), float(xy[1])
    if not (math.isfinite(x) and math.isfinite(y)):
        raise UserError(f"the position of agent {reprlib.repr(name)} is not finite: ({x:g}, {y:g})")
    if max(abs(x), abs(y)) > MAX_POSITION:
        raise UserError(f"the position of agent {reprlib.repr(name)} is out of range: ({x:g}, {y:g})")
    return x, y


@dataclass
class Instant:
    """One instant of a feed.

    Attributes:
        line: where it starts in the feed, from 1.
        t: seconds.
        positions: of the agents, not checked yet if they come from JSON.
        kinds: of agents, if the feed says.
    """

    line: int
    t: float
    positions: dict[str, Any]
    kinds: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadLine:
    """A line of a feed that says nothing, and why."""

    line: int
    reason: str


def read_feed(source: IO[bytes], max_agents: int = MAX_AGENTS) -> Iterator[Instant | BadLine]:
    """Instants from lines, each as soon as it is complete.

    A line is either a JSON object ``{"t": 0.4, "agents": {"7": [1.0, 2.0]}}``, optionally with
    ``"kinds": {"7": "cyclist"}``, other keys are ignored; or ``t,id,x,y``, where a row with a later t completes the
    instant before. Blank lines and a first line ``t,id,x,y`` are skipped. Agents ``7`` and ``7.0`` are the same.

    Args:
        source: lines of at most 64 KiB; of longer ones no more than that is ever held.
        max_agents: rows of one instant.
    """
    rows: Instant | None = None
    for line, raw in _lines(source):
        try:
            text = _text(line, raw)
            if not text or (line == 1 and text.lower().replace(" ", "") == "t,id,x,y"):
                continue
            whole = text.startswith("{")
            found = _instant(line, text) if whole else _joined(rows, line, text, max_agents)
        except UserError as error:
            yield BadLine(line, str(error))
            continue
        if rows is not None and found is not rows:
            yield rows
        rows = None if whole else found
        if whole:
            yield found
    if rows is not None:
        yield rows


def _lines(source: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line, None for a line that is too long."""
    line = 0
    while raw := source.readline(MAX_LINE + 1):
        line += 1
        if len(raw) <= MAX_LINE or raw.endswith(b"\n"):
            yield line, raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = source.readline(MAX_LINE)
        yield line, None


def _text(line: int, raw: bytes | None) -> str:
    if raw is None:
        raise UserError(f"a line of more than {MAX_LINE} bytes")
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError("bytes that are not UTF-8 text") from error


def _instant(line: int, text: str) -> Instant:
    """The instant of a JSON line."""
    try:
        document = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError("not JSON that can be read (a number too long, or nested too deep)") from error
    for key in ("t", "agents"):
        if key not in document:
            raise UserError(f'no {key!r}; a line is {{"t": 0.4, "agents": {{"7": [1.0, 2.0]}}}}')
    t, agents, kinds = document["t"], document["agents"], document.get("kinds", {})
    if isinstance(t, bool) or not isinstance(t, int | float):
        raise UserError(f"'t' must be a number of seconds, got {reprlib.repr(t)}")
    for key, value in (("agents", agents), ("kinds", kinds)):
        if not isinstance(value, dict):
            raise UserError(f"{key!r} must be an object with a value for each agent, got {reprlib.repr(value)}")
    pairs = [(agent_label(name), value) for name, value in agents.items()]
    return Instant(
        line, _seconds(t), _without_repeats(pairs), {agent_label(name): value for name, value in kinds.items()}
    )


def _joined(rows: Instant | None, line: int, text: str, max_agents: int) -> Instant:
    """The row ``t,id,x,y`` put to those of its time: ``rows`` itself, or a new instant if it is later."""
    cells = [cell.strip() for cell in text.split(",")]
    if len(cells) != 4:
        raise UserError(f"{reprlib.repr(text)} is neither a JSON object nor t,id,x,y")
    try:
        t, x, y = (float(cells[place]) for place in (0, 2, 3))
    except ValueError as error:
        raise UserError(f"{reprlib.repr(text)} is not t,id,x,y with numbers t, x, y") from error
    t, name = _seconds(t), agent_label(cells[1])
    if not name:
        raise UserError(f"{reprlib.repr(text)} has no id")
    position = checked_position(name, (x, y))
    if rows is None or t > rows.t:
        return Instant(line, t, {name: position})
    if t < rows.t:
        raise UserError(f"time {t:.15g} comes after {rows.t:.15g}; time must not go backwards")
    if name in rows.positions:
        raise UserError(f"agent {reprlib.repr(name)} is there twice at time {t:.15g}")
    if len(rows.positions) >= max_agents:
        raise UserError(f"more than {max_agents} agents at time {t:.15g}")
    rows.positions[name] = position
    return rows


def _seconds(value: float) -> float:
    try:
        t = float(value)
    except OverflowError:
        t = math.inf
    if not math.isfinite(t):
        raise UserError(f"time {t} is not a finite number of seconds")
    return t


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise UserError(f"{reprlib.repr(twice)} is there twice")
    return found


def forecast_line(forecast: Forecast) -> str:
    """A forecast as one line of JSON: time, rate, unit, and of every agent probabilities [K] and paths [K, T_p, 2].

    The time that the forecast took is left out, so that the same feed gives the same lines.
    """
    facts: dict[str, Any] = {name: value for name, value in forecast.extra.items() if name != "seconds"}
    facts |= {"hz": forecast.hz, "unit": forecast.unit, "joint": forecast.joint}
    count, num_agents, num_steps, _ = forecast.trajectories.shape
    # Numbers go into a text of the right shape at once, with as many digits as a float32 has: nested lists of them
    # would take longer than the model needs for a small scene.
    path = f"[{_many('[%.9g, %.9g]', num_steps)}]"
    agent = f'{{"probabilities": [{_many("%.9g", count)}], "trajectories": [{_many(path, count)}]}}'
    shares = forecast.probabilities.T.cpu()
    paths = forecast.trajectories.transpose(0, 1).reshape(num_agents, -1).cpu()
    agents = (
        f"{json.dumps(name)}: " + agent % tuple(torch.cat([shares[index], paths[index]]).tolist())
        for index, name in enumerate(forecast.agents)
    )
    return f'{json.dumps(facts)[:-1]}, "agents": {{{", ".join(agents)}}}}}'


def _many(text: str, count: int) -> str:
    return ", ".join([text] * count)
