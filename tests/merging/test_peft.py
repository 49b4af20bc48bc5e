"""LoRA adapter folders in and out: the numbers PEFT gives, and folders that PEFT reads back."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from neurocl.config import validate
from neurocl.errors import UserError
from neurocl.merging.adapter_files import merge_adapter_folders, plan_adapters
from neurocl.merging.adapters import ADAPTER_MERGES, merge_adapters
from neurocl.merging.checkpoints import FileSource
from neurocl.merging.engine import Merger
from neurocl.merging.files import merge_files, plan_merge
from neurocl.merging.memory import merge
from neurocl.merging.peft import AdapterSource, read_adapter
from neurocl.merging.recipe import Recipe, read_recipe
from tests.merging.models import content_sha256, save_folder


class Network(nn.Module):
    """Every kind of layer that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        h = self.conv(self.lin(self.embed(x)).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(h))


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


@pytest.fixture
def base(tmp_path):
    return save_folder(tmp_path / "base", dict(network().state_dict()))


def write_lora(folder, *, rank=3, seed=0, config=None, changes=None, sizes=None):
    """An adapter folder written by hand: factors of ``lin`` and ``head``, ``changes`` to its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, width) in (sizes or {"lin": (8, 6), "head": (5, 4)}).items():
        for letter, shape in (("A", (rank, width)), ("B", (out, rank))):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = torch.randn(shape, generator=generator)
    for name, value in (changes or {}).items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": "tiny", **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def delta_of(folder, module, scaling):
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"].double() for letter in "AB")
    return scaling * b @ a


def recipe_of(method, *models, **values):
    return validate(Recipe, {"method": method, "models": list(models), **values})


def test_an_adapter_on_its_base_is_a_model_to_merge(base, tmp_path):
    adapters = [write_lora(tmp_path / f"a{seed}", seed=seed) for seed in range(2)]
    merge_files(recipe_of("task-arithmetic", *adapters, base=base), tmp_path / "out")
    result, start = load_file(tmp_path / "out" / "model.safetensors"), network().state_dict()
    for module in ("lin", "head"):
        expected = start[f"{module}.weight"].double() + sum(delta_of(path, module, 2.0) for path in adapters)
        assert torch.equal(result[f"{module}.weight"], expected.float())
    assert torch.equal(result["conv.weight"], start["conv.weight"])


def test_an_adapter_and_a_full_model_can_be_merged_with_each_other(base, tmp_path):
    adapter = write_lora(tmp_path / "a")
    start = dict(network().state_dict())
    full = {name: value + 0.1 for name, value in start.items()}
    save_folder(tmp_path / "full", full)
    dense = {k: v.double() for k, v in start.items()}
    for module in ("lin", "head"):
        dense[f"{module}.weight"] = dense[f"{module}.weight"] + delta_of(adapter, module, 2.0)
    merge_files(recipe_of("ties", adapter, tmp_path / "full", base=base), tmp_path / "out")
    expected = merge(start, [dense, full], "ties")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, expected[name])


def test_slices_of_an_adapted_model_are_the_same_bits_and_leave_the_hash_of_the_base_right(base, tmp_path, monkeypatch):
    adapters = [write_lora(tmp_path / f"a{seed}", seed=seed) for seed in range(2)]
    merge_files(recipe_of("ties", *adapters, base=base), tmp_path / "whole")
    monkeypatch.setattr(Merger, "piece", lambda self: 7)
    report = merge_files(recipe_of("ties", *adapters, base=base), tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    assert report.inputs[str(base)] == content_sha256(dict(network().state_dict()))


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 6 / 3),
        ({"use_rslora": True}, 6 / math.sqrt(3)),
        ({"alpha_pattern": {"lin": 12}}, 12 / 3),
        ({"alpha_pattern": {"l.*": 9}}, 9 / 3),
        ({"alpha_pattern": {"^lin": 9}}, 9 / 3),
        ({"alpha_pattern": {"in": 9}}, 6 / 3),
        ({"lora_alpha": 1}, 1 / 3),
    ],
)
def test_the_scaling_follows_the_configuration(tmp_path, config, scaling):
    folder = write_lora(tmp_path / "a", config=config)
    layer = read_adapter(folder).layers["lin"].lora
    assert layer.scaling == pytest.approx(scaling)
    torch.testing.assert_close(layer.delta(), delta_of(folder, "lin", scaling))


A, B = "base_model.model.lin.lora_A.weight", "base_model.model.lin.lora_B.weight"
MISTAKES = {
    "not LoRA": ({"config": {"peft_type": "IA3"}}, "only LoRA adapters can be merged, this one is 'IA3'"),
    "DoRA": ({"config": {"use_dora": True}}, "a DoRA adapter"),
    "PiSSA": ({"config": {"init_lora_weights": "pissa_niter_4"}}, "belongs to a changed base"),
    "one factor": ({"changes": {B: None}}, "module 'lin' has only one of the factors A and B"),
    "ranks": ({"changes": {B: torch.ones(8, 2)}}, "factors [3, 6] and [8, 2] of module 'lin' do not fit together"),
    "NaN": ({"changes": {A: torch.full((3, 6), math.nan)}}, f"tensor {A!r} contains NaN or infinity"),
    "unknown module": (
        {"sizes": {"ghost": (8, 6)}},
        "adapts 'ghost.weight', which",
    ),
    "size of the base": ({"sizes": {"lin": (7, 6)}}, "factors of 'lin.weight' make [7, 6], the base has [8, 6]"),
    "trained tensor of another shape": (
        {"changes": {"base_model.model.head.bias": torch.ones(4)}},
        "tensor 'head.bias' is [4] in",
    ),
    "pattern": ({"config": {"alpha_pattern": {"(": 1}}}, "adapter pattern '(' is not a regular expression"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_an_adapter_that_cannot_be_merged_is_refused_by_name(base, tmp_path, kind):
    values, words = MISTAKES[kind]
    folder = write_lora(tmp_path / "adapter", **values)
    with pytest.raises(UserError) as caught:
        plan_merge(recipe_of("ties", folder, base=base))
    assert words in str(caught.value)
    assert "adapter" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_adapter_folders_are_named(base, tmp_path):
    folder = write_lora(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-3])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: truncated"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"adapter_model\.bin: a pickle"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: not valid JSON"):
        read_adapter(folder)
    with pytest.raises(UserError, match="is a LoRA adapter: give the model it was made for as base"):
        plan_merge(recipe_of("average", write_lora(tmp_path / "b")))


def test_adapters_that_do_not_belong_together_are_refused(base, tmp_path):
    good = write_lora(tmp_path / "good")
    other = write_lora(tmp_path / "other", config={"base_model_name_or_path": "another"})
    fewer = write_lora(tmp_path / "fewer", sizes={"lin": (8, 6)})
    trained = write_lora(tmp_path / "trained", changes={"base_model.model.head.bias": torch.ones(5)})
    for bad, words in (
        (other, "were made for different models: ['another', 'tiny']"),
        (fewer, "good adapts 'head'"),
        (trained, "holds the fully trained tensor 'head.bias' beside its factors"),
        (base, "not a PEFT adapter folder, which lora-svd merges"),
    ):
        with pytest.raises(UserError) as caught:
            merge_adapter_folders(recipe_of("lora-svd", good, bad), tmp_path / "out")
        assert words in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="equal ranks"):
        merge_adapter_folders(recipe_of("lora-linear", good, write_lora(tmp_path / "r2", rank=2)), tmp_path / "out")
    with pytest.raises(UserError, match="--max-memory 1M is too little"):
        merge_adapter_folders(recipe_of("lora-svd", good), tmp_path / "out", max_memory=1 << 20)
    with pytest.raises(UserError, match=r"choose an --out without \.safetensors"):
        merge_adapter_folders(recipe_of("lora-svd", good), tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"parameters": {"kept": ["encoder.*"]}}, "'parameters'"),
        ({"on_mismatch": "base"}, "'on_mismatch'"),
        ({"compute_dtype": "float32"}, "'compute_dtype'"),
        ({"shard_size": "1M"}, "'shard_size'"),
        ({"models": [{"path": "a", "statistics": "s"}]}, "no statistics"),
    ],
)
def test_what_speaks_of_weight_files_is_refused_and_not_ignored(tmp_path, changes, word):
    recipe = validate(Recipe, {"method": "lora-svd", "models": ["a"], **changes})
    with pytest.raises(UserError, match=word):
        merge_adapter_folders(recipe, tmp_path / "out")


def test_a_folder_beside_the_output_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("keep")
    merge_adapter_folders(recipe_of("lora-svd", write_lora(tmp_path / "a")), tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "keep"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out", "out.partial"}


@pytest.mark.parametrize("method", ADAPTER_MERGES)
def test_the_written_recipe_repeats_the_merge_to_the_same_bytes(tmp_path, method, monkeypatch):
    adapters = [write_lora(tmp_path / f"a{seed}", seed=seed) for seed in range(2)]
    merge_adapter_folders(recipe_of(method, *adapters, alpha=0.5), tmp_path / "out")
    merge_adapter_folders(read_recipe(tmp_path / "out" / "merge.yaml"), tmp_path / "again")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "merge.json", "merge.yaml", "README.md")
    }


@pytest.mark.parametrize(("method", "rank"), [("lora-svd", 3), ("lora-cat", 5), ("knots", 5), ("core-space", 5)])
def test_the_plan_tells_the_size_of_the_merged_adapter(tmp_path, method, rank):
    recipe = recipe_of(method, write_lora(tmp_path / "a"), write_lora(tmp_path / "b", rank=2, seed=1))
    merge_adapter_folders(recipe, tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert plan_adapters(recipe).out_bytes == sum(value.nbytes for value in written.values())
    assert len(written[A]) == rank


def test_a_merged_adapter_is_read_back_as_the_merged_update(tmp_path):
    adapters = [write_lora(tmp_path / f"a{seed}", rank=2 + seed, seed=seed) for seed in range(2)]
    merge_adapter_folders(recipe_of("lora-cat", *adapters, alpha=0.5), tmp_path / "out")
    layer = read_adapter(tmp_path / "out").layers["lin"].lora
    expected = 0.5 * sum(delta_of(path, "lin", 6 / (2 + seed)) for seed, path in enumerate(adapters))
    torch.testing.assert_close(layer.delta(), expected, rtol=1e-6, atol=1e-6)


# From here on beside the real PEFT.


@pytest.fixture(scope="module")
def peft():
    from neurocl.compat.torchvision import ensure_torchvision

    ensure_torchvision()
    return pytest.importorskip("peft", reason="PEFT is not installed; pip install peft runs this comparison")


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"lin": 2, "conv": 4}, "alpha_pattern": {"conv": 7, "^embed": 1}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"lin": 2}, "alpha_pattern": {"lin": 3}},
}
TRAINED = {
    "biases": {"bias": "all"},
    "biases of the adapted": {"bias": "lora_only"},
    "a trained head": {"modules_to_save": ["head"]},
    "everything": {"bias": "all", "modules_to_save": ["head"]},
}


def trained_adapter(peft, folder, *, seed=0, **options):
    """An adapter with random factors, saved by PEFT; returns the state dict of the model it makes of the base."""
    values = {"r": 3, "lora_alpha": 5, "target_modules": ["embed", "lin", "conv"], "init_lora_weights": False}
    torch.manual_seed(100 + seed)
    model = peft.get_peft_model(network(), peft.LoraConfig(**values | options))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return {name: value.clone() for name, value in model.merge_and_unload().state_dict().items()}


@pytest.mark.peer
@pytest.mark.parametrize("variant", [*VARIANTS, *TRAINED])
def test_an_adapter_on_its_base_is_what_peft_makes_of_it(peft, base, tmp_path, variant):
    expected = trained_adapter(peft, tmp_path / "adapter", **(VARIANTS | TRAINED)[variant])
    source = FileSource.open(base)
    adapted = AdapterSource.open(tmp_path / "adapter", source)
    start = network().state_dict()
    for name, spec in adapted.tensors.items():
        value = adapted.read(name, 0, spec.numel).view(spec.shape)
        torch.testing.assert_close(value.float(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected["lin.weight"], start["lin.weight"])


@pytest.mark.peer
def test_weights_stored_transposed_are_adapted_transposed(peft, tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    network = nn.ModuleDict({"lin": Conv1D(7, 4)})
    base = save_folder(tmp_path / "base", dict(network.state_dict()))
    config = peft.LoraConfig(r=2, target_modules=["lin"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(network, config)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload()["lin"].weight.data
    source = AdapterSource.open(tmp_path / "adapter", FileSource.open(base))
    torch.testing.assert_close(source.read("lin.weight", 0, 28).view(4, 7).float(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ADAPTER_MERGES)
def test_peft_reads_a_merged_adapter_as_the_merged_update(peft, tmp_path, method, variant):
    adapters = [tmp_path / f"a{seed}" for seed in range(2)]
    for seed, folder in enumerate(adapters):
        trained_adapter(peft, folder, seed=seed, **VARIANTS[variant])
    read = [{name: layer.lora for name, layer in read_adapter(folder).layers.items()} for folder in adapters]
    merged = merge_adapters(read, method, weights=[0.6, 0.7])
    models = [{"path": folder, "weight": weight} for folder, weight in zip(adapters, (0.6, 0.7), strict=True)]
    merge_adapter_folders(recipe_of(method, *models, alpha=0.8), tmp_path / "out")
    found = peft.PeftModel.from_pretrained(network(), tmp_path / "out").merge_and_unload().state_dict()
    start = network().state_dict()
    for name in ("embed", "lin", "conv"):
        delta = 0.8 * merged[name].delta()
        delta = delta.T if name == "embed" else delta.view(start[f"{name}.weight"].shape)
        expected = start[f"{name}.weight"] + delta
        torch.testing.assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["head.weight"], start["head.weight"])


@pytest.mark.peer
def test_the_sum_of_adapters_of_different_ranks_is_the_sum_of_what_peft_makes_of_each(peft, tmp_path):
    start = network().state_dict()
    options = ({"r": 2}, {"r": 4, "use_rslora": True}, {"rank_pattern": {"lin": 5}})
    made = [trained_adapter(peft, tmp_path / f"a{seed}", seed=seed, **one) for seed, one in enumerate(options)]
    paths = [tmp_path / f"a{seed}" for seed in range(3)]
    merge_adapter_folders(recipe_of("lora-cat", *paths), tmp_path / "out")
    ranks = json.loads((tmp_path / "out" / "merge.json").read_text())["ranks"]
    assert ranks == {"conv": 9, "embed": 9, "lin": 11}
    model = peft.PeftModel.from_pretrained(network(), tmp_path / "out")
    tokens = torch.arange(11)[None]
    merged = {name: value + sum(one[name] - value for one in made) for name, value in start.items()}
    expected = network()
    expected.load_state_dict(merged)
    torch.testing.assert_close(model(tokens), expected(tokens), rtol=1e-4, atol=1e-4)
