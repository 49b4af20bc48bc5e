"""``neurocl trajectory forecast --stream``: a live feed through real pipes, an answer before the next line."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.cli.conftest import assert_one_line

OBSERVED, PREDICTED = 8, 12
QUICK = ("--num-samples", "4", "--steps", "3", "--threads", "1")


def walk(steps, agents=3):
    """Positions [steps, agents, 2]."""
    rng = np.random.default_rng(0)
    return rng.uniform(-5, 5, (agents, 2)) + rng.normal(0.3, 0.1, (steps, agents, 2)).cumsum(axis=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from neurocl.cli.trajectory import SMOKE
    from neurocl.trajectory import resolve, train

    folder = tmp_path_factory.mktemp("stream")
    xy = walk(200)
    rows = [f"{10 * t}\t{agent}\t{x:.4f}\t{y:.4f}" for t in range(200) for agent, (x, y) in enumerate(xy[t])]
    (folder / "walk.txt").write_text("\n".join(rows) + "\n")
    train(resolve("tiny", SMOKE, {"files": (folder / "walk.txt",), "threads": 1, "device": "cpu"}), out=folder / "run")
    return folder / "run"


class Feed:
    """A running ``neurocl trajectory forecast RUN --stream`` with a pipe at each end."""

    def __init__(self, run, *options):
        command = [sys.executable, "-m", "neurocl", "trajectory", "forecast", str(run), "--stream", *QUICK, *options]
        pipe = subprocess.PIPE
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        # Whoever runs the tests in the background of a shell ignores Ctrl-C, and so would the process.
        listen = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, preexec_fn=listen
        )
        # A process that hangs must not hang the tests.
        self.watch = threading.Timer(100, self.process.kill)
        self.watch.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.watch.cancel()

    def say(self, line):
        self.process.stdin.write(line if isinstance(line, bytes) else line.encode() + b"\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def complaint(self):
        return self.process.stderr.readline().decode().rstrip("\n")

    def end(self):
        """Close the input; exit code and what else came on standard output and standard error."""
        out, err = self.process.communicate()
        return self.process.returncode, out.decode(), err.decode()


def instant(t, xy):
    return json.dumps({"t": t, "agents": {str(agent): place.tolist() for agent, place in enumerate(xy)}})


def test_every_line_is_answered_before_the_next_one_is_written(run):
    from neurocl.trajectory import Forecaster, SamplingConfig, Streamer

    streamer = Streamer(Forecaster.load(run), num_samples=4, sampling=SamplingConfig(steps=3))
    xy = walk(OBSERVED + 2)
    with Feed(run) as feed:
        for step, places in enumerate(xy):
            t = round(0.4 * step, 1)
            feed.say(instant(t, places))
            answer = feed.answer()
            expected = streamer.update(t, dict(enumerate(places.tolist())))
            assert answer["t"] == t
            assert tuple(answer["agents"]) == ("0", "1", "2") == expected.agents
            for index, agent in enumerate(answer["agents"].values()):
                paths = np.array(agent["trajectories"], dtype=np.float32)
                assert paths.shape == (4, PREDICTED, 2)
                assert np.array_equal(paths, expected.trajectories[:, index].numpy())
                assert sum(agent["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert feed.end() == (0, "", "")


def test_rows_are_answered_when_the_next_instant_begins_and_malformed_lines_are_told_skipped_and_counted(run):
    with Feed(run) as feed:
        feed.say("nonsense")
        assert feed.complaint() == "skipped: standard input:1: 'nonsense' is neither a JSON object nor t,id,x,y"
        feed.say('{"t": 0, "agents": {"7": [0, NaN]}}')
        assert feed.complaint() == "skipped: standard input:2: the position of agent '7' is not finite: (0, nan)"
        feed.say("0.0,7,1,2\n0.0,9,3,4\n0.4,7,1.5,2")
        answer = feed.answer()
        assert (answer["t"], list(answer["agents"])) == (0.0, ["7", "9"])
        # The line after a row with an open instant completes it; nobody is there in the second one: no answer.
        feed.say('{"t": 0.8, "agents": {}}')
        answer = feed.answer()
        assert (answer["t"], list(answer["agents"])) == (0.4, ["7"])
        feed.say('{"t": 0.5, "agents": {"7": [0, 0]}}')
        assert feed.complaint() == "skipped: standard input:7: time 0.5 comes after 0.8; time must not go backwards"
        feed.say(b"\xff\n" + b"9" * 300_000 + b"\n")
        assert feed.complaint() == "skipped: standard input:8: bytes that are not UTF-8 text"
        assert feed.complaint() == "skipped: standard input:9: a line of more than 65536 bytes"
        feed.say('{"t": 1.2, "agents": {"7": [0, 0]}}')
        assert feed.answer()["t"] == 1.2
        feed.say(b'{"t": 2.2, "agents"')
        assert feed.end() == (
            0,
            "",
            "skipped: standard input:11: not JSON (Expecting ':' delimiter at column 20)\nmalformed lines skipped: 6\n",
        )


def test_a_reader_that_goes_away_ends_the_stream_cleanly(run):
    with Feed(run) as feed:
        feed.say('{"t": 0, "agents": {"7": [0, 0]}}')
        feed.answer()
        feed.process.stdout.close()
        feed.say('{"t": 0.4, "agents": {"7": [0, 0]}}')
        assert feed.process.wait(timeout=60) == 0
        assert feed.process.stderr.read() == b""


def test_control_c_ends_the_stream_with_a_word_and_exit_code_130(run):
    with Feed(run) as feed:
        feed.say("nonsense")
        feed.complaint()
        feed.process.send_signal(signal.SIGINT)
        assert feed.end() == (130, "", "malformed lines skipped: 1\nneurocl: interrupted\n")


@pytest.fixture
def streamed(inside, run, monkeypatch):
    """Feed all of a text to the command within this process."""

    def call(text, *options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return inside("trajectory", "forecast", run, "--stream", *QUICK, *options)

    return call


def test_the_stream_of_a_recording_ends_with_the_forecast_of_its_file(run, inside, streamed, tmp_path):
    rows = [(step, agent, x, y) for step, places in enumerate(walk(OBSERVED)) for agent, (x, y) in enumerate(places)]
    (tmp_path / "walk.txt").write_text("".join(f"{10 * t}\t{agent}\t{x:.4f}\t{y:.4f}\n" for t, agent, x, y in rows))
    made = inside("trajectory", "forecast", run, "--input", "walk.txt", *QUICK, "--out", "walk.json")
    assert made.returncode == 0, made.stderr
    expected = json.loads((tmp_path / "walk.json").read_text())["agents"]
    result = streamed("t,id,x,y\n" + "".join(f"{0.4 * t},{agent},{x:.4f},{y:.4f}\n" for t, agent, x, y in rows))
    assert (result.returncode, result.stderr) == (0, "")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["t"] for answer in answers] == [0.4 * step for step in range(OBSERVED)]
    assert answers[-1]["agents"] == expected


def test_forecasts_come_less_often_than_instants_if_wanted(streamed):
    feed = "".join(f'{{"t": {step / 10}, "agents": {{"7": [{step / 10}, 0]}}}}\n' for step in range(31))
    result = streamed(feed, "--every", "1")
    assert (result.returncode, result.stderr) == (0, "")
    assert [json.loads(line)["t"] for line in result.stdout.splitlines()] == [0.0, 1.0, 2.0, 3.0]


def test_the_same_feed_gives_the_same_bytes(streamed):
    feed = "".join(instant(0.3 * step, places) + "\n" for step, places in enumerate(walk(4)))
    first = streamed(feed)
    assert first.stdout == streamed(feed).stdout
    assert first.stdout != streamed(feed, "--seed", "1").stdout


def test_strict_ends_at_the_first_malformed_line_with_exit_code_2(streamed):
    line = '{"t": 0, "agents": {"7": [0, 0]}}\n'
    result = streamed(line + line + line, "--strict")
    assert_one_line(result, 2, "standard input:2: time 0 was given already")
    assert len(result.stdout.splitlines()) == 1


def test_an_empty_feed_ends_cleanly(streamed):
    result = streamed("")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either --input FILE or --stream"),
        (("--stream", "--input", "walk.txt"), "give either --input FILE or --stream"),
        (("--stream", "--out", "f.ndjson"), "--out belongs to --input; forecasts go to standard output"),
        (("--stream", "--plot", "f.png"), "--plot belongs to --input"),
        (("--stream", "--animate", "f.gif"), "--animate belongs to --input"),
        (("--stream", "--recording", "1"), "--recording belongs to --input"),
        (("--stream", "--json"), "--json belongs to --input"),
        (("--input", "walk.txt", "--every", "1"), "--every belongs to --stream"),
        (("--input", "walk.txt", "--strict"), "--strict belongs to --stream"),
        (("--stream", "--every", "nan"), "every must be 0 or more seconds, got nan"),
        (("--stream", "--select", "best"), "select"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_options_that_do_not_go_together_are_one_line_with_exit_code_2(inside, run, words, message):
    assert_one_line(inside("trajectory", "forecast", run, *words), 2, message)
