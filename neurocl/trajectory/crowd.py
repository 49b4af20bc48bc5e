"""A synthetic crowd: walkers driven by social forces, for trying things where no recording may be at hand.

Nothing here is recorded. Every walker is pulled to the next point of its route at its own speed and pushed away by
others and by walls (Helbing and Molnar). Three kinds of place are simulated:

- ``crossing``: two corridors that cross; who reaches the middle goes on, or turns left or right.
- ``bottleneck``: a hall that narrows to a door from both sides; behind it people fan out to three exits.
- ``plaza``: an open square with five exits; some change their mind on the way.

Walkers decide when they come near the point of decision and not before, so the past does not tell which of several
futures follows; speeds change now and then, and some stop for a while. Positions are in metres, 2.5 rows per second.

``W`` walkers, ``L`` walls, ``P`` points of a route.

Reference: D. Helbing, P. Molnar, "Social force model for pedestrian dynamics", Physical Review E 51, 1995,
arXiv cond-mat/9805244; parameters near those of the paper, in seconds and metres.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.trajectory.scenes import Scenes, TrackSet
from neurocl.trajectory.windows import cut

Floats = NDArray[np.float64]
Split = Literal["train", "val", "test"]
PLACES = ("crossing", "bottleneck", "plaza")

CROWD_HZ = 2.5
SUBSTEPS = 8  # the forces are followed in steps of 0.05 s
RELAXATION = 0.5  # seconds to get back to the wanted velocity
REPULSION = 2.1  # m^2/s^2, potential of two walkers
REACH = 0.3  # m, how fast it falls off
STEP_TIME = 1.0  # s, how far ahead the other is thought to go (semi-minor axis of the ellipse)
WALL_REPULSION = 10.0
WALL_REACH = 0.2
BEHIND = 0.5  # weight of forces from outside of the field of view
VIEW_COSINE = np.cos(np.deg2rad(100.0))
MAX_SPEED_FACTOR = 1.3
ARRIVED = 1.0  # m, from where the next point of the route is aimed at
NOISE = 0.35  # m/s^2, fluctuation of the acceleration
RECORDINGS: dict[Split, int] = {"train": 18, "val": 3, "test": 6}
ROWS = 220  # per recording, 88 s


@dataclass(frozen=True)
class Place:
    """Where people walk.

    Attributes:
        walls: ends of straight walls [L, 2, 2] in metres.
        route: draws a route [P, 2]: where the walker enters, where it decides, and where it leaves.
        rate: walkers per second.
    """

    walls: Floats
    route: Callable[[np.random.Generator], Floats]
    rate: float


def _around(generator: np.random.Generator, x: float, y: float, spread_x: float, spread_y: float) -> Floats:
    return np.array([x + generator.uniform(-spread_x, spread_x), y + generator.uniform(-spread_y, spread_y)])


def _crossing() -> Place:
    half, end = 2.0, 12.0
    corners = [(sx * half, sy * half) for sx in (-1, 1) for sy in (-1, 1)]
    walls = [wall for x, y in corners for wall in (((x, y), (np.sign(x) * end, y)), ((x, y), (x, np.sign(y) * end)))]
    directions = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])

    def route(generator: np.random.Generator) -> Floats:
        source = generator.integers(4)
        # Straight on, left or right.
        target = (source + generator.choice([2, 1, 3], p=[0.5, 0.25, 0.25])) % 4
        side = np.array([[0.0, 1.0], [1.0, 0.0]])[[source % 2, target % 2]]
        lane = generator.uniform(-1.3, 1.3, size=2)
        enter = directions[source] * (end + 1) + side[0] * lane[0]
        decide = directions[source] * 2.2 + side[0] * lane[0]
        leave = directions[target] * (end + 1) + side[1] * lane[1]
        turn = directions[target] * 2.2 + side[1] * lane[1]
        return np.stack([enter, decide, turn, leave])

    return Place(np.array(walls, dtype=np.float64), route, 0.9)


def _bottleneck() -> Place:
    door, depth, height = 1.1, 0.0, 6.0
    walls = np.array(
        [
            [[depth, door], [depth, height]],
            [[depth, -door], [depth, -height]],
            [[-12.0, height], [12.0, height]],
            [[-12.0, -height], [12.0, -height]],
        ]
    )

    def route(generator: np.random.Generator) -> Floats:
        side = generator.choice([-1.0, 1.0], p=[0.75, 0.25])
        enter = np.array([side * 12.0, generator.uniform(-5.0, 5.0)])
        through = _around(generator, depth, 0.0, 0.0, 0.5)
        exit_y = generator.choice([-4.5, 0.0, 4.5], p=[0.35, 0.3, 0.35])
        leave = _around(generator, -side * 12.5, exit_y, 0.0, 0.8)
        return np.stack([enter, through, leave])

    return Place(walls, route, 0.6)


def _plaza() -> Place:
    radius, exits = 11.0, 5
    angles = 2 * np.pi * (np.arange(exits) + 0.25) / exits
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (radius + 1.5)
    # Walls between the exits, each leaving an opening at the corner.
    walls = np.array(
        [
            [one + 0.22 * (other - one), other + 0.22 * (one - other)]
            for one, other in zip(corners, np.roll(corners, -1, axis=0), strict=True)
        ]
    )

    def route(generator: np.random.Generator) -> Floats:
        source, target = generator.choice(exits, size=2, replace=False)
        points = [_around(generator, corners[source, 0], corners[source, 1], 0.8, 0.8)]
        if generator.random() < 0.4:
            # Walks to one exit first and turns to another in the middle of the square.
            points.append(_around(generator, 0.0, 0.0, 4.0, 4.0))
            target = generator.choice([index for index in range(exits) if index != source])
        points.append(_around(generator, corners[target, 0], corners[target, 1], 0.8, 0.8) * 1.08)
        return np.stack(points)

    return Place(walls, route, 0.8)


def place_of(name: str) -> Place:
    """One of :data:`PLACES`.

    Raises:
        UserError: no such place.
    """
    places = {"crossing": _crossing, "bottleneck": _bottleneck, "plaza": _plaza}
    if name not in places:
        raise UserError(f"no place {name!r} in the synthetic crowd; there are {', '.join(PLACES)}")
    return places[name]()


def social_force(
    position: Floats,
    velocity: Floats,
    goal: Floats,
    speed: Floats,
    walls: Floats,
) -> Floats:
    """Accelerations of all walkers in m/s^2.

    Args:
        position: [W, 2] in metres.
        velocity: [W, 2].
        goal: the point that each walker aims at [W, 2].
        speed: the speed that each one likes [W].
        walls: ends of the walls [L, 2, 2].

    Returns: [W, 2]: the pull to the wanted velocity, the push of the others (an ellipse along their way, weaker from
        behind), the push of the nearest point of every wall.
    """
    way = goal - position
    heading = way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9)
    force: Floats = (heading * speed[:, None] - velocity) / RELAXATION
    force += _from_others(position, velocity, heading) + _from_walls(position, walls)
    return force


def _from_others(position: Floats, velocity: Floats, heading: Floats) -> Floats:
    apart = position[:, None] - position[None]
    distance = np.linalg.norm(apart, axis=2)
    stride = velocity[None] * STEP_TIME
    ahead = apart - stride
    further = np.linalg.norm(ahead, axis=2)
    step = np.linalg.norm(velocity, axis=1)[None] * STEP_TIME
    total = distance + further
    minor = 0.5 * np.sqrt(np.maximum(total**2 - step**2, 1e-6))
    # Minus the gradient of REPULSION * exp(-minor / REACH).
    strength = REPULSION / REACH * np.exp(-minor / REACH) * total / (4 * minor)
    safe, further = np.maximum(distance, 1e-6), np.maximum(further, 1e-6)
    push = strength[..., None] * (apart / safe[..., None] + ahead / further[..., None])
    seen = np.einsum("wi,wvi->wv", heading, -apart) >= distance * VIEW_COSINE
    weight = np.where(seen, 1.0, BEHIND)
    np.fill_diagonal(weight, 0.0)
    summed: Floats = np.einsum("wv,wvi->wi", weight, push)
    size = np.linalg.norm(summed, axis=1, keepdims=True)
    # Two walkers in one spot must not be thrown out of the picture.
    summed *= np.minimum(1.0, 8.0 / np.maximum(size, 1e-9))
    return summed


def _from_walls(position: Floats, walls: Floats) -> Floats:
    start, along = walls[:, 0], walls[:, 1] - walls[:, 0]
    share = np.einsum("wli,li->wl", position[:, None] - start, along) / np.einsum("li,li->l", along, along)
    nearest = start + np.clip(share, 0.0, 1.0)[..., None] * along
    apart = position[:, None] - nearest
    distance = np.maximum(np.linalg.norm(apart, axis=2), 1e-6)
    push = WALL_REPULSION / WALL_REACH * np.exp(-distance / WALL_REACH) / distance
    push = np.minimum(push, 20.0 / distance)
    summed: Floats = np.einsum("wl,wli->wi", push, apart)
    return summed


def simulate(place: str, seed: int, *, rows: int = ROWS, name: str | None = None) -> TrackSet:
    """One synthetic recording at 2.5 Hz.

    Args:
        place: one of :data:`PLACES`.
        seed: the same seed gives the same recording.
        rows: length of the recording; people have been walking for 20 seconds when it begins.
        name: of the recording.

    Raises:
        UserError: no such place, or no rows.
    """
    if rows < 1:
        raise UserError(f"rows must be at least 1, got {rows}")
    ground = place_of(place)
    generator = np.random.default_rng([seed, zlib.crc32(place.encode())])
    warm_up = 50
    step = 1 / (CROWD_HZ * SUBSTEPS)
    routes, born = _walkers(ground, generator, (warm_up + rows) / CROWD_HZ)
    count, points = len(routes), max(len(route) for route in routes)
    path = np.stack([np.concatenate([route, np.repeat(route[-1:], points - len(route), 0)]) for route in routes])
    length = np.array([len(route) for route in routes])
    liked = np.clip(generator.normal(1.3, 0.25, size=count), 0.6, 2.0)
    position, velocity = path[:, 0].copy(), np.zeros((count, 2))
    aim, left, pause, mood = (
        np.ones(count, dtype=np.int64),
        np.zeros(count, dtype=bool),
        np.zeros(count),
        np.ones(count),
    )
    found: list[tuple[NDArray[np.int64], int, Floats]] = []
    for row in range(-warm_up, rows):
        now = (row + warm_up) / CROWD_HZ
        here = np.flatnonzero((born <= now) & ~left)
        fresh = here[born[here] > now - 1 / CROWD_HZ]
        heading = path[fresh, 1] - path[fresh, 0]
        velocity[fresh] = heading / np.linalg.norm(heading, axis=1, keepdims=True) * liked[fresh, None]
        if row >= 0:
            found.append((here, row, position[here].copy()))
        _change_mood(generator, here, mood, pause)
        for _ in range(SUBSTEPS):
            goal = path[here, aim[here]]
            speed = liked[here] * np.where(pause[here] > 0, 0.05, mood[here])
            force = social_force(position[here], velocity[here], goal, speed, ground.walls)
            # The noise of one second is the same whatever the step.
            force += generator.normal(0.0, NOISE * np.sqrt(0.05 / step), size=force.shape)
            faster = velocity[here] + force * step
            size = np.linalg.norm(faster, axis=1, keepdims=True)
            velocity[here] = faster * np.minimum(1.0, MAX_SPEED_FACTOR * liked[here, None] / np.maximum(size, 1e-9))
            position[here] += velocity[here] * step
            near = np.linalg.norm(path[here, aim[here]] - position[here], axis=1) < ARRIVED
            aim[here[near]] += 1
            left |= aim >= length
            aim = np.minimum(aim, points - 1)
            here = here[~left[here]]
        pause[here] = np.maximum(0.0, pause[here] - 1 / CROWD_HZ)
    return _recorded(found, name or f"{place}-{seed}")


def _walkers(ground: Place, generator: np.random.Generator, seconds: float) -> tuple[list[Floats], Floats]:
    """Routes and the times at which they begin; now and then two or three walk together."""
    routes: list[Floats] = []
    born: list[float] = []
    now = 0.0
    while now < seconds:
        route = ground.route(generator)
        routes.append(route)
        born.append(now)
        for _ in range(generator.choice([0, 1, 2], p=[0.75, 0.2, 0.05])):
            routes.append(route + generator.uniform(-0.7, 0.7, size=2))
            born.append(now + generator.uniform(0.3, 0.6))
        now += generator.exponential(1 / ground.rate)
    return routes, np.array(born)


def _change_mood(generator: np.random.Generator, here: NDArray[np.int64], mood: Floats, pause: Floats) -> None:
    """Every ten seconds or so a walker hurries or dawdles; every minute or two one stands still for a few seconds."""
    chance = generator.random((2, len(here)))
    changing, stopping = here[chance[0] < 0.04], here[chance[1] < 0.004]
    mood[changing] = generator.uniform(0.6, 1.3, size=len(changing))
    pause[stopping] = generator.uniform(2.0, 6.0, size=len(stopping))


def _recorded(found: list[tuple[NDArray[np.int64], int, Floats]], name: str) -> TrackSet:
    walker = np.concatenate([here for here, _, _ in found])
    frame = np.concatenate([np.full(len(here), row, dtype=np.int64) for here, row, _ in found])
    names, agent = np.unique(walker, return_inverse=True)
    return TrackSet(
        name=name,
        time=frame / CROWD_HZ,
        agent=agent.astype(np.int64),
        xy=np.concatenate([places for _, _, places in found]),
        agent_names=tuple(str(number) for number in names),
        kind=("pedestrian",) * len(names),
        unit="m",
        hz=CROWD_HZ,
        frame=frame,
    )


def crowd_scenes(
    split: Split = "train",
    seed: int = 0,
    *,
    num_observed: int = 8,
    num_predicted: int = 12,
    stride: int = 1,
) -> Scenes:
    """Windows of synthetic recordings, the three places in turn; splits never share a recording.

    Args:
        split: ``train`` (18 recordings of 88 s), ``val`` (3) or ``test`` (6).
        seed: of the recordings.
        num_observed: T_o.
        num_predicted: T_p.
        stride: steps from one window to the next.

    Raises:
        UserError: no such split.
    """
    if split not in RECORDINGS:
        raise UserError(f"no split {split!r}; there are {', '.join(RECORDINGS)}")
    offset = {"train": 0, "val": 1000, "test": 2000}[split]
    recordings = [
        simulate(PLACES[index % len(PLACES)], 10_000 * seed + offset + index) for index in range(RECORDINGS[split])
    ]
    return cut(recordings, num_observed, num_predicted, stride=stride, name="crowd")
