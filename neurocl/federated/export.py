"""A run's model as a folder that needs neither run nor data: neurocl's own, one of transformers, or an adapter.

What is written is read again and compared with the run's own scores before the folder appears.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neurocl import __version__
from neurocl.errors import RunError, UserError
from neurocl.federated.lora import AdapterMethod
from neurocl.federated.method import Predictor
from neurocl.federated.model import CONFIG, START, STATE, WEIGHTS, Description, Saved, load_model, model_of, saved_run
from neurocl.federated.network import Classifier, evaluating
from neurocl.federated.payload import tensors
from neurocl.federated.pilora import NearestPrototype, PiLora, mean_distances
from neurocl.federated.transformers_vit import PictureTransformer, load_transformer
from neurocl.merging.lora import LoraLayer, nearest_of_rank
from neurocl.registry import did_you_mean
from neurocl.runs import make_folder, write_atomically, write_error

ExportFormat = Literal["model", "transformers", "peft"]
FORMATS: tuple[ExportFormat, ...] = ("model", "transformers", "peft")
HEAD, ABOUT, PROCESSOR = "head.safetensors", "neurocl.json", "preprocessor_config.json"
CHECKED_SAMPLES = 64
#: of scores, relative to the largest one
TOLERANCE = 1e-4
#: singular values of an adapter below this share of the largest one are rounding
RANK_TOLERANCE = 1e-6
FIRST_PROBES = 32
#: where the model of transformers is in a network
INNER = "backbone.model."


@dataclass(frozen=True)
class Exported:
    """What :func:`export_model` wrote.

    Attributes:
        folder: new.
        to: the format.
        files: their names and sizes in bytes.
        difference: largest one between a score of the folder's model and the run's, relative to the largest score.
        num_samples: test samples that were compared.
        model: ``finished``, or how far the run was.
        usage: Python that loads it.
    """

    folder: Path
    to: ExportFormat
    files: dict[str, int]
    difference: float
    num_samples: int
    model: str
    usage: str


def known_format(to: str) -> ExportFormat:
    """A format that can be written.

    Raises:
        UserError: no such format.
    """
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}{did_you_mean(to, FORMATS)}")
    return to


def export_model(
    run: Path | str,
    out: Path | str | None = None,
    *,
    to: ExportFormat = "model",
    say: Callable[[str], None] | None = None,
) -> Exported:
    """Take the model of a federated run away.

    ``model`` is for every method whose server has one, read by :func:`~neurocl.federated.model.load_model`. A run that
    started from a folder of transformers can also become such a folder again (``transformers``), and if its method
    learnt LoRA modules an adapter of PEFT on that folder (``peft``), one module for all tasks; the head is beside it.

    Args:
        run: its folder; one that is not finished gives what its last checkpoint has.
        out: a new or empty folder; None for one in the run's folder, named like the format.
        to: the format.
        say: told what is being done.

    Raises:
        UserError: not a federated run, one without a single model, a format that its method or network does not have,
            or a folder with something in it.
        RunError: the folder cannot be written, or its model scores otherwise than the run's.
    """
    known_format(to)
    out = Path(run) / to if out is None else Path(out)
    if not out.name:
        raise UserError(f"{out} cannot be replaced; name a new folder with --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; choose another --out")
    say = say or (lambda line: None)
    say(f"reading {run}")
    saved = saved_run(Path(run))
    if to == "peft" and importlib.util.find_spec("peft") is None:
        raise UserError("an adapter of PEFT needs: pip install 'neurocl[vision]'")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    make_folder(partial)
    try:
        usage = WRITERS[to](saved, partial, out)
        write_atomically(partial / "README.md", _card(saved, usage))
        say("comparing scores with the run's")
        difference, count = _difference(saved, READERS[to](saved, partial))
        if not difference <= TOLERANCE:
            raise RunError(f"the model that was written scores otherwise than the run's: {difference:.2g} apart")
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise write_error(out, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, to, files, difference, count, saved.where, usage)


def _difference(saved: Saved, predict: Predictor) -> tuple[float, int]:
    test = saved.problem.source.test.x
    x = test[torch.linspace(0, len(test) - 1, min(CHECKED_SAMPLES, len(test))).long()]
    with torch.no_grad():
        expected, found = model_of(saved).predict(x), predict(x)
    apart = torch.where(found == expected, 0.0, (found - expected).abs())  # minus infinity where nobody has a class
    largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.ones(())
    return float(apart.max() / largest.clamp(min=torch.finfo(largest.dtype).tiny)), len(x)


# neurocl's own


def _write_model(saved: Saved, folder: Path, out: Path) -> str:
    network = saved.method.folded(saved.state, saved.task)
    values: dict[str, Any] = {}
    if network is not None:
        weights = dict(network.state_dict())
        values |= {"form": "network", "head": _kind_of(network)}
    else:
        needed = saved.method.for_prediction(saved.state)
        start = saved.problem.network().state_dict()
        weights = {START + name: value for name, value in start.items()}
        weights |= {STATE + name: value for name, value in tensors(needed).items()}
        config = saved.problem.config
        values |= {"form": "state", "options": config.options, "seed": config.seed, "meta": needed.meta}
        values |= {"lora_places": saved.problem.source.lora_places}
    # Copies: tensors may share memory, which a file cannot.
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    write_atomically(folder / CONFIG, _description(saved, **values).model_dump_json(indent=1) + "\n")
    asked = "" if saved.problem.source.blueprint else ", network=build"
    lines = ["from neurocl import federated", ""]
    if asked:
        lines += [f"# build is the function that your {saved.problem.config.dataset} gives its Source"]
    return "\n".join(
        [
            *lines,
            f"model = federated.load_model({json.dumps(str(out))}{asked})",
            f"scores = model(x)  # x {['B', *saved.problem.source.test.x.shape[1:]]}".replace("'", ""),
            "names = [model.class_names[number] for number in model.classes(x)]",
        ]
    )


def _read_model(saved: Saved, folder: Path) -> Predictor:
    own = None if saved.problem.source.blueprint else saved.problem.source.build
    return load_model(folder, network=own).predict


def _description(saved: Saved, **values: Any) -> Description:
    source, tasks = saved.problem.source, saved.problem.tasks
    metrics = saved.result.get("metrics", {}).get("class_il", {})
    return Description(
        neurocl=__version__,
        dataset=source.name if source.blueprint else saved.problem.config.dataset,
        method=saved.problem.config.method,
        model=saved.where,
        accuracy=metrics.get("final_average_accuracy"),
        class_names=source.class_names,
        seen=saved.task.classes.stop,
        tasks=tuple(len(task.classes) for task in tasks),
        task=saved.task.index,
        inputs=source.inputs or f"what {saved.problem.config.dataset} gives",
        sample_shape=tuple(source.test.x.shape[1:]),
        blueprint=dict(source.blueprint),
        privacy=saved.result.get("privacy"),
        **values,
    )


def _card(saved: Saved, usage: str) -> str:
    found = _description(saved, form="network")
    known = ", ".join(found.class_names[: found.seen])
    reached = f", {found.accuracy:.2f} % on average over its tasks" if found.accuracy is not None else ""
    return (
        f"# {found.method} on {found.dataset}\n\nThe model of a federated run of neurocl {__version__} ({found.model})"
        f"{reached}.\n\nClasses: {known}.\n\nInputs: {found.inputs}.\n\n```python\n{usage}\n```\n"
    )


def _kind_of(network: Classifier) -> Literal["linear", "nearest-prototype"]:
    return "nearest-prototype" if isinstance(network.get_submodule("head"), NearestPrototype) else "linear"


# transformers and PEFT


def _plain(saved: Saved) -> tuple[Classifier, PictureTransformer, Path]:
    """The network, its picture transformer, and the folder that it came from.

    Raises:
        UserError: it has none, or the method ends as something else.
    """
    config, network = saved.problem.config, saved.method.folded(saved.state, saved.task)
    if saved.problem.source.blueprint.get("kind") != "transformers":
        used = config.backbone or "its usual network"
        raise UserError(
            f"{saved.path} started from {used}, not from a folder of transformers; it can be taken away with --to model"
        )
    if network is None:
        raise UserError(f"{config.method} ends as no plain network; it can be taken away with --to model")
    assert isinstance(network.backbone, PictureTransformer)
    assert config.backbone is not None
    return network, network.backbone, Path(config.backbone)


def _write_head(saved: Saved, network: Classifier, folder: Path) -> None:
    head = {name: value.detach().cpu().clone() for name, value in network.head.state_dict().items()}
    save_file(head, folder / HEAD)
    about = _description(saved, form="network", head=_kind_of(network))
    write_atomically(folder / ABOUT, about.model_dump_json(indent=1, exclude={"blueprint"}) + "\n")


def _processor(base: Path, found: PictureTransformer) -> str:
    """How pictures are prepared, as the folder says it, or as was done without its word."""
    if (base / PROCESSOR).is_file():
        return (base / PROCESSOR).read_text(encoding="utf-8")
    colours = {"image_mean": found.mean.flatten().tolist(), "image_std": found.std.flatten().tolist()}
    size = {"height": found.side, "width": found.side}
    return json.dumps({"image_processor_type": "ViTImageProcessor", "size": size, "resample": 3, **colours}, indent=1)


def _scoring(network: Classifier, pooled: str, out: Path) -> list[str]:
    scores = 'features @ head["weight"].T + head["bias"]'
    if _kind_of(network) == "nearest-prototype":
        scores = '-torch.cdist(features, head["prototypes"]) / features.shape[1] ** 0.5'
    return [
        f"head = load_file({json.dumps(str(out / HEAD))})",
        f"features = {pooled}.last_hidden_state[:, 0]  # pixels as {PROCESSOR} says",
        f"scores = {scores}",
    ]


def _write_transformers(saved: Saved, folder: Path, out: Path) -> str:
    network, transformer, base = _plain(saved)
    model = cast(Any, transformer.model)
    model.save_pretrained(folder)
    write_atomically(folder / PROCESSOR, _processor(base, transformer))
    _write_head(saved, network, folder)
    lines = [
        *(["import torch"] if _kind_of(network) != "linear" else []),
        "from safetensors.torch import load_file",
        "from transformers import AutoModel",
        "",
        f"model = AutoModel.from_pretrained({json.dumps(str(out))}, add_pooling_layer=False).eval()",
        *_scoring(network, "model(pixel_values=pixels)", out),
    ]
    return "\n".join(lines)


def _read_transformers(saved: Saved, folder: Path) -> Predictor:
    return _with_head(saved, load_transformer(folder), folder)


def _with_head(saved: Saved, model: nn.Module, folder: Path) -> Predictor:
    """Scores of a model and the folder's head, on pictures that are prepared as in the run."""
    _, transformer, _ = _plain(saved)
    colours = (transformer.mean.flatten().tolist(), transformer.std.flatten().tolist())
    own = PictureTransformer(model, transformer.side, *colours)
    head = load_file(folder / HEAD)

    def predict(x: Tensor) -> Tensor:
        with evaluating(own):
            features = own(x)
        if "prototypes" in head:
            return -mean_distances(features, head["prototypes"])
        return F.linear(features, head["weight"], head["bias"])

    return predict


def _write_peft(saved: Saved, folder: Path, out: Path) -> str:
    network, _, base = _plain(saved)
    method = getattr(saved.method, "inner", saved.method)
    if not isinstance(method, AdapterMethod | PiLora):
        raise UserError(
            f"{saved.problem.config.method} learns no LoRA modules; take it away with --to model or transformers"
        )
    layers = {
        name.removeprefix(INNER): low_rank(change)
        for name, change in method.change(saved.state, saved.task.index).items()
    }
    _write_adapter(folder, layers, base)
    _write_head(saved, network, folder)
    lines = [
        *(["import torch"] if _kind_of(network) != "linear" else []),
        "from peft import PeftModel",
        "from safetensors.torch import load_file",
        "from transformers import AutoModel",
        "",
        f"base = AutoModel.from_pretrained({json.dumps(str(base))}, add_pooling_layer=False)",
        f"model = PeftModel.from_pretrained(base, {json.dumps(str(out))}).eval()",
        *_scoring(network, "model(pixel_values=pixels)", out),
    ]
    return "\n".join(lines)


def _write_adapter(folder: Path, layers: dict[str, LoraLayer], base: Path) -> None:
    from peft import LoraConfig

    ranks = [layer.rank for layer in layers.values()]
    common = max(set(ranks), key=lambda rank: (ranks.count(rank), rank))
    others = {name: layer.rank for name, layer in layers.items() if layer.rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=sorted(layers),
        rank_pattern=others,
        alpha_pattern=dict(others),
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    factors = {
        f"base_model.model.{name}.lora_{letter}.weight": getattr(layer, letter).contiguous()
        for name, layer in layers.items()
        for letter in "AB"
    }
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _read_peft(saved: Saved, folder: Path) -> Predictor:
    from peft import PeftModel

    _, _, base = _plain(saved)
    return _with_head(saved, PeftModel.from_pretrained(load_transformer(base), str(folder)), folder)


def low_rank(change: Tensor) -> LoraLayer:
    """A change of weights as factors of its numerical rank, at least 1; float32.

    Args:
        change: float64 [o, i].
    """
    generator = torch.Generator().manual_seed(0)
    size, count = min(change.shape), FIRST_PROBES
    while True:
        count = min(count, size)
        probes = torch.randn(change.shape[1], count, dtype=change.dtype, generator=generator)
        basis = torch.linalg.qr(change @ probes).Q
        inside = basis.mT @ change
        if count == size or (change - basis @ inside).norm() <= RANK_TOLERANCE / 2 * change.norm():
            break
        count *= 2
    values = torch.linalg.svdvals(inside)
    rank = max(1, int((values > RANK_TOLERANCE * values[0]).sum()))
    return nearest_of_rank(inside, basis, rank, torch.float32)


WRITERS: dict[ExportFormat, Callable[[Saved, Path, Path], str]] = {
    "model": _write_model,
    "transformers": _write_transformers,
    "peft": _write_peft,
}
READERS: dict[ExportFormat, Callable[[Saved, Path], Predictor]] = {
    "model": _read_model,
    "transformers": _read_transformers,
    "peft": _read_peft,
}
