"""``neurocl merging merge, info, methods`` as a user meets them: results, mistakes, kills, full disks, memory."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from neurocl.merging.catalog import MERGES
from neurocl.merging.memory import merge
from tests.cli.conftest import assert_one_line
from tests.merging.models import assert_same_bits, content_sha256, save_folder, small_models

MERGE = ("merging", "merge", "--threads", 1)


@pytest.fixture
def saved(tmp_path):
    """Folders base, m0, m1 with small models; returns (base, models)."""
    base, models = small_models(2)
    save_folder(tmp_path / "base", base)
    for index, model in enumerate(models):
        save_folder(tmp_path / f"m{index}", model, shards=2)
    return base, models


def test_options_of_the_method_are_flags_in_any_place(saved, inside, tmp_path):
    base, models = saved
    arguments = ("--method", "ties", "--density", 0.4, "m0", "--base", "base", "--combine=sum", "m1", "--alpha", -0.5)
    result = inside(*MERGE, *arguments, "--weights", "1,-0.5", "--set", "sign=frequency", "--out", "out")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    options = {"density": 0.4, "combine": "sum", "sign": "frequency", "weights": [1, -0.5], "alpha": -0.5}
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), merge(base, models, "ties", **options))


def test_a_recipe_with_flags_on_top_is_merged(saved, inside, tmp_path):
    base, models = saved
    recipe = {"method": "ties", "base": "base", "models": ["m0", "m1"], "options": {"density": 0.4, "trim": "tensor"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert inside(*MERGE, "r.yaml", "--density", 0.1, "--out", "out.safetensors").returncode == 0
    assert_same_bits(load_file(tmp_path / "out.safetensors"), merge(base, models, "ties", density=0.1, trim="tensor"))
    assert inside(*MERGE, "r.yaml", "--method", "task-arithmetic", "--out", "ta.safetensors").returncode == 0
    assert_same_bits(load_file(tmp_path / "ta.safetensors"), merge(base, models, "task-arithmetic"))


def test_a_configuration_of_mergekit_is_merged(saved, inside, tmp_path):
    base, models = saved
    config = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": f"m{index}", "parameters": {"weight": 0.3}} for index in range(2)],
        "parameters": {"lambda": 0.5},
    }
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(config))
    assert inside(*MERGE, "mergekit.yaml", "--out", "out.safetensors").returncode == 0
    expected = merge(base, models, "task-arithmetic", weights=[0.3, 0.3], alpha=0.5)
    assert_same_bits(load_file(tmp_path / "out.safetensors"), expected)


def test_without_a_name_the_output_gets_a_folder_of_its_own(saved, inside, tmp_path):
    result = inside(*MERGE, "m0", "m1")
    (folder,) = (tmp_path / "runs").glob("merge-average-*")
    assert f"Merged model: runs/{folder.name}" in result.stdout
    assert (folder / "model.safetensors").exists()


def test_json_is_one_document_with_hashes_and_treatments(saved, inside):
    base, _ = saved
    result = inside(*MERGE, "--method", "iso-c", "--base", "base", "m0", "m1", "--out", "out", "--json")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["inputs_sha256"]["base"] == content_sha256(base)
    assert (document["method"], document["resumed_tensors"], document["out"]) == ("iso-c", 0, "out")
    assert {row["class"] for row in document["classes"]} >= {"matrix", "vector", "buffer", "statistics"}


def test_a_dry_run_prints_the_plan_and_writes_nothing(saved, inside, tmp_path):
    before = sorted(tmp_path.iterdir())
    arguments = ("--method", "iso-c", "--base", "base", "m0", "m1", "--dry-run")
    text = inside(*MERGE, *arguments).stdout
    assert "mean of the models" in text
    assert "copied from the base" in text
    assert "memory: about" in text
    document = json.loads(inside(*MERGE, *arguments, "--json").stdout)
    assert document["recipe"]["method"] == "iso-c"
    assert document["files"] == ["model.safetensors"]
    assert document["memory_bytes"] > 0
    assert sorted(tmp_path.iterdir()) == before


def test_parameters_are_kept_averaged_and_made_matrices_by_pattern(saved, inside, tmp_path):
    base, models = saved
    rules = ("--keep", "blocks.1.*", "--keep", "scale", "--average", "blocks.0.*", "--matrices", "embed*")
    arguments = ("--method", "tsv-m", "--base", "base", "m0", "m1", *rules)
    assert inside(*MERGE, *arguments, "--out", "out.safetensors").returncode == 0
    result = load_file(tmp_path / "out.safetensors")
    assert torch.equal(result["blocks.1.weight"], base["blocks.1.weight"])
    assert torch.equal(result["scale"], base["scale"])
    mean = merge(base, models, "average")
    assert torch.equal(result["blocks.0.weight"], mean["blocks.0.weight"])
    assert not torch.equal(result["embed_tokens.weight"], mean["embed_tokens.weight"])


PAIR = ("m0", "m1", "--out", "out")
MISTAKES = {
    "no models": (("--out", "out"), ("name the models to merge",)),
    "unknown method": (("--method", "tsvm", *PAIR), ("unknown merge 'tsvm'", "did you mean 'tsv-m'")),
    "unknown option": (("--method", "ties", "--base", "base", "--densty", 0.1, *PAIR), ("did you mean 'density'",)),
    "option of another method": (("--density", 0.1, *PAIR), ("average has no option 'density'",)),
    "short option": (("-x", *PAIR), ("no such option: -x",)),
    "option without value": ((*PAIR, "--method", "ties", "--base", "base", "--density"), ("--density needs a value",)),
    "out of range": (("--method", "ties", "--base", "base", "--density", 2, *PAIR), ("density", "got 2")),
    "not a number": (("--method", "ties", "--base", "base", "--density", "x", *PAIR), ("density", "got 'x'")),
    "not a choice": (("--method", "ties", "--base", "base", "--sign", "x", *PAIR), ("sign", "'total'")),
    "weights": (("--weights", "1,2,3", *PAIR), ("3 --weights for 2 models",)),
    "words as weights": (("--weights", "much,more", *PAIR), ("--weights expects numbers",)),
    "weights for none": (
        ("--method", "slerp", "--weights", "1,2", *PAIR),
        ("slerp takes no per-model weights",),
    ),
    "alpha nan": (("--alpha", "nan", "--base", "base", *PAIR), ("alpha",)),
    "alpha without base": (("--alpha", 0.5, *PAIR), ("alpha = 0.5", "give the base model too")),
    "no base": (("--method", "ties", *PAIR), ("ties needs the base model",)),
    "one too many": (("base", "--method", "slerp", *PAIR), ("slerp merges exactly 2 models, got 3",)),
    "too few": (("--method", "model-stock", "--base", "base", "m0", "--out", "out"), ("at least 2 models",)),
    "no statistics": (("--method", "regmean", *PAIR), ("gram statistics", "neurocl merging stats")),
    "statistics count": (("--method", "regmean", "--statistics", "s", *PAIR), ("1 --statistics for 2 models",)),
    "memory": (("--max-memory", "1M", *PAIR), ("--max-memory 1M is too little",)),
    "not a size": (("--max-memory", "lots", *PAIR), ("expected a size such as 512M or 2G, got 'lots'",)),
    "shard size": (("--shard-size", "tiny", *PAIR), ("shard_size", "got 'tiny'")),
    "dtype": (("--dtype", "int8", *PAIR), ("dtype", "got 'int8'")),
    "device": (("--device", "abacus", *PAIR), ("device must be", "'abacus'")),
    "hub name": (("m0", "org/model", "--out", "out"), ("org/model: no such file or folder", "download it first")),
    "exists": (("m0", "m1", "--out", "base"), ("base exists already",)),
    "no adapter": (("--method", "lora-svd", *PAIR), ("m0: not a PEFT adapter folder",)),
    "networks": (("--method", "com", *PAIR), ("com does not merge weight files",)),
    "smoke of networks": (("--method", "com", "--smoke"), ("com does not merge files", "neurocl merging info com")),
    "recipe missing": (("nothing.yaml",), ("nothing.yaml: no such configuration file",)),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(saved, inside, tmp_path, kind):
    arguments, words = MISTAKES[kind]
    before = sorted(tmp_path.iterdir())
    assert_one_line(inside(*MERGE, *arguments), 2, *words)
    assert sorted(tmp_path.iterdir()) == before


def damage_truncate(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def damage_garbage(folder):
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"garbage" * 10)


def damage_remove(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def damage_pickle(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def damage_nan(folder):
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.bias" if "blocks.0.bias" in tensors else "blocks.0.weight"].view(-1)[0] = float("nan")
    save_file(tensors, file)


DAMAGES = {
    "truncated": (damage_truncate, ("model-00002-of-00002.safetensors: truncated: tensor",)),
    "garbage": (damage_garbage, ("model-00002-of-00002.safetensors: not a safetensors file",)),
    "missing": (damage_remove, ("m1: the shard model-00002-of-00002.safetensors is missing",)),
    "pickle": (damage_pickle, ("m1/pytorch_model.bin: a pickle",)),
    "nan": (damage_nan, ("tensor 'blocks.0.", "m1 contains NaN or infinity")),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_model_is_one_line_and_exit_code_2(saved, inside, tmp_path, kind):
    damage, words = DAMAGES[kind]
    damage(tmp_path / "m1")
    assert_one_line(inside(*MERGE, "--quiet", *PAIR), 2, *words)
    assert not (tmp_path / "out").exists()


def test_every_merge_is_described_with_options_defaults_and_paper(inside):
    rows = json.loads(inside("merging", "methods", "--json").stdout)
    assert [row["name"] for row in rows] == MERGES.names()
    for row in rows:
        assert row["summary"], row["name"]
        assert row["reference"], row["name"]
        assert row["works on"] in ("weights", "adapters", "networks")
        for option in row["options"]:
            assert option["name"].startswith("--") or row["works on"] == "networks"
            assert option["type"], (row["name"], option)
            assert option["meaning"], (row["name"], option)
            assert "default" in option
    ties = next(row for row in rows if row["name"] == "ties")
    density = next(option for option in ties["options"] if option["name"] == "--density")
    assert (density["type"], density["default"]) == ("0 < number <= 1", 0.2)
    assert ties["needs"] == ["base"]


def test_methods_and_info_print_every_merge(inside):
    text = inside("merging", "methods").stdout
    for name in MERGES.names():
        assert f"\n{name} " in text
        said = inside("merging", "info", name)
        assert said.returncode == 0
        assert said.stdout.startswith(f"{name} (merge of")
        assert "source: " in said.stdout


def test_info_on_a_model_tells_what_it_holds_and_where_it_came_from(saved, inside, tmp_path):
    base, _ = saved
    inside(*MERGE, "--method", "ties", "--base", "base", *PAIR)
    text = inside("merging", "info", "out").stdout
    assert f"{len(base)} tensors" in text
    assert "merged by neurocl" in text
    assert "of base, m0, m1" in text.replace("m0, m1, base", "base, m0, m1")
    document = json.loads(inside("merging", "info", "out", "--json").stdout)
    assert document["values"] == sum(value.numel() for value in base.values())
    assert document["merged by neurocl"]["method"] == "ties"
    assert_one_line(inside("merging", "info", "tiess"), 2, "did you mean 'ties'")
    for text in ("not JSON", "[]", '{"method": "x"}'):
        save_file(base, tmp_path / "foreign.safetensors", metadata={"neurocl_merge": text})
        assert inside("merging", "info", "foreign.safetensors").returncode == 0


@pytest.fixture(scope="module")
def slow_models(tmp_path_factory):
    """Matrices that take several seconds to merge with tsv-m."""
    folder = tmp_path_factory.mktemp("slow")
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{index:02d}.weight": torch.randn(512, 320, generator=generator) for index in range(32)}
    save_folder(folder / "base", base)
    for number in range(3):
        model = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_folder(folder / f"m{number}", model, shards=2)
    return folder


def slow_arguments(folder):
    models = [folder / f"m{number}" for number in range(3)]
    return (*MERGE, "--method", "tsv-m", "--base", folder / "base", *models, "--shard-size", "2M", "--json", "--quiet")


@pytest.fixture(scope="module")
def whole(slow_models):
    """The output of the slow merge, never interrupted."""
    from neurocl.config import validate
    from neurocl.merging.files import merge_files
    from neurocl.merging.recipe import Recipe

    models = [{"path": slow_models / f"m{number}"} for number in range(3)]
    values = {"method": "tsv-m", "base": slow_models / "base", "models": models, "shard_size": "2M"}
    torch.set_num_threads(1)
    merge_files(validate(Recipe, values), slow_models / "whole")
    return weights_of(slow_models / "whole")


def weights_of(folder):
    names = ("*.safetensors", "*.index.json", "config.json")
    return {path.name: path.read_bytes() for name in names for path in folder.glob(name)}


def wait_until(process, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def lines_of(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_merge_killed_again_and_again_ends_with_the_same_bytes(start, neurocl, tmp_path, slow_models, whole):
    rng = random.Random(0)
    arguments = (*slow_arguments(slow_models), "--out", "out")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    done = 0
    for kills in range(3):
        process = start(*arguments)
        if kills < 2:
            wait_until(process, lambda: lines_of(journal) > done + 1)  # noqa: B023
        else:
            wait_until(process, journal.exists)
        time.sleep(rng.uniform(0.0, 0.3))
        assert process.poll() is None, "the merge is too short to be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = lines_of(journal) - 1
        assert not (tmp_path / "out").exists()
    result = neurocl(*arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["resumed_tensors"] > 0
    assert weights_of(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.5, 1.2])
def test_a_merge_killed_at_any_moment_ends_with_the_same_bytes(saved, start, neurocl, tmp_path, moment):
    base, models = saved
    arguments = (*MERGE, "--method", "ties", "--base", "base", "m0", "m1", "--shard-size", "300", "--json", "--quiet")
    process = start(*arguments, "--out", "out")
    time.sleep(moment)
    process.kill()
    process.communicate()
    result = neurocl(*arguments, "--out", "out")
    assert result.returncode == 0 or "exists already" in result.stderr, result.stderr
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found.update(load_file(path))
    assert_same_bits({name: found[name] for name in base}, merge(base, models, "ties"))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_done_and_exits_130(start, inside, tmp_path, slow_models, whole, number):
    arguments = (*slow_arguments(slow_models), "--out", "out")
    process = start(*arguments)
    wait_until(process, (tmp_path / "out.partial" / "journal.jsonl").exists)
    time.sleep(1.5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "out.partial keeps what is done, the same command with --out out goes on" in stderr
    other = ("--alpha", 0.5)
    assert_one_line(inside(*arguments, *other), 2, "out.partial", "interrupted merge of other models or options")
    result = inside(*arguments)
    assert json.loads(result.stdout)["resumed_tensors"] > 0
    assert weights_of(tmp_path / "out") == whole


@pytest.mark.slow
def test_two_processes_cannot_write_one_output(start, inside, tmp_path, slow_models):
    arguments = (*slow_arguments(slow_models), "--out", "out")
    process = start(*arguments)
    wait_until(process, (tmp_path / "out.partial" / "journal.jsonl").exists)
    assert_one_line(inside(*arguments), 2, "out.partial is in use by another merge")
    process.kill()
    process.communicate()


@pytest.mark.parametrize("limit", [500, 1100])
def test_a_full_disk_is_one_line_and_the_merge_can_be_finished_later(saved, neurocl, inside, tmp_path, limit):
    base, models = saved
    arguments = (*MERGE, "--method", "ties", "--base", "base", "--quiet", *PAIR)

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert_one_line(neurocl(*arguments, preexec_fn=small_files_only), 1, "cannot write", "may not grow that large")
    assert not (tmp_path / "out").exists()
    result = inside(*arguments)
    assert result.returncode == 0, result.stderr
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), merge(base, models, "ties"))


def write_layers(folder, num_layers, shape):
    """A base and four models of equal layers."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{index}.weight": torch.randn(shape, generator=generator) for index in range(num_layers)}
    save_folder(folder / "base", base)
    for number in range(4):
        change = 0.01 * torch.randn(shape, generator=generator)
        save_folder(folder / f"m{number}", {name: value + change for name, value in base.items()})


def merged_in_a_process_of_its_own(folder, method):
    """What ``--json`` says of a merge. A shell between keeps the size of this process out of the peak of that one."""
    models = [str(folder / f"m{number}") for number in range(4)]
    arguments = [*map(str, MERGE), "--method", method, "--base", str(folder / "base"), *models, "--json", "--quiet"]
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "neurocl", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def call(*more):
        done = subprocess.run([*command, *map(str, more)], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "iso-c", "tsv-m"])
def test_the_memory_that_was_announced_is_not_exceeded(tmp_path, method):
    write_layers(tmp_path, 2, (1024, 640))
    call = merged_in_a_process_of_its_own(tmp_path, method)
    planned = call("--dry-run")["memory_bytes"] / 2**20
    peak = call("--out", tmp_path / "out", "--max-memory", f"{planned * 1.1:.0f}M")["peak_memory_mb"]
    assert peak <= planned
    assert planned < 1.8 * peak, "an estimate that is far too high refuses what would fit"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "iso-c"])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, method):
    peaks = []
    for num_layers in (2, 16):
        write_layers(tmp_path / str(num_layers), num_layers, (1024, 320))
        call = merged_in_a_process_of_its_own(tmp_path / str(num_layers), method)
        peaks.append(call("--out", tmp_path / str(num_layers) / "out")["peak_memory_mb"])
    assert peaks[1] < peaks[0] + 15, "14 more layers are 88 MB of weights, and none of them stays in memory"
