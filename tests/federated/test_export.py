"""Models taken away from a run score as the run's own: neurocl's folders, folders of transformers, PEFT adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neurocl import federated
from neurocl.errors import NeuroclError, UserError
from neurocl.federated.catalog import FEDERATED
from neurocl.federated.digits import empty_network
from neurocl.federated.export import ExportFormat, export_model, low_rank
from neurocl.federated.model import load_model, model_of, saved_run
from neurocl.federated.partition import PartitionConfig
from neurocl.merging.adapter_files import merge_adapter_folders
from neurocl.merging.peft import read_adapter
from neurocl.merging.recipe import Recipe
from tests.federated.small_problem import config

OWN = """
import torch
from neurocl import federated
from neurocl.federated.network import Classifier

def build():
    torch.manual_seed(1)
    return Classifier(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh()), 8, 4)

def points(config):
    y = torch.arange(40) % 4
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + y[:, None]
    samples = federated.Samples(x, y)
    return federated.Source("points", samples, samples, ("a", "b", "c", "d"), build)
"""


def run(folder: Path, method: str, **changes: Any) -> Path:
    """A finished run of one round."""
    federated.run_federated(config(method=method, **{"rounds": 1, **changes}), out=folder)
    return folder


def scores_of(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Test samples of a run and the scores of its own predictor, straight from method and state."""
    saved = saved_run(path)
    x = saved.problem.source.test.x[::9]
    with torch.no_grad():
        return x, saved.method.predictor(saved.state, saved.task)(x)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.equal(found.isinf(), expected.isinf())
    known = expected.isfinite()
    scale = max(1.0, float(expected[known].abs().max()))
    assert float((found[known] - expected[known]).abs().max()) <= tolerance * scale


FOLDED = [("fedavg", {}), ("fed3r", {}), ("fedcof", {}), ("lorm", {}), ("pilora", {}), ("tangent", {"train": "head"})]
STATES = [("l2p", {}), ("hgp", {"epochs": 1, "draws": 8}), ("tangent", {"rank": 1, "ledger": True})]
QUICK: dict[str, dict[str, Any]] = {"target": {"synthesis": {"steps": 2}}, "hgp": {"epochs": 1}, "ccvr": {"epochs": 1}}


NEEDED: dict[str, dict[str, Any]] = {
    "krum": {"partition": PartitionConfig(num_clients=5, beta=1.0)},
    "scaffold": {"optimizer": "sgd"},
}


def assert_taken_away(tmp_path: Path, method: str, options: dict[str, Any]) -> Path:
    path = run(tmp_path / "run", method, options=options, **NEEDED.get(method, {}))
    done = export_model(path, tmp_path / "out")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    x, expected = scores_of(tmp_path / "elsewhere")
    model = load_model(tmp_path / "out")
    assert_alike(model(x), expected, 1e-6)
    seen = 10 if method == "joint" else 4
    assert torch.equal(model.classes(x), expected[:, :seen].argmax(dim=1))
    assert (model.seen, len(model.class_names)) == (seen, 10)
    assert set(done.files) == {"README.md", "config.json", "model.safetensors"}
    return tmp_path / "out"


@pytest.mark.parametrize(("method", "options"), FOLDED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_method_that_ends_as_a_plain_network_is_taken_away_as_one(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    out = assert_taken_away(tmp_path, method, options)
    network, x = load_model(out).network, torch.rand(3, 64)
    assert network is not None
    assert not network.training
    with torch.no_grad():
        assert torch.equal(network(x), load_model(out)(x))
    plain = empty_network(transformer=False).state_dict().keys()
    expected = {name for name in plain if "head" not in name} | {"head.prototypes"} if method == "pilora" else plain
    assert load_file(out / "model.safetensors").keys() == expected


@pytest.mark.parametrize(("method", "options"), STATES, ids=lambda value: value if isinstance(value, str) else "")
def test_any_other_method_makes_its_model_again_from_what_it_learnt(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    out = assert_taken_away(tmp_path, method, options)
    assert load_model(out).network is None
    names = {name.removeprefix("state.") for name in load_file(out / "model.safetensors") if name.startswith("state.")}
    # Nothing of single clients goes along: tables of their classes, their Gram matrices, the books of the server.
    assert names
    assert not [name for name in names if name.startswith(("told.", "gram", "moments", "ledger", "entered"))]


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in FEDERATED.names() if not FEDERATED.load(name).personal])
def test_every_method_can_be_taken_away(tmp_path: Path, method: str) -> None:
    assert_taken_away(tmp_path, method, QUICK.get(method, {}))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "dolfin", "pilora", "prompt", "dualprompt", "coda-prompt"])
def test_a_transformer_can_be_taken_away(tmp_path: Path, method: str) -> None:
    path = run(tmp_path / "run", method, backbone="vit")
    export_model(path, tmp_path / "out")
    x, expected = scores_of(path)
    assert_alike(load_model(tmp_path / "out")(x), expected, 1e-6)


def test_a_run_itself_can_be_loaded_before_it_is_over_and_says_so(tmp_path: Path) -> None:
    path = run(tmp_path / "run", "lora", rounds=2)
    x, expected = scores_of(path)
    assert torch.equal(load_model(path)(x), expected)
    (path / "result.json").unlink()
    state = path / "checkpoint" / "state.json"
    document = json.loads(state.read_text())
    document["progress"]["step"] = 3
    state.write_text(json.dumps(document))
    done = export_model(path)
    assert done.model == "after exchange 1 of 2 of task 2 of 2"
    assert done.folder == path / "model"
    assert json.loads((done.folder / "config.json").read_text())["model"] == done.model
    document["progress"]["step"] = 1
    state.write_text(json.dumps(document))
    assert load_model(path).seen == 2


def test_a_network_of_ones_own_is_given_when_it_is_loaded_and_no_code_is_run_for_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_points.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    for method in ("fedavg", "prompt"):
        path = run(tmp_path / method, method, dataset="my_points:points")
        done = export_model(path, tmp_path / f"{method}-out")
        assert "network=build" in done.usage
        with pytest.raises(UserError, match="network=\\.\\.\\."):
            load_model(done.folder)
        x, expected = scores_of(path)
        import my_points

        assert_alike(load_model(done.folder, network=my_points.build)(x), expected, 1e-6)
        with pytest.raises(UserError, match="does not fit the network"):
            load_model(done.folder, network=lambda: empty_network(transformer=False))


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"sample_shape": [-1]}),
    ("prompt", {"tasks": [0, 0]}),
    ("prompt", {"seed": -1}),
    ("prompt", {"method": "joint"}),
    ("prompt", {"method": "tangent-ridge", "options": {"rank": 50}}),
    ("prompt", {"class_names": ["a", "b", "c"]}),
    ("prompt", {"blueprint": {"kind": "digits", "backbone": "vit"}}),
    ("prompt", {"task": 7}),
    ("fedavg", {"seen": 0}),
    ("fedavg", {"seen": 99}),
    ("fedavg", {"class_names": [str(number) for number in range(1000)]}),
    ("fedavg", {"blueprint": {"kind": ["digits"]}}),
    ("fedavg", {"blueprint": {"kind": "transformers", "model": {"model_type": "vit", "num_hidden_layers": 10**9}}}),
]


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taken")
    for method in ("fedavg", "prompt"):
        export_model(run(folder / f"{method}-run", method), folder / method)
    return folder


@pytest.mark.parametrize(("method", "changes"), HOSTILE, ids=lambda value: str(value)[:40])
def test_a_folder_that_says_nonsense_of_itself_is_refused(
    taken: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    shutil.copytree(taken / method, tmp_path / "bad")
    about = tmp_path / "bad" / "config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), **changes}))
    with pytest.raises(UserError):
        load_model(tmp_path / "bad")
    about.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(tmp_path / "bad")


def test_mistakes_are_one_line_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = run(tmp_path / "run", "fedncm")
    alone = run(tmp_path / "alone", "local")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    empty = tmp_path / "empty"
    federated_run = tmp_path / "begun"
    shutil.copytree(path, federated_run)
    shutil.rmtree(federated_run / "checkpoint")
    cases: list[tuple[Path, Path, ExportFormat, str]] = [
        (tmp_path / "nowhere", empty, "model", "is not a run folder"),
        (alone, empty, "model", "with local every client has a model of its own"),
        (federated_run, empty, "model", "its first round is not over"),
        (path, full, "model", "is not an empty folder"),
        (path, full / "mine", "model", "is not an empty folder"),
        (path, empty, "transformers", "not from a folder of transformers; it can be taken away with --to model"),
        (path, empty, "onnx", "--to must be one of model, transformers, peft"),  # type: ignore[list-item]
    ]
    for source, out, to, told in cases:
        with pytest.raises(UserError, match=told) as caught:
            export_model(source, out, to=to)
        assert "\n" not in str(caught.value)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["alone", "begun", "full", "run"]
    empty.mkdir()
    export_model(path, empty)
    pickled = (empty / "config.json").read_bytes().replace(b'"network"', b'"pickle"')
    for name, damage, told in (
        ("config.json", b"[]", "describes no model"),
        ("config.json", pickled, "form"),
        ("model.safetensors", b"what", "not a safetensors file"),
    ):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(empty, tmp_path / "broken")
        (tmp_path / "broken" / name).write_bytes(damage)
        with pytest.raises(NeuroclError, match=told) as wrong:
            load_model(tmp_path / "broken")
        assert "\n" not in str(wrong.value)
    save_file({"head.weight": torch.zeros(10, 3)}, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(UserError, match="does not fit the network"):
        load_model(tmp_path / "broken")
    with pytest.raises(UserError, match="neither a federated run nor a model"):
        load_model(tmp_path)


def test_a_change_of_weights_becomes_factors_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    for rank, shape in ((3, (40, 70)), (48, (70, 50)), (50, (70, 50))):
        left = torch.randn(shape[0], rank, dtype=torch.float64, generator=generator)
        change = left @ torch.randn(rank, shape[1], dtype=torch.float64, generator=generator)
        # As states keep it: rounded, which makes every matrix one of full rank.
        layer = low_rank(change.float().double())
        assert layer.rank == rank
        assert (layer.delta() - change).norm() <= 1e-6 * change.norm()
    assert low_rank(torch.zeros(4, 5, dtype=torch.float64)).delta().abs().max() == 0


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Vision Transformer as transformers saves it."""
    from neurocl.compat.torchvision import ensure_torchaudio, ensure_torchvision

    ensure_torchvision()
    ensure_torchaudio()
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    path = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(shape).save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}')
    return path


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty noisy pictures of four colours."""

    def some(name: str, data_dir: Path | None) -> Any:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(60) % 4
        x = (0.2 * y[:, None, None, None] + 0.3 * torch.rand(60, 3, 20, 20, generator=generator)).clamp(0, 1)
        samples = federated.Samples(x, y)
        return samples, federated.Samples(x[:30], y[:30]), ("a", "b", "c", "d")

    monkeypatch.setattr("neurocl.federated.transformers_vit._pictures", some)


def of_pictures(folder: Path, vit: Path, method: str, **options: Any) -> Path:
    return run(folder, method, dataset="eurosat", backbone=str(vit), lr=0.01, batch_size=8, options=options)


def pixels(x: torch.Tensor) -> torch.Tensor:
    """Pictures as the folder's preprocessor_config.json wants them."""
    small = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    return (small - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.2


def with_head(features: torch.Tensor, folder: Path) -> torch.Tensor:
    head = load_file(folder / "head.safetensors")
    if "prototypes" in head:
        return -torch.cdist(features, head["prototypes"]) / features.shape[1] ** 0.5
    return features @ head["weight"].T + head["bias"]


ADAPTERS = [
    ("lora", {"rank": 2, "previous": "run_sum"}),
    *((name, {"rank": 2}) for name in ("ffa-lora", "lorm", "livar", "dolfin")),
    ("pilora", {"rank": 2, "backbone_lr": 1.0}),
]


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(("method", "options"), ADAPTERS, ids=lambda value: value if isinstance(value, str) else "")
def test_peft_loads_the_modules_of_all_tasks_as_one_adapter(
    tmp_path: Path, vit: Path, method: str, options: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    path = of_pictures(tmp_path / "run", vit, method, **options)
    done = export_model(path, tmp_path / "out", to="peft")
    base = AutoModel.from_pretrained(vit, add_pooling_layer=False)
    model = peft.PeftModel.from_pretrained(base, str(done.folder)).eval()
    x, expected = scores_of(path)
    with torch.no_grad():
        found = with_head(model(pixel_values=pixels(x)).last_hidden_state[:, 0], done.folder)
    assert_alike(found, expected, 1e-5)
    layers = read_adapter(done.folder).layers.values()
    assert max(float(layer.lora.delta().abs().max()) for layer in layers) > 1e-3
    ranks = {layer.lora.rank for layer in layers}
    # Of two tasks; what livar keeps is a mean of three clients' products.
    assert max(ranks) <= 2 * options["rank"] * (3 if method == "livar" else 1)


@pytest.mark.usefixtures("pictures")
def test_our_own_merging_takes_the_adapters_of_two_runs(tmp_path: Path, vit: Path) -> None:
    pytest.importorskip("peft")
    folders = []
    for name in ("ffa-lora", "lora"):
        export_model(of_pictures(tmp_path / name, vit, name, rank=2), tmp_path / f"{name}-out", to="peft")
        folders.append(tmp_path / f"{name}-out")
    merge_adapter_folders(Recipe(method="lora-cat", models=tuple(folders)), tmp_path / "sum")
    parts, merged = [read_adapter(folder).layers for folder in folders], read_adapter(tmp_path / "sum").layers
    assert len(merged) == 12
    for name, layer in merged.items():
        total = sum((part[name].lora.delta() for part in parts), torch.zeros(()))
        assert torch.allclose(layer.lora.delta(), total, atol=1e-6)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("method", ["fedavg", "fedncm", "lora", "pilora"])
def test_transformers_loads_a_folder_with_everything_folded_in(tmp_path: Path, vit: Path, method: str) -> None:
    from transformers import AutoModel

    path = of_pictures(tmp_path / "run", vit, method)
    export_model(path, tmp_path / "out", to="transformers")
    model = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    x, expected = scores_of(path)
    with torch.no_grad():
        found = with_head(model(pixel_values=pixels(x)).last_hidden_state[:, 0], tmp_path / "out")
    assert_alike(found, expected, 1e-5)
    told = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert told["image_mean"] == [0.4, 0.5, 0.6]
    # It is a backbone for the next federation.
    if method == "fedavg":
        again = of_pictures(tmp_path / "again", tmp_path / "out", "fedncm")
        assert (again / "result.json").is_file()


@pytest.mark.usefixtures("pictures")
def test_a_model_of_pictures_needs_neither_the_folder_that_it_started_from_nor_data(
    tmp_path: Path, vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    path = of_pictures(tmp_path / "run", tmp_path / "vit", "lora")
    export_model(path, tmp_path / "out")
    x, expected = scores_of(path)
    shutil.rmtree(tmp_path / "vit")
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()

    def forbidden(*arguments: Any) -> Any:
        raise AssertionError("looked for data")

    monkeypatch.setattr("neurocl.federated.transformers_vit._pictures", forbidden)
    assert_alike(load_model(tmp_path / "out")(x), expected, 1e-6)


@pytest.mark.usefixtures("pictures")
def test_methods_without_such_a_form_say_which_they_have(tmp_path: Path, vit: Path) -> None:
    pytest.importorskip("peft")
    plain = of_pictures(tmp_path / "plain", vit, "fedncm")
    with pytest.raises(UserError, match="fedncm learns no LoRA modules; take it away with --to model or transformers"):
        export_model(plain, tmp_path / "out", to="peft")
    pool = of_pictures(tmp_path / "pool", vit, "prompt")
    forms: tuple[ExportFormat, ...] = ("peft", "transformers")
    for to in forms:
        with pytest.raises(UserError, match="prompt ends as no plain network; it can be taken away with --to model"):
            export_model(pool, tmp_path / "out", to=to)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["plain", "pool"]


def test_a_folder_whose_scores_are_not_the_runs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run(tmp_path / "run", "fedncm")
    right: Callable[..., Any] = model_of

    def wrong(saved: Any) -> Any:
        model = right(saved)
        return type(model)(lambda x: model.predict(x) + 1, None, model.class_names, model.seen, model.inputs)

    monkeypatch.setattr("neurocl.federated.export.model_of", wrong)
    with pytest.raises(NeuroclError, match="scores otherwise than the run's"):
        export_model(path, tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == ["run"]
