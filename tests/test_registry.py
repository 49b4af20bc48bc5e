"""The registry: lazy built-ins, plug-ins from an installed distribution, did-you-mean."""

import json
import subprocess
import sys

import pytest

from neurocl.errors import UserError
from neurocl.registry import Entry, Registry

PLUGIN = '''
from neurocl.continual.method import Method


class Echo(Method):
    """Plain training under another name."""
'''


def test_a_built_in_is_imported_when_asked_for():
    registry = Registry("things", [Entry("pi", "math:pi", "a number"), Entry("no", "nowhere:x", "broken")])
    assert registry.names() == ["no", "pi"]
    assert registry.load("pi") > 3
    with pytest.raises(ModuleNotFoundError):
        registry.load("no")


def test_an_unknown_name_suggests_the_nearest():
    registry = Registry("things", [Entry("staer", 1, "")])
    with pytest.raises(UserError, match=r"unknown thing 'stear'; did you mean 'staer'\? \(choose from staer\)"):
        registry.entry("stear")


def test_a_registry_may_have_a_users_word_for_its_entries():
    registry = Registry("aggregators", [Entry("fedavg", 1, "", ("x",))], word="method")
    with pytest.raises(UserError, match=r"unknown method 'fedag'; did you mean 'fedavg'\?"):
        registry.entry("fedag")
    with pytest.raises(UserError, match="method 'fedavg' is for `neurocl x`"):
        registry.entry("fedavg", "y")


def test_names_are_taken_once_unless_replaced():
    registry = Registry("things")
    registry.register("a", 1, "one")
    with pytest.raises(ValueError, match="registered already"):
        registry.register("a", 2, "two")
    registry.register("a", 2, "two", replace=True)
    assert registry.load("a") == 2


def test_areas_filter_names():
    registry = Registry("things", [Entry("a", 1, "", ("x",)), Entry("b", 2, "", ("y",)), Entry("c", 3, "")])
    assert registry.names("x") == ["a", "c"]
    with pytest.raises(UserError):
        registry.load("b", "x")


def test_an_installed_distribution_shows_up_and_trains(tmp_path):
    (tmp_path / "echo_plugin.py").write_text(PLUGIN)
    info = tmp_path / "echo_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[neurocl.methods]\necho = echo_plugin:Echo\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from neurocl.cli.main import main; main()"

    def call(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout

    rows = json.loads(call("list", "methods", "--json"))["methods"]
    assert [row["source"] for row in rows if row["name"] == "echo"] == ["echo-plugin"]
    assert "echo" in call("continual", "train", "--method", "echo", "--smoke", "--quiet", "--threads", "1")
