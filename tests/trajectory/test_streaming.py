"""Streaming: the forecast of the window, whatever the feed looks like, and bounded memory."""

import io
import json
import math

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory.denoiser import TrunkConfig
from neurocl.trajectory.forecaster import Forecaster, Networks, SamplingConfig, Shape
from neurocl.trajectory.resample import to_rate
from neurocl.trajectory.rows import MAX_LINE
from neurocl.trajectory.scenes import TrackSet
from neurocl.trajectory.streaming import BadLine, Instant, Streamer, forecast_line, read_feed
from neurocl.trajectory.vqvae import VqVaeConfig
from neurocl.trajectory.windows import last_window

OBSERVED, PREDICTED, HZ = 8, 12, 2.5
SAMPLING = SamplingConfig(steps=3, num_samples=12, seed=5)


def forecaster_at(hz=HZ):
    torch.manual_seed(0)
    sizes = {"num_observed": OBSERVED, "num_predicted": PREDICTED}
    vqvae = VqVaeConfig(width=16, heads=2, hidden=16, num_codes=8, rank=2, dropout=0.0, **sizes)
    trunk = TrunkConfig(context_width=16, width=16, heads=2, hidden=16, num_predicted=PREDICTED)
    shape = Shape(vqvae, trunk, "diffusion", 10, "m", hz)
    return Forecaster(shape, Networks(shape))


@pytest.fixture(scope="module")
def forecaster():
    return forecaster_at()


def streamer_of(forecaster, **options):
    return Streamer(forecaster, **({"num_samples": 4, "sampling": SAMPLING} | options))


def walk(steps, agents=3, seed=0):
    """Positions [steps, agents, 2]."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-5, 5, (agents, 2)) + rng.normal(0.3, 0.1, (steps, agents, 2)).cumsum(axis=0)


def track_set(rows, hz=HZ):
    """Rows (time, agent, x, y) as a recording."""
    agents = tuple(dict.fromkeys(str(int(agent)) for _, agent, _, _ in rows))
    table = np.array([(t, agents.index(str(int(agent))), x, y) for t, agent, x, y in rows])
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    return TrackSet(
        name="rows",
        time=table[:, 0],
        agent=table[:, 1].astype(np.int64),
        xy=table[:, 2:],
        agent_names=agents,
        kind=("pedestrian",) * len(agents),
        unit="m",
        hz=hz,
        frame=np.rint(table[:, 0] * hz).astype(np.int64),
    )


def fed(streamer, rows):
    """The forecast after the last of rows (time, agent, x, y)."""
    found = None
    for t in sorted({row[0] for row in rows}):
        found = streamer.update(t, {int(agent): (x, y) for time, agent, x, y in rows if time == t})
    return found


def assert_same(one, other):
    assert one.agents == other.agents
    assert torch.equal(one.trajectories, other.trajectories)
    assert torch.equal(one.probabilities, other.probabilities)


@pytest.mark.parametrize("zero", [0.0, 1.7e9], ids=["from zero", "unix time"])
@pytest.mark.parametrize("hz", [1.0, 2.5, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_window_on_the_steps_of_the_model_gives_the_forecast_of_the_recording_bit_for_bit(hz, seed, zero):
    model = forecaster_at(hz)
    xy = walk(OBSERVED, seed=seed)
    rows = [(zero + step / hz, agent, *xy[step, agent]) for step in range(OBSERVED) for agent in range(3)]
    expected, _ = model.forecast_tracks(track_set(rows, hz), 4, sampling=SAMPLING)
    assert_same(fed(streamer_of(model), rows), expected)


def test_late_agents_gaps_and_leavers_on_the_steps_give_the_forecast_of_the_recording(forecaster):
    xy = walk(30, agents=5)
    there = np.ones((30, 5), dtype=bool)
    there[:28, 1] = False  # came one step ago
    there[24:26, 2] = False  # was hidden
    there[27:, 3] = False  # has left
    there[20:, 4] = False  # left before the window
    rows = [(0.4 * step, agent, *xy[step, agent]) for step in range(30) for agent in range(5) if there[step, agent]]
    streamer = streamer_of(forecaster)
    found = fed(streamer, rows)
    expected, scenes = forecaster.forecast_tracks(track_set(rows), 4, sampling=SAMPLING)
    # The recording counts its agents in the order in which they come, too.
    assert_same(found, expected)
    assert found.agents == ("0", "2", "1")
    assert scenes.num_agents == 4
    assert streamer.agents == ("0", "2", "3", "1")


def test_every_update_of_a_long_feed_equals_the_window_that_ends_there(forecaster):
    xy, streamer = walk(20), streamer_of(forecaster)
    for now in range(20):
        found = streamer.update(0.4 * now, dict(enumerate(xy[now].tolist())))
        first = max(0, now - OBSERVED + 1)
        rows = [(0.4 * step, agent, *xy[step, agent]) for step in range(first, now + 1) for agent in range(3)]
        expected, _ = forecaster.forecast_tracks(track_set(rows), 4, sampling=SAMPLING)
        assert_same(found, expected)
        assert found.extra["t"] == 0.4 * now


def test_irregular_times_are_brought_to_steps_that_count_back_from_now(forecaster):
    rng = np.random.default_rng(1)
    times = np.concatenate([[0.0], np.cumsum(rng.uniform(0.05, 0.45, 20))])
    start, speed = np.array([1.0, -2.0]), np.array([0.7, 0.2])
    streamer = streamer_of(forecaster)
    for t in times:
        streamer.update(t, {"a": start + speed * t})
    window = streamer.window()
    steps = times[-1] - np.arange(OBSERVED)[::-1] / HZ
    np.testing.assert_allclose(window.xy, start + speed * steps[:, None], atol=1e-12)


def test_a_fast_feed_gives_what_resampling_the_recording_gives(forecaster):
    xy = walk(200, agents=2)
    rows = [(step / 30, agent, *xy[step, agent]) for step in range(200) for agent in range(2)]
    streamer = streamer_of(forecaster, every=1e9)
    fed(streamer, rows)
    recording = to_rate(track_set(rows, 30.0), HZ, origin=rows[-1][0])
    expected = last_window(recording, OBSERVED, PREDICTED)
    now = last_window(streamer.window(), OBSERVED, PREDICTED)
    torch.testing.assert_close(now.past, expected.past, rtol=1e-6, atol=1e-6)
    assert torch.equal(now.past_mask, expected.past_mask)


def test_gaps_are_filled_up_to_half_a_second_and_stay_masked_beyond():
    model = forecaster_at(5.0)
    for gap, filled in ((0.5, True), (0.55, False)):
        streamer = streamer_of(model)
        # Rows on the steps, but for those within a gap that ends 0.3 s ago.
        for t in (-1.4, -1.2, -1.0, -0.3 - gap, -0.3, -0.2, 0.0):
            streamer.update(t, {"a": (t, 0.0)})
        steps = streamer.window().frame.tolist()
        assert steps == ([0, 1, 2, 3, 4, 5, 6, 7] if filled else [0, 1, 2, 6, 7])


def test_an_agent_that_is_not_seen_now_is_a_neighbour_and_not_forecast(forecaster):
    streamer = streamer_of(forecaster)
    streamer.update(0.0, {"a": (0, 0), "b": (1, 0)})
    found = streamer.update(0.4, {"a": (0.1, 0)})
    assert found.agents == ("a",)
    assert streamer.window().agent_names == ("a", "b")
    # The neighbour is seen by the model: without it the forecast is another one.
    alone = streamer_of(forecaster)
    alone.update(0.0, {"a": (0, 0)})
    assert not torch.equal(alone.update(0.4, {"a": (0.1, 0)}).trajectories, found.trajectories)


def test_an_agent_is_forgotten_when_it_was_not_seen_for_the_observed_span(forecaster):
    span = (OBSERVED - 1) / HZ
    streamer = streamer_of(forecaster)
    streamer.update(0.0, {"a": (0, 0)}, {"a": "cyclist"})
    streamer.update(span, {"b": (1, 0)})
    assert streamer.agents == ("a", "b")
    streamer.update(span + 0.1, {"b": (1, 0)})
    assert streamer.agents == ("b",)
    # When it comes back, it is new: nothing of its past, not even its kind, is known.
    streamer.update(span + 0.5, {"a": (9, 9)})
    window = streamer.window()
    assert window.agent_names == ("b", "a")
    assert window.kind == ("pedestrian", "pedestrian")
    assert (window.agent == window.agent_names.index("a")).sum() == 1


def test_the_first_update_is_enough_for_a_forecast_and_nobody_there_gives_none(forecaster):
    streamer = streamer_of(forecaster)
    assert streamer.update(0.0, {}) is None
    found = streamer.update(0.4, {"a": (3.0, 4.0)})
    assert found.trajectories.shape == (4, 1, PREDICTED, 2)
    assert torch.isfinite(found.trajectories).all()
    assert streamer.update(0.8, {}) is None


def test_the_same_feed_gives_the_same_forecasts_and_another_seed_others(forecaster):
    xy = walk(6)
    rows = [(0.4 * step, agent, *xy[step, agent]) for step in range(6) for agent in range(3)]
    first, again = fed(streamer_of(forecaster), rows), fed(streamer_of(forecaster), rows)
    assert_same(first, again)
    assert forecast_line(first) == forecast_line(again)
    other = fed(streamer_of(forecaster, sampling=SAMPLING.model_copy(update={"seed": 6})), rows)
    assert not torch.equal(first.trajectories, other.trajectories)


def test_a_forecast_does_not_depend_on_when_the_feed_counts_from(forecaster):
    xy = walk(12)
    for zero in (-50.0, 1e6):
        rows = [(step / 2 + zero, agent, *xy[step, agent]) for step in range(12) for agent in range(3)]
        here = [(t - zero, *rest) for t, *rest in rows]
        assert_same(fed(streamer_of(forecaster), rows), fed(streamer_of(forecaster), here))


def test_forecasts_come_less_often_than_updates_if_wanted(forecaster):
    streamer = streamer_of(forecaster, every=1.0)
    times = [step / 10 for step in range(31)]
    given = [t for t in times if streamer.update(t, {"a": (t, 0)}) is not None]
    assert given == pytest.approx([0.0, 1.0, 2.0, 3.0])


def test_kinds_are_remembered_and_reach_the_model(forecaster):
    streamer = streamer_of(forecaster)
    streamer.update(0.0, {"a": (0, 0), "b": (1, 1)}, {"b": "ball"})
    found = streamer.update(0.4, {"a": (0, 0), "b": (1, 1)})
    assert streamer.window().kind == ("pedestrian", "ball")
    plain = streamer_of(forecaster)
    plain.update(0.0, {"a": (0, 0), "b": (1, 1)})
    assert not torch.equal(plain.update(0.4, {"a": (0, 0), "b": (1, 1)}).trajectories, found.trajectories)


@pytest.mark.parametrize(
    ("t", "positions", "kinds", "message"),
    [
        (0.9, {"a": (0, 0)}, {}, "time 0.9 comes after 1"),
        (1.0, {"a": (0, 0)}, {}, "time 1 was given already"),
        (math.nan, {"a": (0, 0)}, {}, "time nan is not a finite number"),
        (math.inf, {"a": (0, 0)}, {}, "time inf is not a finite number"),
        (1.4, {"a": (0, 0), "b": (math.nan, 0)}, {}, "position of agent 'b' is not finite"),
        (1.4, {"b": (0, -math.inf)}, {}, "position of agent 'b' is not finite"),
        (1.4, {"b": (1e300, 0)}, {}, "position of agent 'b' is out of range"),
        (1.4, {"b": (1, 2, 3)}, {}, "must be two numbers, got (1, 2, 3)"),
        (1.4, {"b": "12"}, {}, "must be two numbers, got '12'"),
        (1.4, {"b": ("1", "2")}, {}, "must be two numbers"),
        (1.4, {"b": None}, {}, "must be two numbers, got None"),
        (1.4, {"b": [[1], [2, 3]]}, {}, "must be two numbers"),
        (1.4, {"b": (10**400, 0)}, {}, "must be two numbers"),
        (1.4, {7: (0, 0), "7": (1, 1)}, {}, "agent '7' is there twice"),
        (1.4, {"a": (0, 0)}, {"a": "cyclits"}, "unknown kind 'cyclits'; did you mean 'cyclist'"),
        (1.4, {"a": (0, 0)}, {"b": "cyclist"}, "agent 'b' has a kind but no position"),
        (1.4, {index: (0, 0) for index in range(4)}, {}, "4 agents at time 1.4, at most 3 are followed"),
    ],
)
def test_a_bad_update_is_one_clear_sentence_and_leaves_everything_as_it_was(forecaster, t, positions, kinds, message):
    good = [(0.2, {"a": (0, 0)}), (1.0, {"a": (0.5, 0)}), (1.4, {"a": (1, 0), "c": (2, 2)})]
    untouched, streamer = streamer_of(forecaster, max_agents=3), streamer_of(forecaster, max_agents=3)
    for time, there in good[:2]:
        untouched.update(time, there)
        streamer.update(time, there)
    with pytest.raises(UserError) as caught:
        streamer.update(t, positions, kinds)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert_same(streamer.update(*good[2]), untouched.update(*good[2]))


@pytest.mark.parametrize(
    "options",
    [{"hz": 2.0}, {"hz": math.inf}, {"every": -1.0}, {"every": math.nan}, {"num_samples": 0}, {"max_agents": 0}],
)
def test_options_out_of_range_are_refused(forecaster, options):
    with pytest.raises(UserError, match=next(iter(options))):
        Streamer(forecaster, **options)


def test_those_who_left_first_make_room_when_more_agents_come_than_are_followed(forecaster):
    streamer = streamer_of(forecaster, max_agents=3)
    streamer.update(0.0, {"a": (0, 0), "b": (0, 1), "c": (0, 2)})
    streamer.update(0.4, {"b": (0, 1), "c": (0, 2)})
    streamer.update(0.8, {"c": (0, 2), "d": (0, 3)})
    assert streamer.agents == ("b", "c", "d")
    found = streamer.update(1.2, {"e": (0, 0), "f": (0, 1), "g": (0, 2)})
    assert streamer.agents == ("e", "f", "g") == found.agents


def test_memory_does_not_grow_with_the_feed_or_with_its_rate(forecaster):
    streamer = streamer_of(forecaster, hz=20.0, every=1e9, max_agents=5)
    most = 0
    for index in range(4000):
        t = index / 1000
        # New ids all the time; one agent stays.
        streamer.update(t, {"stays": (t, 2 * t), f"new {index // 3}": (0, 0)})
        most = max(most, len(streamer.agents))
    assert most == 5
    rows = streamer._tracks["stays"].rows
    assert len(rows) <= (OBSERVED - 1) / HZ * 20 / 0.9 + 14
    # The rows that were thinned out do not show: the window is still exact.
    mine = streamer.window()
    own = mine.agent == mine.agent_names.index("stays")
    steps = t - np.arange(OBSERVED)[::-1] / HZ
    np.testing.assert_allclose(mine.xy[own], np.stack([steps, 2 * steps], axis=1), atol=1e-9)


def test_a_feed_at_exactly_the_remembered_rate_is_not_thinned(forecaster):
    streamer = streamer_of(forecaster, hz=20.0, every=1e9)
    for index in range(50):
        streamer.update(1.7e9 + index / 20, {"a": (index, 0)})
    assert len(streamer._tracks["a"].rows) == 50


def test_huge_but_allowed_positions_give_finite_forecasts(forecaster):
    streamer = streamer_of(forecaster)
    streamer.update(0.0, {"a": (-1e9, 1e9), "b": (0, 0)})
    found = streamer.update(0.4, {"a": (1e9, -1e9), "b": (0, 0)})
    assert torch.isfinite(found.trajectories).all()


def instants(text, **options):
    data = text if isinstance(text, bytes) else text.encode()
    return list(read_feed(io.BytesIO(data), **options))


def test_json_lines_and_rows_say_the_same():
    document = '{"t": 0, "agents": {"7": [1, 2], "b": [3.5, 4]}}\n{"t": 0.4, "agents": {"7": [1.5, 2]}}\n'
    table = "t,id,x,y\n0,7,1,2\n0,b,3.5,4\n\n0.4,7.0,1.5,2"
    of_document, of_table = instants(document), instants(table)
    assert [(item.t, {name: tuple(xy) for name, xy in item.positions.items()}) for item in of_document] == [
        (item.t, item.positions) for item in of_table
    ]
    assert [item.line for item in of_document] == [1, 2]
    assert [item.line for item in of_table] == [2, 5]


def test_a_json_line_completes_the_instant_of_rows_before_it():
    found = instants('0.0,1,2,3\n{"t": 0.4, "agents": {}}\n0.8,1,2,3\n')
    assert [(item.line, item.t, item.positions) for item in found] == [
        (1, 0.0, {"1": (2.0, 3.0)}),
        (2, 0.4, {}),
        (3, 0.8, {"1": (2.0, 3.0)}),
    ]


def test_an_instant_is_given_before_the_line_after_it_is_read():
    class Feed(io.BytesIO):
        def readline(self, size=-1):
            calls.append(size)
            return super().readline(size)

    calls = []
    feed = read_feed(Feed(b'{"t": 0, "agents": {}}\n{"t": 1, "agents": {}}\n'))
    assert next(feed).t == 0
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ('{"t": 1, "agents": {}', "not JSON (Expecting"),
        ("{" + '"a":[' * 20000, "more than"),
        ('{"t": 1, "agents": ' + "[" * 30000 + "]" * 30000 + "}", "JSON"),
        ('{"t": 1' + "0" * 5000 + ', "agents": {}}', "number too long"),
        ('{"t": 1' + "0" * 400 + ', "agents": {}}', "time inf"),
        ('{"t": NaN, "agents": {}}', "time nan"),
        ('{"t": true, "agents": {}}', "'t' must be a number"),
        ('{"t": "1", "agents": {}}', "'t' must be a number of seconds, got '1'"),
        ('{"agents": {}}', "no 't'"),
        ('{"t": 1, "agent": {}}', "no 'agents'"),
        ('{"t": 1, "agents": [[1, 2]]}', "'agents' must be an object"),
        ('{"t": 1, "agents": {}, "kinds": 3}', "'kinds' must be an object"),
        ('{"t": 1, "agents": {"7": [0, 0], "7": [1, 1]}}', "'7' is there twice"),
        ('{"t": 1, "agents": {"7": [0, 0], "7.0": [1, 1]}}', "'7' is there twice"),
        ("[1, 2]", "neither a JSON object nor t,id,x,y"),
        ("hello", "neither a JSON object nor t,id,x,y"),
        ("1,2,3", "neither a JSON object nor t,id,x,y"),
        ("1,2,three,4", "with numbers t, x, y"),
        ("1,,3,4", "has no id"),
        ("1,2,nan,4", "position of agent '2' is not finite"),
        ("inf,2,3,4", "time inf"),
        ("x" * (MAX_LINE + 1), f"more than {MAX_LINE} bytes"),
        (b"\xff\xfe1,2,3,4", "not UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_malformed_line_says_why_and_the_next_one_counts(line, reason):
    data = line if isinstance(line, bytes) else line.encode()
    bad, good = instants(b"\n" + data + b'\n{"t": 5, "agents": {}}\n')
    assert isinstance(bad, BadLine)
    assert bad.line == 2
    assert reason in bad.reason
    assert "\n" not in bad.reason
    assert len(bad.reason) < 200
    assert good == Instant(3, 5.0, {})


def test_rows_of_one_time_that_do_not_fit_are_left_out_alone():
    found = instants("1,a,0,0\n1,a,1,1\n0.5,b,0,0\n1,b,2,2\n1,c,0,0\n2,a,0,0\n", max_agents=2)
    reasons = {item.line: item.reason for item in found if isinstance(item, BadLine)}
    assert set(reasons) == {2, 3, 5}
    assert "agent 'a' is there twice" in reasons[2]
    assert "time 0.5 comes after 1" in reasons[3]
    assert "more than 2 agents" in reasons[5]
    assert [item.positions for item in found if isinstance(item, Instant)] == [
        {"a": (0.0, 0.0), "b": (2.0, 2.0)},
        {"a": (0.0, 0.0)},
    ]


def test_a_line_without_end_is_never_held_as_a_whole():
    class Endless(io.RawIOBase):
        """Two gigabytes without a line break, then a good line."""

        def __init__(self):
            self.left, self.most, self.tail = 2 << 30, 0, io.BytesIO(b'\n{"t": 1, "agents": {}}\n')

        def readline(self, size=-1):
            self.most = max(self.most, size if size >= 0 else self.left)
            if self.left:
                given = min(self.left, size)
                self.left -= given
                return block[:given]
            return self.tail.readline(size)

    block = b"1" * (MAX_LINE + 1)
    source = Endless()
    bad, good = read_feed(source)
    assert (bad.line, good.line, good.t) == (1, 2, 1.0)
    assert source.most <= MAX_LINE + 1


def test_a_line_of_output_holds_the_forecast_exactly(forecaster):
    found = streamer_of(forecaster).update(0.4, {"7": (1.0, 2.0), "b": (3.0, 3.0)})
    line = forecast_line(found)
    assert "\n" not in line
    document = json.loads(line)
    assert document["t"] == 0.4
    assert (document["unit"], document["hz"]) == ("m", HZ)
    assert list(document["agents"]) == ["7", "b"]
    for index, agent in enumerate(document["agents"].values()):
        assert torch.equal(torch.tensor(agent["trajectories"]), found.trajectories[:, index])
        assert torch.equal(torch.tensor(agent["probabilities"]), found.probabilities[:, index])
