"""A merge that another distribution registers is one like the others; one that is broken spoils nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from neurocl.errors import UserError
from neurocl.merging.method import declared
from tests.merging.models import assert_same_bits, small_models

PLUGIN = """
from typing import Annotated
from pydantic import Field
from torch import Tensor
from neurocl.merging import merge_method

@merge_method("median")
def median(base: Tensor, models: Tensor, *, shrink: Annotated[float, Field(ge=0, le=1)] = 0.0) -> Tensor:
    \"\"\"Add the median of the task vectors.

    Args:
        base: [*shape].
        models: [N, *shape].
        shrink: share of the way back to the base.

    Reference: nobody.
    \"\"\"
    return base + (1 - shrink) * (models - base).median(dim=0).values

def undeclared(base, models):
    return base
"""
ENTRY_POINTS = """
[neurocl.merges]
median = median_plugin:median
undeclared = median_plugin:undeclared
absent = median_plugin.nowhere:merge
"""


@pytest.fixture
def call(tmp_path):
    """Run ``neurocl ARGUMENTS`` in a process of its own, where the distribution is installed."""
    (tmp_path / "median_plugin.py").write_text(PLUGIN)
    info = tmp_path / "median_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: median-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from neurocl.cli.main import main; main()"

    def run(*arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)

    return run


def test_an_installed_merge_is_listed_and_merges_files_with_its_options_as_flags(call, tmp_path):
    base, models = small_models(3, torch.float64)
    save_file(base, tmp_path / "base.safetensors")
    for index, model in enumerate(models):
        save_file(model, tmp_path / f"m{index}.safetensors")
    rows = json.loads(call("list", "merges", "--json").stdout)["merges"]
    assert [row["source"] for row in rows if row["name"] == "median"] == ["median-plugin"]
    assert "--shrink" in call("merging", "info", "median").stdout
    paths = [f"m{index}.safetensors" for index in range(3)]
    arguments = ("merging", "merge", "--method", "median", "--base", "base.safetensors", *paths, "--quiet")
    done = call(*arguments, "--shrink", 0.25, "--out", "out.safetensors")
    assert done.returncode == 0, done.stderr
    expected = dict(base)
    for name, value in base.items():
        stacked = torch.stack([model[name] for model in models])
        if name.endswith(("running_mean", "running_var")):
            expected[name] = (stacked[0] + stacked[1] + stacked[2]) / 3
        elif value.is_floating_point():
            expected[name] = value + 0.75 * (stacked - value).median(dim=0).values
    assert_same_bits(load_file(tmp_path / "out.safetensors"), {name: expected[name] for name in base})
    refused = call(*arguments, "--shrink", 2, "--out", "other.safetensors")
    assert refused.returncode == 2
    assert "shrink" in refused.stderr


def test_a_broken_one_is_named_in_one_line_and_the_others_go_on(call):
    listed = call("merging", "methods", "--json")
    assert listed.returncode == 0, listed.stderr
    names = {row["name"] for row in json.loads(listed.stdout)}
    assert {"median", "ties"} <= names
    assert not names & {"undeclared", "absent"}
    assert "'undeclared' is registered, but it is no function declared with @merge_method" in listed.stderr
    assert "'absent' of median-plugin cannot be imported" in listed.stderr
    for name, words in (("undeclared", "no function declared"), ("absent", "cannot be imported")):
        told = call("merging", "info", name)
        assert told.returncode == 2
        assert words in told.stderr
        assert told.stderr.count("\n") == 1


def test_a_function_that_was_not_declared_is_no_merge():
    with pytest.raises(UserError, match="merge 'f' is registered, but"):
        declared(lambda base, models: base, "f")
