"""Reports: which runs share a row, what stands in its label, and names that try to break tables and files."""

import json

import numpy as np
import pytest

from neurocl import continual
from neurocl.errors import UserError
from neurocl.report import as_html, as_latex, as_markdown, group, print_summary, read_results, save_plots
from neurocl.runs import RunFolder, find_runs

QUICK = {"epochs": 1, "max_train_per_class": 10, "max_test_per_class": 5, "buffer_size": 10, "threads": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        continual.train(area="continual", method="er", seed=seed, out=folder / f"er-{seed}", **QUICK)
    continual.train(area="continual", method="er", out=folder / "er-big", **{**QUICK, "buffer_size": 20})
    continual.train(area="continual", method="er", seed=2, out=folder / "er-short", stop_after_task=1, **QUICK)
    continual.train(area="continual", method="joint", out=folder / "joint", **QUICK)
    return folder


def documents(runs, *names):
    return read_results([RunFolder(runs / name) for name in names])[0]


def test_seeds_share_a_row_and_settings_do_not(runs):
    rows = group(documents(runs, "er-0", "er-1", "er-big", "joint"))
    assert [(row.label, row.num_runs) for row in rows] == [
        ("er, buffer_size 10", 2),
        ("er, buffer_size 20", 1),
        ("joint", 1),
    ]
    values = rows[0].values["class-IL accuracy"]
    assert rows[0].statistics("class-IL accuracy") == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert rows[2].cell("forgetting") == "-"


def test_runs_that_reached_different_tasks_are_not_averaged(runs):
    rows = group(documents(runs, "er-0", "er-short"))
    assert [row.label for row in rows] == ["er, tasks learnt 5", "er, tasks learnt 2"]


def test_spiking_and_ordinary_runs_of_one_method_are_told_apart(runs, tmp_path):
    continual.train(area="spiking", method="er", out=tmp_path / "run", **QUICK)
    found = documents(runs, "er-0") + read_results([RunFolder(tmp_path / "run")])[0]
    assert [row.label for row in group(found)] == ["er (continual)", "er (spiking)"]


def test_a_run_named_twice_counts_once(runs):
    assert group(documents(runs, "er-0", "er-0"))[0].num_runs == 1


def test_a_run_without_result_is_noted_and_alone_an_error(runs, tmp_path):
    (tmp_path / "config.yaml").write_text("area: continual\n")
    found, notes = read_results([RunFolder(tmp_path), RunFolder(runs / "er-0")])
    assert len(found) == 1
    assert "has no result yet" in notes[0]
    with pytest.raises(UserError, match="has no result yet"):
        read_results([RunFolder(tmp_path)])


def test_a_damaged_result_is_named(runs, tmp_path):
    (tmp_path / "config.yaml").write_text("area: continual\n")
    for text, message in (("{", "not valid JSON"), ('{"schema": 1}', "incomplete"), ("[]", "not a neurocl result")):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_results([RunFolder(tmp_path)])
    document = json.loads((runs / "er-0" / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**document, "schema": 99}))
    with pytest.raises(UserError, match="newer neurocl"):
        read_results([RunFolder(tmp_path)])


def test_a_folder_of_runs_stands_for_its_runs(runs):
    assert len(find_runs([runs])) == 5


def test_odd_names_break_neither_tables_nor_files(runs, tmp_path, capsys):
    odd = "own/[/bold]<script>&_.npz"
    changed = [
        {**document, "dataset": odd, "config": {**document["config"], "dataset": odd}}
        for document in documents(runs, "er-0")
    ]
    both = documents(runs, "er-0") + changed
    print_summary(both)
    assert "script" in capsys.readouterr().out
    assert "<script>" not in as_html(both, {})
    assert "\\_" in as_latex(both)
    assert as_markdown(both).count("\n| ") == 4
    written = save_plots(both, tmp_path)
    assert len({path.name for path in written}) == len(written)
    assert all(path.parent == tmp_path and path.stat().st_size > 0 for path in written)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_narrow_terminal_cuts_no_word_and_no_number(runs, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    (document,) = documents(runs, "er-0")
    traffic = {"up_mb": 123.456, "down_mb": 98765.4321}
    seeds = [
        {
            **document,
            "config": {**document["config"], "method": "coda-prompt"},
            "seed": seed,
            "metrics": {**document["metrics"], "traffic": traffic},
        }
        for seed in (0, 1)
    ]
    print_summary([*seeds, document])
    shown = capsys.readouterr().out
    for word in ("coda-prompt", "accuracy", "forgetting", "transfer", "98765.4 ± 0.0"):
        assert word in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()[1:]) <= width


def test_tensorboard_keeps_what_was_logged_before_a_stop(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = {"area": "continual", "method": "er", "tensorboard": True, **QUICK}
    continual.train(out=tmp_path / "run", stop_after_task=1, **values)
    continual.resume(tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("class_il")] == [2, 4, 6, 8, 10]
