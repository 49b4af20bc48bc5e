"""Graphs of a trained forecaster as files that other programs run, ONNX or TorchScript, checked before they are kept.

The loop around them is in :mod:`neurocl.trajectory.runner`. ``S`` scenes, ``A`` agents, ``F`` agents up to the last one
that is forecast, ``N`` samples, ``T_p`` predicted steps.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from neurocl import __version__
from neurocl.errors import RunError, UserError
from neurocl.registry import did_you_mean
from neurocl.runs import make_folder, write_atomically
from neurocl.trajectory.autoregressive import AutoregressivePrior
from neurocl.trajectory.blocks import CrossMemory, LayerMemory, PairGeometry
from neurocl.trajectory.continuous import NUM_TIMES, ContinuousPrior
from neurocl.trajectory.denoiser import CodeDenoiser, Memory
from neurocl.trajectory.forecaster import Forecaster, Networks, SamplingConfig, Shape
from neurocl.trajectory.runner import SCHEMA, Runner
from neurocl.trajectory.scenes import KINDS, Scenes
from neurocl.trajectory.vqvae import Context, Everyone

ExportFormat = Literal["onnx", "torchscript"]
FORMATS: dict[str, str] = {"onnx": ".onnx", "torchscript": ".pt"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # network units
STEP_GRAPHS = {"diffusion": "denoiser", "autoregressive": "next_code", "flow": "velocity"}
# Sizes of the example; no two alike, and none that an exporter takes for a constant.
EXAMPLE_SIZES = {"S": 2, "A": 5, "F": 4, "N": 3}
SIZE_NAMES = {"S": "scenes", "A": "agents", "F": "agents up to the last one that is forecast", "N": "samples"}
CHECKED_SAMPLES = 20
ATTEMPTS = 3

NamedFunction = Callable[[Networks, dict[str, Tensor]], dict[str, Tensor]]

# Which axes of a tensor are free, by its name; the others have the size that they have in the example.
AXES = {
    "past": "SA",
    "past_mask": "SA",
    "kind": "SA",
    "target_mask": "SF",
    "anchor": "SF",
    "present": "SF",
    "tokens": "SF",
    "seen": "SF",
    "frame": "SF",
    "codebook": "SF",
    "related": "SFF",
    "keys": "SF",
    "values": "SF",
    "bias": "SF",
    "pair_bias": "S-FF",
    "pair_values": "S-FF",
    "codes": "NSF",
    "latents": "NSF",
    "t": "",
    "logits": "NSF",
    "velocity": "NSF",
    "moves": "NSF",
}


@dataclass(frozen=True)
class Exported:
    """What :func:`export_forecaster` wrote.

    Attributes:
        folder: holds ``manifest.json`` and the graphs.
        files: their names and sizes in bytes.
        difference: largest distance between a coordinate of the runner's forecasts and of torch's, in network units.
        num_samples, num_agents: that were compared, over all example scenes.
    """

    folder: Path
    files: dict[str, int]
    difference: float
    num_samples: int
    num_agents: int


def known_format(to: str) -> ExportFormat:
    """A format that can be written here.

    Raises:
        UserError: no such format, or packages that are not installed.
    """
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}{did_you_mean(to, FORMATS)}")
    missing = [name for name in PACKAGES if to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the export to ONNX needs {', '.join(missing)}, not found here; "
            "install it with pip install 'neurocl[export]', or take --to torchscript"
        )
    return cast(ExportFormat, to)


def export_forecaster(
    forecaster: Forecaster,
    out: Path | str,
    *,
    to: ExportFormat = "onnx",
    say: Callable[[str], None] | None = None,
) -> Exported:
    """Write a forecaster as three graphs and a manifest, after comparing their forecasts with torch's.

    Args:
        forecaster: with any prior but ``ddim``; its calibration and the clustering of samples stay behind.
        out: new or empty folder, or one with an earlier export of the same kind, which is replaced.
        to: ``onnx``, or ``torchscript``, whose files hold code and a pickle: load only your own.
        say: told what is being done; ONNX takes a minute.

    Raises:
        UserError: a folder with something else in it, a prior without a runner, or packages that are not installed.
        RunError: forecasts that differ by more than 1e-4 network units, or files that cannot be written; an earlier
            export is then intact, or has lost its manifest.
    """
    known_format(to)
    if forecaster.shape.prior not in STEP_GRAPHS:
        raise UserError(f"export knows the priors {', '.join(STEP_GRAPHS)}, not {forecaster.shape.prior}")
    out = Path(out)
    # A forecaster on the CPU, since graphs carry the device that they were recorded on.
    local = Forecaster(forecaster.shape, copy.deepcopy(forecaster.networks))
    names = [name + FORMATS[to] for name in ("context", STEP_GRAPHS[local.shape.prior], "decoder")]
    _check_folder(out, {*names, "manifest.json"})
    say = say or (lambda _: None)
    files = _files(local, to, say)
    say("comparing forecasts with torch's")
    with tempfile.TemporaryDirectory(prefix="neurocl-export-") as staging:
        for name, data in files.items():
            write_atomically(Path(staging) / name, data)
        scenes = example_scenes(local.shape, seed=1)
        difference = largest_difference(local, Runner(staging, threads=torch.get_num_threads()), scenes)
    if not difference <= TOLERANCE:
        raise RunError(f"the exported graphs forecast otherwise than torch: {difference:.2g} network units apart")
    make_folder(out)
    # Who reads the folder now finds no export rather than half of two.
    (out / "manifest.json").unlink(missing_ok=True)
    for name, data in files.items():
        write_atomically(out / name, data)
    sizes = {name: len(data) for name, data in files.items()}
    return Exported(out, sizes, difference, CHECKED_SAMPLES, scenes.num_targets)


def _check_folder(out: Path, names: set[str]) -> None:
    """Refuse a folder whose files are not those of an earlier export of the same kind."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    foreign = {path.name for path in out.iterdir()} - names if out.is_dir() else set()
    if foreign:
        raise UserError(f"{out} is not an empty folder (it holds {min(foreign)}); choose another --out")


def example_scenes(shape: Shape, *, seed: int = 0) -> Scenes:
    """Walks with gaps, a late arrival, and one agent that is seen but not forecast: what graphs are recorded on."""
    generator = torch.Generator().manual_seed(seed)
    num_scenes, num_agents = EXAMPLE_SIZES["S"], EXAMPLE_SIZES["A"]
    length, sizes = shape.vqvae.num_observed, (num_scenes, num_agents)
    velocity = 0.3 * torch.randn(*sizes, 1, 2, generator=generator)
    start = 3 * torch.randn(*sizes, 1, 2, generator=generator)
    noise = 0.05 * torch.randn(*sizes, length, 2, generator=generator)
    past_mask = torch.rand(*sizes, length, generator=generator) > 0.1
    past_mask[:, 1, : length // 2] = False
    past_mask[..., -1] = True
    exists = torch.ones(*sizes, dtype=torch.bool)
    return Scenes(
        past=(start + velocity * torch.arange(length)[:, None] + noise) * shape.vqvae.scale,
        future=torch.zeros(*sizes, shape.vqvae.num_predicted, 2),
        agent_mask=exists,
        past_mask=past_mask,
        future_mask=torch.zeros(*sizes, shape.vqvae.num_predicted, dtype=torch.bool),
        target_mask=exists & (torch.arange(num_agents) < EXAMPLE_SIZES["F"]),
        kind=torch.randint(0, len(KINDS), sizes, generator=generator),
        agent_id=torch.arange(num_agents).expand(sizes),
        start=torch.zeros(num_scenes, dtype=torch.int64),
        recording=("example",) * num_scenes,
        unit=shape.unit,
        hz=shape.hz,
        name="example",
    )


def largest_difference(forecaster: Forecaster, runner: Runner, scenes: Scenes) -> float:
    """Between forecasts of the same scenes from the same random numbers, in network units.

    Rounding may push a draw over the edge between two codes, once in some hundred forecasts; then they are drawn again
    from other numbers. Graphs that are wrong differ every time.
    """
    sampling = SamplingConfig(select="samples")
    steps = min(sampling.steps, forecaster.shape.diffusion_steps)
    difference = float("inf")
    for seed in range(ATTEMPTS):
        expected, present = forecaster.draw(scenes, CHECKED_SAMPLES, sampling, torch.Generator().manual_seed(seed))
        count = present.shape[1]
        size = runner.noise_shape(CHECKED_SAMPLES, len(scenes), count, steps, sampling.sampler)
        found = runner.forecast(
            scenes.past.numpy(),
            scenes.past_mask.numpy(),
            scenes.kind.numpy(),
            scenes.target_mask.numpy(),
            num_samples=CHECKED_SAMPLES,
            steps=steps,
            sampler=sampling.sampler,
            noise=torch_noise(forecaster.shape, size, seed).numpy(),
        )
        apart = (torch.from_numpy(found)[:, :, :count] - expected).abs()[:, present] / forecaster.shape.vqvae.scale
        difference = min(difference, float(apart.max()))
        if difference <= TOLERANCE:
            break
    return difference


def torch_noise(shape: Shape, size: tuple[int, ...], seed: int) -> Tensor:
    """The random numbers that torch's samplers draw with this seed, as :meth:`Runner.noise_shape` lays them out."""
    generator = torch.Generator().manual_seed(seed)
    if shape.prior == "flow":
        return torch.randn(size, generator=generator)
    # Torch fills a tensor number by number, so that one call draws what the samplers draw in many.
    return torch.rand(size, generator=generator)


# Graphs


@dataclass(frozen=True)
class Graph:
    """A function of tensors, and what it takes and gives on :func:`example_scenes`, by name."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class _ByPosition(nn.Module):
    """A function of named tensors as one of tensors in a fixed order, which is what files can hold."""

    def __init__(self, networks: Networks, function: NamedFunction, names: tuple[str, ...]) -> None:
        super().__init__()
        self.networks = networks
        self.function = function
        self.names = names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        found = self.function(self.networks, dict(zip(self.names, values, strict=True)))
        return tuple(found.values())


def graphs(forecaster: Forecaster) -> dict[str, Graph]:
    """The three graphs of a forecaster on the CPU: ``context``, one step of the prior, ``decoder``."""
    networks, shape = forecaster.networks, forecaster.shape

    def graph(function: NamedFunction, inputs: dict[str, Tensor]) -> Graph:
        with torch.no_grad():
            outputs = function(networks, inputs)
        return Graph(_ByPosition(networks, function, tuple(inputs)).eval(), inputs, outputs)

    scenes = example_scenes(shape)
    pasts = {"past": scenes.past, "past_mask": scenes.past_mask}
    if networks.vqvae.kinds is not None:
        pasts["kind"] = scenes.kind
    context = graph(context_graph, {**pasts, "target_mask": scenes.target_mask[:, : EXAMPLE_SIZES["F"]]})
    known = context.outputs
    memory = {name: value for name, value in known.items() if name[-1].isdigit()}
    if shape.trunk.agent_attention:
        memory["present"] = known["present"]
    size = (EXAMPLE_SIZES["N"], EXAMPLE_SIZES["S"], EXAMPLE_SIZES["F"], shape.vqvae.num_predicted)
    codes = torch.zeros(size, dtype=torch.int64)
    time: dict[str, Tensor] = {}
    drawn = {"codes": codes}
    if shape.prior == "diffusion":
        noisy, time = drawn, {"t": torch.tensor(shape.diffusion_steps - 1)}
    elif shape.prior == "autoregressive":
        noisy = {"codes": codes[..., 1:]}
    else:
        drawn = noisy = {"latents": torch.zeros(*size, shape.vqvae.code_dim)}
        time = {"t": torch.tensor(0.5 * NUM_TIMES)}
    rest = {name: value for name, value in known.items() if name != "anchor" and not name[-1].isdigit()}
    return {
        "context": context,
        STEP_GRAPHS[shape.prior]: graph(step_graph, {**noisy, **time, **memory}),
        "decoder": graph(decoder_graph, {**drawn, **rest}),
    }


def context_graph(networks: Networks, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is the same for all samples and steps, from pasts in the unit of the data."""
    past, past_mask = known["past"], known["past_mask"]
    unused = past_mask
    scenes = Scenes(
        past=past,
        future=unused,
        agent_mask=past_mask.any(dim=-1),
        past_mask=past_mask,
        future_mask=unused,
        target_mask=known["target_mask"],
        kind=known.get("kind", unused),
        agent_id=unused,
        start=unused,
        recording=(),
        unit="",
        hz=1.0,
    )
    context = networks.vqvae.encode_context(scenes)
    memory = networks.prior.prepare(context)
    config = networks.vqvae.config
    found: dict[str, Tensor | None] = {"anchor": context.anchor, "present": context.present, "frame": context.frame}
    if config.decoder_cross_attention:
        found |= {"tokens": context.tokens, "seen": context.seen}
    if not isinstance(networks.prior, ContinuousPrior):
        found["codebook"] = context.codebook
    found["related"] = context.related
    sizes = context.present.shape
    for index, layer in enumerate(memory.layers):
        assert layer.cross is not None
        for name in ("keys", "values", "bias"):
            found[f"{name}_{index}"] = getattr(layer.cross, name).unflatten(0, sizes)
        if layer.geometry is not None:
            found |= {f"pair_bias_{index}": layer.geometry.bias, f"pair_values_{index}": layer.geometry.values}
    return {name: value for name, value in found.items() if value is not None}


def step_graph(networks: Networks, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """One look at all samples: logits of codes, or velocities of latents."""
    layers = []
    for index in range(networks.prior.trunk.config.layers):
        keys, values, bias = (known[f"{name}_{index}"].flatten(0, 1) for name in ("keys", "values", "bias"))
        geometry = None
        if f"pair_bias_{index}" in known:
            geometry = PairGeometry(known[f"pair_bias_{index}"], known[f"pair_values_{index}"])
        layers.append(LayerMemory(CrossMemory(keys, values, bias, None), geometry))
    memory = Memory(layers, known["present"][..., None] if "present" in known else None)
    if isinstance(networks.prior, CodeDenoiser):
        return {"logits": networks.prior(known["codes"], known["t"], memory)}
    if isinstance(networks.prior, AutoregressivePrior):
        return {"logits": networks.prior(known["codes"], memory)}
    return {"velocity": networks.prior(known["latents"], known["t"], memory)}


def decoder_graph(networks: Networks, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Displacements from the anchors in the unit of the data, [N, S, F, T_p, 2], of codes or of drawn latents."""
    present, related = known["present"], known.get("related")
    nothing = present.new_zeros(0)
    context = Context(
        tokens=known.get("tokens", nothing),
        seen=known.get("seen", nothing),
        present=present,
        anchor=nothing,
        frame=known.get("frame"),
        codebook=known.get("codebook", nothing),
        related=related,
        everyone=Everyone(nothing, nothing, None),
    )
    if isinstance(networks.prior, ContinuousPrior):
        latents = known["latents"] * networks.prior.deviation + networks.prior.mean
        return {"moves": networks.vqvae.decode(latents, context)}
    return {"moves": networks.vqvae.decode_indices(known["codes"], context)}


# Files


def _files(forecaster: Forecaster, to: ExportFormat, say: Callable[[str], None]) -> dict[str, bytes]:
    """Contents of all files by name, the manifest last."""
    files: dict[str, bytes] = {}
    described: dict[str, Any] = {}
    for name, graph in graphs(forecaster).items():
        say(f"recording {name}{FORMATS[to]}")
        data = _onnx(graph) if to == "onnx" else _torchscript(graph)
        files[name + FORMATS[to]] = data
        described[name] = {
            "file": name + FORMATS[to],
            "sha256": hashlib.sha256(data).hexdigest(),
            "inputs": [_port(*item) for item in graph.inputs.items()],
            "outputs": [_port(*item) for item in graph.outputs.items()],
        }
    files["manifest.json"] = json.dumps(_manifest(forecaster, to, described), indent=1).encode()
    return files


def _manifest(forecaster: Forecaster, to: ExportFormat, described: dict[str, Any]) -> dict[str, Any]:
    shape, diffusion = forecaster.shape, forecaster.networks.diffusion
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "format": to,
        "neurocl": __version__,
        "prior": shape.prior,
        "step": STEP_GRAPHS[shape.prior],
        "unit": shape.unit,
        "hz": shape.hz,
        "scale": shape.vqvae.scale,
        "num_observed": shape.vqvae.num_observed,
        "num_predicted": shape.vqvae.num_predicted,
        "num_codes": shape.vqvae.num_codes,
        "latent_size": shape.vqvae.code_dim,
        "kinds": KINDS,
        "sizes": SIZE_NAMES,
        "graphs": described,
    }
    if diffusion is not None:
        manifest["diffusion"] = {
            "num_steps": diffusion.num_steps,
            "keep": diffusion.keep.tolist(),
            "mask": diffusion.mask.tolist(),
        }
    return manifest


def _axes(name: str) -> dict[int, str]:
    """Free axes of a tensor: place to letter."""
    letters = AXES[name.rstrip("_0123456789")]
    return {axis: letter for axis, letter in enumerate(letters) if letter != "-"}


def _port(name: str, value: Tensor) -> dict[str, Any]:
    """An input or output for the manifest: free axes are letters."""
    free = _axes(name)
    shape = [free.get(axis, size) for axis, size in enumerate(value.shape)]
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


def _onnx(graph: Graph) -> bytes:
    letters = {letter for name in graph.inputs for letter in _axes(name).values()}
    dims = {letter: torch.export.Dim(letter) for letter in letters}
    shapes = tuple({axis: dims[letter] for axis, letter in _axes(name).items()} for name in graph.inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.module,
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(shapes,),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # Where the exporter was in whose source: as large as the weights, and of no use to anybody else.
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")
    return bytes(model.SerializeToString())


def _torchscript(graph: Graph) -> bytes:
    recorded = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # Sizes that the tracer warns about are those of the model, not of the example.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph.module, tuple(graph.inputs.values()), check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), recorded)
    kept = io.BytesIO()
    with zipfile.ZipFile(recorded) as old, zipfile.ZipFile(kept, "w") as new:
        for item in old.infolist():
            # Paths and lines of the source on this machine.
            if not item.filename.endswith(".debug_pkl"):
                new.writestr(zipfile.ZipInfo(item.filename), old.read(item))
    return kept.getvalue()
