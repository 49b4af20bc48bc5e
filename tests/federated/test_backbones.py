"""Networks that a federation can start from: perceptrons, transformers, folders of transformers, one's own module."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neurocl.errors import UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import ProcessExchange, SequentialExchange, Stores
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier, linear_layers
from neurocl.federated.pretraining import Recipe, pretrained
from neurocl.federated.transformers_vit import PictureTransformer


def config(**changes: Any) -> FederatedConfig:
    return FederatedConfig(
        **{"rounds": 1, "local_epochs": 1, "classes_per_task": 5, "partition": {"num_clients": 2}, **changes}
    )


def run(settings: FederatedConfig) -> dict[str, Any]:
    problem = problem_for(settings)
    method = method_for(problem)
    stores = Stores(None, 0)
    return FederatedRun(problem, method, SequentialExchange(problem, method, stores, ()), stores).run()


def small(classes: int = 3) -> Classifier:
    torch.manual_seed(0)
    return Classifier(torch.nn.Linear(4, 6), 6, classes)


def some_samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    return Samples(torch.randn(30, 4, generator=generator), torch.randint(3, (30,), generator=generator))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if "keeps" in request.node.name:
        monkeypatch.setenv("NEUROCL_CACHE", str(tmp_path / "cache"))


def test_pretraining_keeps_its_weights_and_does_not_train_twice(tmp_path: Path) -> None:
    recipe, samples = Recipe("small", epochs=2, batch_size=8, lr=0.01), some_samples()
    first = pretrained(recipe, small, samples)
    (kept,) = (tmp_path / "cache" / "federated").iterdir()
    assert load_file(kept).keys() == first.keys()

    def forbidden() -> Classifier:
        raise AssertionError("built again")

    second = pretrained(recipe, forbidden, samples)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["weight"], small().backbone.weight)  # type: ignore[arg-type]


def test_pretraining_keeps_other_recipes_and_data_apart_and_mends_a_damaged_file(tmp_path: Path) -> None:
    samples = some_samples()
    pretrained(Recipe("small", epochs=1, batch_size=8, lr=0.01), small, samples)
    pretrained(Recipe("small", epochs=1, batch_size=8, lr=0.02, warmup=0.2), small, samples)
    pretrained(Recipe("small", epochs=1, batch_size=8, lr=0.01), small, Samples(samples.x + 1, samples.y))
    pretrained(Recipe("small", epochs=1, batch_size=8, lr=0.01), small, Samples(samples.x, samples.y.flip(0)))
    files = sorted((tmp_path / "cache" / "federated").iterdir())
    assert len(files) == 4
    whole = pretrained(Recipe("small", epochs=1, batch_size=8, lr=0.01), small, samples)
    for path in files:
        path.write_bytes(path.read_bytes()[:20])
    again = pretrained(Recipe("small", epochs=1, batch_size=8, lr=0.01), small, samples)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_digits_have_a_transformer_with_adapters_on_attention_and_mlp_alone() -> None:
    problem = problem_for(config(backbone="vit", method="lora"))
    adapted = {name.rpartition(".lora_A")[0] for name in method_for(problem).initial_state().arrays if "lora_A" in name}
    assert len(adapted) == 3 * 4
    assert all(name.endswith(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")) for name in adapted)


def test_prompts_of_a_transformer_are_prefixes_and_learn() -> None:
    problem = problem_for(config(backbone="vit", method="prompt"))
    names = set(method_for(problem).initial_state().arrays)
    assert sum(name.endswith(".attn.prompt") for name in names) == 2
    assert (
        run(config(backbone="vit", method="prompt", local_epochs=3))["metrics"]["class_il"]["final_average_accuracy"]
        > 20
    )


def test_an_unknown_backbone_is_one_line() -> None:
    with pytest.raises(UserError, match="digits has no backbone 'resnet' \\(choose from perceptron, vit\\)"):
        problem_for(config(backbone="resnet"))


OWN = """
import torch
from neurocl import federated
from neurocl.federated.network import Classifier

def waves(config):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 4
    x = torch.sin(torch.arange(16) * (y[:, None] + 1) / 3) + 0.3 * torch.randn(240, 16, generator=generator)
    def build():
        torch.manual_seed(1)
        return Classifier(torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh()), 32, 4)
    train, test = federated.Samples(x[:160], y[:160]), federated.Samples(x[160:], y[160:])
    return federated.Source("waves", train, test, ("a", "b", "c", "d"), build)

def nothing(config):
    return 3

def wrong(config):
    return torch.zeros(2) @ torch.zeros(3)

def built_wrong(config):
    def build():
        raise KeyError("layer")
    samples = federated.Samples(torch.zeros(4, 2), torch.arange(4))
    return federated.Source("waves", samples, samples, ("a", "b", "c", "d"), build)
"""


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_waves.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_file")
def test_a_data_set_and_module_of_ones_own_run_in_this_process_and_in_others() -> None:
    settings = config(dataset="my_waves:waves", classes_per_task=2, local_epochs=5, lr=0.01)
    problem = problem_for(settings)
    states = []
    for make in (SequentialExchange, ProcessExchange):
        method, stores = method_for(problem), Stores(None, 0)
        if make is SequentialExchange:
            exchange: Any = SequentialExchange(problem, method, stores, ())
        else:
            workers = problem_for(settings.model_copy(update={"workers": 1}))
            exchange = ProcessExchange(workers, stores, ())
        try:
            one = FederatedRun(problem, method, exchange, stores)
            result = one.run()
        finally:
            exchange.close()
        states.append(one.state)
        assert result["metrics"]["class_il"]["final_average_accuracy"] > 30
    assert all((states[0].arrays[name] == states[1].arrays[name]).all() for name in states[0].arrays)


@pytest.mark.usefixtures("own_file")
@pytest.mark.parametrize(
    ("name", "told"), [("my_waves:nothing", "must return"), ("my_waves:absent", "imported"), ("no_file:f", "imported")]
)
def test_a_data_set_of_ones_own_that_is_not_there_is_one_line(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        problem_for(config(dataset=name))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own_file")
def test_an_exception_of_ones_own_code_is_one_line_that_says_where() -> None:
    with pytest.raises(UserError, match=r"my_waves:wrong raised RuntimeError in .*my_waves.py, line 20: ") as caught:
        problem_for(config(dataset="my_waves:wrong"))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    problem = problem_for(config(dataset="my_waves:built_wrong", classes_per_task=2))
    with pytest.raises(UserError, match=r"raised KeyError in .*my_waves.py, line 24: 'layer'"):
        problem.network()
    Path("bad_waves.py").write_text("def f(:\n")
    with pytest.raises(UserError, match="bad_waves:f raised SyntaxError"):
        problem_for(config(dataset="bad_waves:f"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Vision Transformer as transformers saves it."""
    from neurocl.compat.torchvision import ensure_torchaudio, ensure_torchvision

    ensure_torchvision()
    ensure_torchaudio()
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    path = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(shape).save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}')
    return path


@pytest.mark.skipif("NEUROCL_DATA" not in os.environ, reason="NEUROCL_DATA is not set: no real pictures")
def test_a_folder_of_transformers_is_a_backbone_whose_features_are_those_of_transformers(folder: Path) -> None:
    from transformers import ViTForImageClassification

    settings = config(dataset="eurosat", backbone=str(folder), method="lora")
    problem = problem_for(settings)
    network = problem.network().eval()
    assert set(linear_layers(network)) == {
        name for name, module in network.backbone.named_modules(prefix="backbone") if type(module) is torch.nn.Linear
    }
    pictures = problem.source.test.x[:5]
    resized = torch.nn.functional.interpolate(pictures, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (resized - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.2
    whole = ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole.vit(pixel_values=pixels).last_hidden_state[:, 0]
        assert torch.allclose(network.features(pictures), expected, atol=1e-5)
    assert isinstance(network.backbone, PictureTransformer)
    few = problem.train_samples(0, problem.tasks[0])
    method = method_for(problem)
    from neurocl.federated.method import Client, Phase, Place

    place = Place(problem.tasks[0], Phase("round"), 0)
    message = method.message(method.initial_state(), place)
    reply = method.client(Client(0, Samples(few.x[:64], few.y[:64]), 0), place, message)
    assert any((reply.arrays[name] != message.arrays[name]).any() for name in message.arrays if "lora_B" in name)


@pytest.mark.skipif("NEUROCL_DATA" not in os.environ, reason="NEUROCL_DATA is not set: no real pictures")
def test_a_folder_that_transformers_cannot_load_is_one_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="transformers cannot load it"):
        problem_for(config(dataset="eurosat", backbone=str(tmp_path)))
