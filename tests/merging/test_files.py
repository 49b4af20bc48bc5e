"""Merging models on disk: the same bits as in memory, provenance, and one sentence for every mistake."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neurocl.config import validate
from neurocl.errors import UserError
from neurocl.merging import output
from neurocl.merging.checkpoints import FileSource
from neurocl.merging.engine import Merger
from neurocl.merging.files import merge_files, plan_merge
from neurocl.merging.memory import merge
from neurocl.merging.recipe import Recipe, read_recipe
from tests.merging.models import (
    WEIGHT_MERGES,
    assert_same_bits,
    content_sha256,
    declared,
    needed_statistics,
    num_models,
    save_folder,
    small_models,
)


@pytest.fixture
def saved(tmp_path):
    """Folders base, m0, m1, m2 with the small models; returns (base, models)."""
    base, models = small_models(3)
    save_folder(tmp_path / "base", base, config={"model_type": "tiny", "torch_dtype": "float32"})
    for index, model in enumerate(models):
        save_folder(tmp_path / f"m{index}", model, shards=index + 1, config={"model_type": "tiny"})
    return base, models


def recipe_for(folder, method="average", *, count=None, base="base", **values):
    names = [f"m{index}" for index in range(num_models(method) if count is None else count)]
    models = [{"path": folder / name} for name in names]
    for entry, weight in zip(models, values.pop("weights", ()), strict=False):
        entry["weight"] = weight
    given = {"method": method, "models": models, **({"base": folder / base} if base else {}), **values}
    return validate(Recipe, given)


def load_folder(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@pytest.mark.parametrize("shard_size", ["5G", "300"])
@pytest.mark.parametrize("name", WEIGHT_MERGES)
def test_a_streamed_merge_gives_the_bits_of_a_merge_in_memory(saved, tmp_path, name, shard_size, monkeypatch):
    base, models = saved
    models = models[: num_models(name)]
    statistics = needed_statistics(name, models)
    expected = merge(base, models, name, alpha=0.9, statistics=statistics)
    recipe = recipe_for(tmp_path, name, alpha=0.9, shard_size=shard_size)
    if statistics is not None:
        for index, one in enumerate(statistics):
            one.save(tmp_path / f"s{index}.safetensors")
        entries = [
            entry.model_copy(update={"statistics": tmp_path / f"s{index}.safetensors"})
            for index, entry in enumerate(recipe.models)
        ]
        recipe = recipe.model_copy(update={"models": tuple(entries)})
    monkeypatch.setattr(Merger, "piece", lambda self: 17)
    report = merge_files(recipe, tmp_path / "out")
    assert_same_bits(load_folder(tmp_path / "out"), {key: expected[key] for key in load_folder(tmp_path / "out")})
    assert load_folder(tmp_path / "out").keys() == base.keys()
    assert len(report.plan.files) == (1 if shard_size == "5G" else len(list((tmp_path / "out").glob("*.safetensors"))))
    assert FileSource.open(tmp_path / "out").tensors == FileSource.open(tmp_path / "base").tensors


@pytest.mark.parametrize("name", ["ties", "dare-ties", "consensus", "iso-c"])
def test_how_the_inputs_are_sharded_changes_no_bit(tmp_path, name):
    base, models = small_models(3)
    for shards in (1, 4):
        folder = tmp_path / str(shards)
        save_folder(folder / "base", base, shards=shards)
        for index, model in enumerate(models):
            save_folder(folder / f"m{index}", model, shards=shards)
        merge_files(recipe_for(folder, name), folder / "out")
    assert_same_bits(load_folder(tmp_path / "1" / "out"), load_folder(tmp_path / "4" / "out"))


def test_bare_files_go_in_and_out(tmp_path):
    base, models = small_models(2)
    for name, tensors in {"base": base, "m0": models[0], "m1": models[1]}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    models_in = [{"path": tmp_path / f"m{index}.safetensors"} for index in range(2)]
    recipe = validate(Recipe, {"method": "ties", "base": tmp_path / "base.safetensors", "models": models_in})
    merge_files(recipe, tmp_path / "out.safetensors")
    assert_same_bits(load_file(tmp_path / "out.safetensors"), merge(base, models, "ties"))
    assert json.loads((tmp_path / "out.merge.json").read_text())["method"] == "ties"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("base.safetensors", "m0.safetensors", "m1.safetensors", "out.safetensors", "out.merge.json")
    }


def test_merging_without_a_base_takes_names_and_types_of_the_first_model(saved, tmp_path):
    _, models = saved
    merge_files(recipe_for(tmp_path, base=None), tmp_path / "out")
    assert_same_bits(load_folder(tmp_path / "out"), merge(None, models, "average"))


def test_dtype_changes_the_weights_and_what_the_configuration_says(saved, tmp_path):
    base, models = saved
    merge_files(recipe_for(tmp_path, "ties", dtype="bfloat16"), tmp_path / "out")
    assert_same_bits(load_folder(tmp_path / "out"), merge(base, models, "ties", dtype=torch.bfloat16))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "tiny", "torch_dtype": "bfloat16"}


def test_small_files_of_the_base_come_along_and_pickles_do_not(saved, tmp_path):
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "training_args.bin", "notes.md", ".hidden.json"):
        (tmp_path / "base" / name).write_text(name)
    merge_files(recipe_for(tmp_path), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja"),
        *("merge.json", "merge.yaml", "README.md"),
    }


def header_of(path):
    with safe_open(str(path), framework="pt") as stream:
        return stream.metadata()


def test_every_file_says_where_it_came_from(saved, tmp_path):
    base, models = saved
    recipe = recipe_for(tmp_path, "ties", weights=[1, 2, 0.5], options={"density": 0.4}, shard_size="400", alpha=0.7)
    merge_files(recipe, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    contents = {"base": base, **{f"m{index}": model for index, model in enumerate(models)}}
    for file in files:
        said = json.loads(header_of(file)["neurocl_merge"])
        assert header_of(file)["format"] == "pt"
        assert (said["method"], said["alpha"], said["weights"]) == ("ties", 0.7, [1, 2, 0.5])
        assert said["options"]["density"] == 0.4
        assert said["options"]["sign"] == "total"
        assert "NeurIPS 2023" in said["reference"]
        assert said["inputs_sha256"] == {name: content_sha256(tensors) for name, tensors in contents.items()}


def test_the_report_names_inputs_classes_and_treatments(saved, tmp_path):
    base, _ = saved
    merge_files(recipe_for(tmp_path, "iso-c"), tmp_path / "out")
    document = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert document["schema"] == 1
    assert document["inputs_sha256"][str(tmp_path / "base")] == content_sha256(base)
    assert document["tensors"]["blocks.0.weight"] == {"class": "matrix", "action": "merge", "from_base": []}
    assert document["tensors"]["norm.running_var"]["action"] == "mean"
    assert document["tensors"]["position_ids"]["action"] == "copy"
    assert document["tensors"].keys() == base.keys()
    assert sum(row["values"] for row in document["classes"]) == sum(value.numel() for value in base.values())


def test_inputs_of_one_name_are_told_apart(tmp_path):
    _, models = small_models(2)
    for index, model in enumerate(models):
        save_folder(tmp_path / f"seed-{index}" / "final", model)
    recipe = validate(Recipe, {"models": [tmp_path / f"seed-{index}" / "final" for index in range(2)]})
    merge_files(recipe, tmp_path / "out")
    said = json.loads(header_of(tmp_path / "out" / "model.safetensors")["neurocl_merge"])["inputs_sha256"]
    assert said == {f"seed-{index}/final": content_sha256(model) for index, model in enumerate(models)}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "seed-0/final" in card
    assert str(tmp_path) not in card, "a card is published; it does not show the disk it was made on"


def test_a_base_that_is_not_read_is_said_not_to_be_read(tmp_path):
    base, models = ({"w": values["blocks.0.weight"]} for values in (small_models(1)[0], small_models(1)[1][0]))
    save_folder(tmp_path / "base", base)
    save_folder(tmp_path / "m0", models)
    report = merge_files(recipe_for(tmp_path, count=1), tmp_path / "out")
    assert report.inputs[str(tmp_path / "base")].strip() == "not read"
    assert report.inputs[str(tmp_path / "m0")] == content_sha256(models)


@pytest.mark.parametrize("start", [".", "elsewhere"])
def test_the_written_recipe_repeats_the_merge_to_the_same_bytes_from_anywhere(saved, tmp_path, monkeypatch, start):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"method": "dare-ties", "base": "base", "models": ["m0", "m1", "m2"], "options": {"seed": 3}}
    merge_files(validate(Recipe, values), tmp_path / "out")
    monkeypatch.chdir(tmp_path / start)
    merge_files(read_recipe(tmp_path / "out" / "merge.yaml"), tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_the_model_card_has_front_matter_inputs_treatments_and_the_recipe(saved, tmp_path):
    base, _ = saved
    merge_files(recipe_for(tmp_path, "tsv-m", alpha=0.5), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: neurocl\ntags:\n- merge\n- neurocl\n- tsv-m\n---\n")
    assert f"| base | base | `{content_sha256(base)}` |" in card
    assert "| matrix (two dimensions) | tsv-m | 2 |" in card
    assert "| statistics (running statistics of BatchNorm) | mean of the models | 2 |" in card
    assert "method: tsv-m\nmodels:\n- m0\n- m1\n- m2\nalpha: 0.5" in card.replace("base: base\n", "")


def test_the_plan_says_what_will_happen_and_writes_nothing(saved, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    plan = plan_merge(recipe_for(tmp_path, "iso-c", shard_size="400"))
    assert sorted(tmp_path.rglob("*")) == before
    merge_files(recipe_for(tmp_path, "iso-c", shard_size="400"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(plan.files)
    assert plan.out_bytes == sum(value.nbytes for value in load_folder(tmp_path / "out").values())
    assert plan.by_class()["matrix, merge"]["tensors"] == 2
    assert plan.largest in {step.name for step in plan.steps}


def test_too_little_memory_is_refused_before_anything_is_written(saved, tmp_path):
    with pytest.raises(UserError, match=r"--max-memory 1M is too little: iso-c on 3 models needs about \d+M for the"):
        merge_files(recipe_for(tmp_path, "iso-c"), tmp_path / "out", max_memory=1 << 20)
    assert not list(tmp_path.glob("out*"))
    merge_files(recipe_for(tmp_path, "iso-c"), tmp_path / "out", max_memory=1 << 40)


def test_progress_counts_every_value(saved, tmp_path):
    base, _ = saved
    calls = []
    merge_files(recipe_for(tmp_path), tmp_path / "out", progress=lambda *call: calls.append(call))
    total = sum(value.numel() for value in base.values())
    assert calls[-1][:2] == (total, total)
    assert {call[2] for call in calls} == base.keys()


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 6), (60.0, 0)])
def test_an_interrupted_merge_goes_on_and_a_changed_input_stops_it(saved, tmp_path, monkeypatch, seconds, kept):
    monkeypatch.setattr(output, "SYNC_SECONDS", seconds)
    recipe = recipe_for(tmp_path, "ties")
    merge_files(recipe, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after_six(done, total, name):
        seen.append(name)
        if len(seen) == 6:
            raise Stop

    seen: list[str] = []
    with pytest.raises(Stop):
        merge_files(recipe, tmp_path / "out", progress=stop_after_six)
    assert not (tmp_path / "out").exists()
    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    report = merge_files(recipe, tmp_path / "out")
    assert report.resumed == kept, "what never reached the disk is done again"
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()
    _, others = small_models(3, seed=9)
    shutil.rmtree(tmp_path / "m2")
    save_folder(tmp_path / "m2", others[2], shards=3)
    with pytest.raises(UserError, match="interrupted merge of other models or options"):
        merge_files(recipe, tmp_path / "other")


def test_statistics_that_changed_stop_a_merge_that_was_interrupted(saved, tmp_path):
    _, models = saved
    entries = []
    for index, one in enumerate(needed_statistics("regmean", models)):
        one.save(tmp_path / f"s{index}.safetensors")
        entries.append({"path": tmp_path / f"m{index}", "statistics": tmp_path / f"s{index}.safetensors"})
    recipe = validate(Recipe, {"method": "regmean", "models": entries})

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(recipe, tmp_path / "out", progress=stop)
    needed_statistics("regmean", models)[1].save(tmp_path / "s0.safetensors")
    with pytest.raises(UserError, match="interrupted merge of other models or options"):
        merge_files(recipe, tmp_path / "out")


def test_a_small_file_that_was_copied_half_is_copied_again(saved, tmp_path):
    (tmp_path / "base" / "tokenizer.json").write_text("complete")
    recipe = recipe_for(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(recipe, tmp_path / "out", progress=stop)
    (tmp_path / "out.partial" / "tokenizer.json").write_text("comp")
    merge_files(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "complete"


MISTAKES = {
    "shape": (lambda m: m.update({"blocks.0.bias": torch.ones(3)}), ("'blocks.0.bias' is [3] in", "m1", "[8] in")),
    "missing": (lambda m: m.pop("scale"), ("m1 has no tensor 'scale'", "base has")),
    "extra": (lambda m: m.update({"ghost": torch.ones(1)}), ("m1 has a tensor 'ghost'", "base lacks")),
    "nan": (lambda m: m["conv.weight"].view(-1)[3].fill_(float("nan")), ("'conv.weight' of", "m1 contains NaN")),
    "infinity": (lambda m: m["scale"].fill_(float("inf")), ("'scale' of", "m1 contains NaN or infinity")),
}


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("method", ["average", "ties", "iso-c"])
def test_models_that_do_not_fit_are_named_with_the_tensor(tmp_path, kind, method):
    base, models = small_models(2)
    change, words = MISTAKES[kind]
    change(models[1])
    save_folder(tmp_path / "base", base)
    for index, model in enumerate(models):
        save_folder(tmp_path / f"m{index}", model)
    with pytest.raises(UserError) as caught:
        merge_files(recipe_for(tmp_path, method, count=2), tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_taken_from_the_base_and_reported_if_asked(tmp_path):
    base, models = small_models(2)
    models[1]["blocks.0.bias"] = torch.ones(3)
    del models[1]["scale"]
    models[0]["ghost"] = torch.ones(1)
    save_folder(tmp_path / "base", base)
    for index, model in enumerate(models):
        save_folder(tmp_path / f"m{index}", model)
    report = merge_files(recipe_for(tmp_path, count=2, on_mismatch="base"), tmp_path / "out")
    assert_same_bits(load_folder(tmp_path / "out"), merge(base, models, "average", on_mismatch="base"))
    assert len(report.plan.left_out) == 3
    document = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert document["tensors"]["scale"]["from_base"] == [1]
    assert any("'ghost'" in sentence for sentence in document["left_out"])
    for name, tensors in {"base": base, "m0": models[0], "m1": models[1]}.items():
        assert report.inputs[str(tmp_path / name)] == content_sha256(tensors)


def test_a_tensor_taken_from_the_base_slice_by_slice_leaves_its_hash_right(tmp_path, monkeypatch):
    monkeypatch.setattr(Merger, "piece", lambda self: 5)
    base, models = small_models(2)
    del models[1]["blocks.0.weight"]
    save_folder(tmp_path / "base", base)
    for index, model in enumerate(models):
        save_folder(tmp_path / f"m{index}", model)
    report = merge_files(recipe_for(tmp_path, "ties", count=2, on_mismatch="base"), tmp_path / "out")
    assert report.inputs[str(tmp_path / "base")] == content_sha256(base)


@pytest.mark.parametrize("key", ["architectures", "model_type", "vocab_size"])
def test_models_of_another_network_are_refused(saved, tmp_path, key):
    for name, value in (("base", "one"), ("m0", "one"), ("m1", "another"), ("m2", "one")):
        (tmp_path / name / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=f"m1 and .*base differ in {key}: another and one"):
        plan_merge(recipe_for(tmp_path))


def test_an_output_that_exists_is_never_touched(saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="out exists already"):
        merge_files(recipe_for(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_merges_of_adapters_and_networks_are_sent_elsewhere(saved, tmp_path):
    for method in ("lora-svd", "com"):
        with pytest.raises(UserError, match=f"{method} does not merge weight files"):
            plan_merge(recipe_for(tmp_path, count=2).model_copy(update={"method": method}))


def test_declared_options_are_filled_in_by_the_plan(saved, tmp_path):
    plan = plan_merge(recipe_for(tmp_path, "ties", options={"density": 0.5}))
    assert plan.recipe.options == declared("ties").resolve({"density": 0.5})
