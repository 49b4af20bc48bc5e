"""``neurocl federated export`` as a user types it, and mistakes around it."""

import json

import pytest

from tests.cli.conftest import assert_one_line

EXPORT = ("federated", "export")


@pytest.fixture
def plain(inside):
    """A finished run of two clients without training."""
    result = inside("federated", "run", "--smoke", "--quiet", "--method", "fedncm", "--out", "plain")
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("plain")
def test_what_is_printed_can_be_pasted_into_python(inside, tmp_path):
    result = inside(*EXPORT, "plain", "--out", "taken")
    assert result.returncode == 0, result.stderr
    assert "Written: taken/model.safetensors" in result.stdout
    assert "checked: the scores of 64 test samples" in result.stdout
    code = result.stdout.partition("Load it in Python:\n\n")[2]
    import torch

    names = {"x": torch.rand(3, 64)}
    exec(code, names)
    assert names["scores"].shape == (3, 10)
    assert len(names["names"]) == 3
    assert code in (tmp_path / "taken" / "README.md").read_text()
    document = json.loads(inside(*EXPORT, "plain", "--json", "--quiet").stdout)
    assert document["folder"] == "plain/model"
    assert document["model"] == "finished"
    assert set(document["bytes"]) == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.usefixtures("plain")
def test_mistakes_are_one_line(inside):
    assert_one_line(inside(*EXPORT, "nowhere", "-q"), 2, "nowhere is not a run folder")
    assert_one_line(inside(*EXPORT, "plain", "--to", "pefd", "-q"), 2, "did you mean 'peft'?")
    assert_one_line(
        inside(*EXPORT, "plain", "--to", "peft", "-q"), 2, "not from a folder of transformers", "--to model"
    )
    assert_one_line(inside(*EXPORT, "plain", "--out", "plain", "-q"), 2, "plain is not an empty folder")
    assert_one_line(
        inside("federated", "run", "--method", "fedavgg"), 2, "unknown method 'fedavgg'; did you mean 'fedavg'"
    )


def test_an_exception_in_ones_own_data_is_one_line_and_with_debug_all_of_it(inside, tmp_path):
    (tmp_path / "my_data.py").write_text("def f(config):\n    return {}['x']\n")
    run = ("federated", "run", "--smoke", "--quiet", "--dataset", "my_data:f")
    assert_one_line(inside(*run), 2, "my_data:f raised KeyError in", "my_data.py, line 2: 'x'", "--debug")
    from neurocl.errors import UserError

    with pytest.raises(UserError) as caught:
        inside(*run, "--debug")
    assert isinstance(caught.value.__cause__, KeyError)
