"""Exported graphs and the runner around them forecast what torch does, from the same random numbers."""

import copy
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neurocl.errors import RunError, UserError
from neurocl.trajectory import export
from neurocl.trajectory.denoiser import TrunkConfig
from neurocl.trajectory.diffusion import MaskReplaceDiffusion
from neurocl.trajectory.export import TOLERANCE, export_forecaster, torch_noise
from neurocl.trajectory.forecaster import Forecaster, Networks, SamplingConfig, Shape
from neurocl.trajectory.runner import Runner, draw_earlier
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.vqvae import VqVaeConfig
from tests.trajectory.scene_examples import padded, walks

SMALL = {"width": 16, "heads": 2, "hidden": 24, "num_codes": 12, "rank": 3}
FIELD = {"absolute": True, "heading": False, "rank": 0, "scale": 25.0, "num_observed": 5, "num_predicted": 7}


def untrained(prior: str = "diffusion", *, faithful: bool = False, layers: int = 1, **options) -> Forecaster:
    """A small forecaster whose every weight matters."""
    torch.manual_seed(0)
    vqvae = (VqVaeConfig.faithful if faithful else VqVaeConfig)(**{**SMALL, **options})
    make = TrunkConfig.faithful if faithful else TrunkConfig
    trunk = make(num_predicted=vqvae.num_predicted, context_width=16, width=24, heads=2, hidden=24, layers=layers)
    shape = Shape(vqvae, trunk, prior, 40, "m", 2.5)
    networks = Networks(shape)
    with torch.no_grad():
        for parameter in networks.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.3 * torch.randn_like(parameter))
        if prior == "flow":
            networks.prior.mean.normal_()
            networks.prior.deviation.uniform_(0.5, 2)
    return Forecaster(shape, networks)


def difficult(
    shape: Shape, num_scenes: int, num_agents: int, num_targets: int, num_samples: int = 0, *, seed: int = 0
) -> Scenes:
    """Walks with gaps, agents that were seen only at the end, one never seen, and agents nobody forecasts."""
    scenes = walks(num_scenes, num_agents, shape.vqvae.num_observed, shape.vqvae.num_predicted, seed)
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(scenes.past_mask.shape, generator=generator) > 0.2
    seen[:, ::3, :-1] = False
    seen[..., -1] = True
    if num_agents > 3:
        seen[0, 2] = False
    past = (scenes.past * shape.vqvae.scale).masked_fill(~seen[..., None], torch.nan)
    targets = (torch.arange(num_agents) < num_targets).repeat(num_scenes, 1)
    targets[:, 1 : num_targets - 1 : 4] = False
    return replace(scenes, past=past, past_mask=seen, target_mask=targets)


def both(forecaster, runner, scenes, num_samples=5, steps=6, sampler="unmask", seed=0):
    """Forecasts of the runner and of torch, [N, S, A, T_p, 2] in network units, from torch's random numbers."""
    sampling = SamplingConfig(select="samples", steps=steps, sampler=sampler)
    clean = replace(scenes, past=scenes.past.nan_to_num())
    expected, present = forecaster.draw(clean, num_samples, sampling, torch.Generator().manual_seed(seed))
    expected = expected.masked_fill(~present[:, :, None, None], torch.nan)
    missing = scenes.num_agents - present.shape[1]
    expected = torch.nn.functional.pad(expected, (0, 0, 0, 0, 0, missing), value=torch.nan)
    size = runner.noise_shape(num_samples, len(scenes), present.shape[1], steps, sampler)
    found = runner.forecast(
        scenes.past.numpy(),
        scenes.past_mask.numpy(),
        scenes.kind.numpy(),
        scenes.target_mask.numpy(),
        num_samples=num_samples,
        steps=steps,
        sampler=sampler,
        noise=torch_noise(forecaster.shape, size, seed).numpy(),
    )
    return found / forecaster.shape.vqvae.scale, expected.numpy() / forecaster.shape.vqvae.scale


MODELS = {
    "default": {},
    "faithful": {"faithful": True},
    "field": {**FIELD, "layers": 2},
    "no cross-attention": {"decoder_cross_attention": False},
    "autoregressive": {"prior": "autoregressive"},
    "flow": {"prior": "flow"},
    "faithful flow": {"prior": "flow", "faithful": True},
}
# Scenes, agents, agents up to the last that is forecast, samples.
CASES = {
    "one agent": (1, 1, 1, 5),
    "a crowd": (1, 23, 23, 3),
    "few of a crowd": (1, 23, 3, 1),
    "several scenes": (3, 6, 5, 2),
    "two agents, one sample": (1, 2, 2, 1),
}


@pytest.fixture(scope="module", params=MODELS)
def scripted(request, tmp_path_factory):
    """A forecaster and the runner of its export to TorchScript."""
    forecaster, out = untrained(**MODELS[request.param]), tmp_path_factory.mktemp("torchscript")
    export_forecaster(forecaster, out, to="torchscript")
    return forecaster, Runner(out)


@pytest.mark.parametrize("case", CASES)
def test_forecasts_from_torchscript_are_those_of_torch(scripted, case):
    forecaster, runner = scripted
    scenes = difficult(forecaster.shape, *CASES[case])
    found, expected = both(forecaster, runner, scenes, CASES[case][-1])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert np.isfinite(found).any()


def check_graphs(forecaster, runner, case, seed=0):
    """Every graph alone against the module whose part it is, on random inputs: all tensors, to 1e-4."""
    vqvae, prior, shape = forecaster.networks.vqvae, forecaster.networks.prior, forecaster.shape
    scenes = difficult(shape, *CASES[case], seed=seed)
    scenes = replace(scenes, past=scenes.past.nan_to_num())
    count = int(scenes.target_mask.any(dim=0).nonzero().max()) + 1
    inputs = {"past": scenes.past, "past_mask": scenes.past_mask, "kind": scenes.kind}
    inputs["target_mask"] = scenes.target_mask[:, :count]
    known = runner._graphs["context"]({name: value.numpy() for name, value in inputs.items()})
    generator = torch.Generator().manual_seed(seed)
    size = (4, *known["present"].shape, shape.vqvae.num_predicted)
    with torch.inference_mode():
        context = vqvae.encode_context(scenes)
        memory = prior.prepare(context)
        expected = {"anchor": context.anchor, "present": context.present, "frame": context.frame}
        expected |= {"tokens": context.tokens, "related": context.related, "codebook": context.codebook}
        # Who was never seen means nothing; ONNX gives a query that may see nothing a mean where torch gives zeros.
        met = scenes.past_mask.any(dim=-1)[:, :count]
        for name in expected.keys() & known.keys():
            wanted, found = expected[name][met].float(), torch.from_numpy(known[name])[met].float()
            # Relations grow with the distances of agents, anchors with the unit of the data.
            assert ((wanted - found).abs() / (1 + wanted.abs())).max() < TOLERANCE, name
        codes = torch.randint(0, shape.vqvae.num_codes, size, generator=generator)
        latents = torch.randn(*size, shape.vqvae.code_dim, generator=generator)
        if shape.prior == "diffusion":
            noisy = torch.randint(0, shape.vqvae.num_codes + 1, size, generator=generator)
            for t in (0, 17, 39):
                given = {**known, "codes": noisy.numpy(), "t": np.array(t)}
                found = runner._graphs["denoiser"](given)["logits"]
                look = prior(noisy, torch.tensor(t), memory)
                assert compare(found, look, context.present) < TOLERANCE
        elif shape.prior == "autoregressive":
            found = runner._graphs["next_code"]({**known, "codes": codes[..., 1:].numpy()})["logits"]
            assert compare(found, prior(codes[..., 1:], memory), context.present) < TOLERANCE
        else:
            given = {**known, "latents": latents.numpy(), "t": np.array(300, np.float32)}
            found = runner._graphs["velocity"](given)["velocity"]
            look = prior(latents, torch.tensor(300.0), memory)
            assert compare(found, look, context.present) < TOLERANCE
        found = runner._graphs["decoder"]({**known, "codes": codes.numpy(), "latents": latents.numpy()})["moves"]
        if shape.prior == "flow":
            moves = vqvae.decode(latents * prior.deviation + prior.mean, context)
        else:
            moves = vqvae.decode_indices(codes, context)
        assert compare(found, moves, context.present) < TOLERANCE * shape.vqvae.scale
    return runner.manifest, {name: value.shape for name, value in known.items()}, moves.shape


def compare(found, expected, present):
    """Largest difference of [N, S, A, ...] over the agents that are forecast."""
    return (torch.from_numpy(found) - expected).abs()[:, present].max().item()


def test_each_graph_gives_what_its_module_gives(scripted):
    for case in CASES:
        check_graphs(*scripted, case)


def test_the_manifest_tells_the_shape_of_everything(scripted):
    forecaster, runner = scripted
    manifest, shapes, moves = check_graphs(forecaster, runner, "several scenes")
    graphs = manifest["graphs"]
    sizes = dict(zip("NSF", moves[:3], strict=True))
    told = {port["name"]: port["shape"] for port in graphs["context"]["outputs"]}
    assert {name: tuple(sizes.get(size, size) for size in shape) for name, shape in told.items()} == shapes
    # What the other graphs take comes from the context or is drawn, under the same name and shape.
    for name in (manifest["step"], "decoder"):
        for port in graphs[name]["inputs"]:
            assert port["name"] in ("codes", "latents", "t") or told[port["name"]] == port["shape"], port
    assert manifest["num_predicted"] == forecaster.num_predicted
    assert (manifest["unit"], manifest["hz"], manifest["scale"]) == ("m", 2.5, forecaster.shape.vqvae.scale)


def test_agents_that_do_not_exist_change_nothing(scripted):
    forecaster, runner = scripted
    scenes = difficult(forecaster.shape, 3, 5, 5)
    alone, _ = both(forecaster, runner, scenes)
    wider, _ = both(forecaster, runner, padded(scenes, 3))
    np.testing.assert_allclose(wider[:, :, :5], alone, rtol=0, atol=TOLERANCE)
    assert np.isnan(wider[:, :, 5:]).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("now", "then"), [(39, 30), (20, 19), (7, 0), (3, -1), (0, -1)])
def test_the_runner_draws_earlier_codes_as_the_diffusion_does(schedule, now, then):
    diffusion = MaskReplaceDiffusion(12, 40, schedule)
    generator = torch.Generator().manual_seed(now)
    codes = torch.randint(0, 13, (50, 2, 3, 12), generator=generator)
    p = torch.randn(50, 2, 3, 12, 12, generator=generator).mul(2).softmax(dim=-1)
    expected = diffusion.draw_earlier(codes, p, torch.tensor(now), torch.tensor(then), torch.Generator().manual_seed(5))
    noise = torch.rand((3, *codes.shape), generator=torch.Generator().manual_seed(5)).numpy()
    tables = diffusion.keep.numpy(), diffusion.mask.numpy()
    found = draw_earlier(codes.numpy(), p.numpy(), now, then, noise, *tables)
    np.testing.assert_array_equal(found, expected.numpy())
    if then >= 0 and schedule == "cosine" and now < 39:
        assert ((found != codes.numpy()) & (codes.numpy() < 12)).any(), "no code was ever replaced"


# The runner by itself


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A forecaster, and its export to TorchScript for tests that leave it as it is."""
    forecaster, out = untrained(), tmp_path_factory.mktemp("small")
    export_forecaster(forecaster, out, to="torchscript")
    return forecaster, out


@pytest.mark.parametrize("sampler", ["unmask", "posterior"])
def test_both_samplers_give_the_forecasts_of_torch_in_any_number_of_steps(small, sampler):
    forecaster, out = small
    runner, scenes = Runner(out), difficult(forecaster.shape, 1, 3, 3)
    for steps in (1, 2, 5, 11, 40):
        found, expected = both(forecaster, runner, scenes, 3, steps, sampler, seed=steps)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_without_noise_the_runner_draws_its_own_from_a_seed(small):
    forecaster, out = small
    runner = Runner(out)
    past = difficult(forecaster.shape, 1, 6, 6).past.numpy()
    first, again, other = (runner.forecast(past, num_samples=4, steps=4, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (4, 1, 6, 12, 2)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert (np.nan_to_num(first) != np.nan_to_num(other)).any()
    # Agent 2 was never seen.
    assert np.isnan(first[:, :, 2]).all()
    assert np.isfinite(np.delete(first, 2, axis=2)).all()


def test_what_does_not_fit_the_model_is_refused(small, tmp_path):
    forecaster, out = small
    runner = Runner(out)
    past = difficult(forecaster.shape, 1, 2, 2).past.numpy()
    with pytest.raises(ValueError, match=r"past must be \[scenes, agents, 8, 2\], got \[1, 2, 7, 2\]"):
        runner.forecast(past[:, :, 1:])
    with pytest.raises(ValueError, match="steps must be between 1 and 40, got 41"):
        runner.forecast(past, steps=41)
    with pytest.raises(ValueError, match="sampler must be unmask or posterior, got 'ddim'"):
        runner.forecast(past, sampler="ddim")
    with pytest.raises(ValueError, match=r"noise must be \[5, 2, 20, 1, 2, 12\], got \[3\]"):
        runner.forecast(past, noise=np.zeros(3))
    with pytest.raises(ValueError, match="not an export"):
        Runner(tmp_path)


def test_a_changed_file_and_a_foreign_version_are_refused(small, tmp_path):
    _, out = small
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "decoder.pt").write_bytes((tmp_path / "context.pt").read_bytes())
    with pytest.raises(ValueError, match=r"decoder\.pt: its SHA-256 is not the one"):
        Runner(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        Runner(tmp_path)


def test_the_runner_imports_no_torch():
    words = "import sys, neurocl.trajectory.runner; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", words], check=True)


# The folder


def test_an_export_says_what_it_wrote_and_leaves_the_forecaster_as_it_was(tmp_path):
    forecaster = untrained()
    before = copy.deepcopy(forecaster.networks.state_dict())
    lines: list[str] = []
    written = export_forecaster(forecaster, tmp_path / "new" / "out", to="torchscript", say=lines.append)
    assert written.files == {path.name: path.stat().st_size for path in written.folder.iterdir()}
    assert list(written.files) == ["context.pt", "denoiser.pt", "decoder.pt", "manifest.json"]
    assert written.difference <= TOLERANCE
    assert [line.split()[0] for line in lines] == ["recording", "recording", "recording", "comparing"]
    assert all((before[name] == value).all() for name, value in forecaster.networks.state_dict().items())


def test_a_later_export_replaces_an_earlier_one_but_nothing_else(tmp_path):
    first = export_forecaster(untrained(), tmp_path, to="torchscript")
    old = (tmp_path / "manifest.json").read_text()
    changed = untrained()
    with torch.no_grad():
        changed.networks.vqvae.to_displacement.bias.add_(1)
    second = export_forecaster(changed, tmp_path, to="torchscript")
    assert first.files.keys() == second.files.keys()
    assert (tmp_path / "manifest.json").read_text() != old
    Runner(tmp_path)
    with pytest.raises(UserError, match="not an empty folder"):
        export_forecaster(untrained("flow"), tmp_path, to="torchscript")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"it holds thesis\.txt"):
        export_forecaster(changed, tmp_path, to="torchscript")
    with pytest.raises(UserError, match="is a file"):
        export_forecaster(changed, tmp_path / "thesis.txt", to="torchscript")


def test_a_prior_without_a_runner_is_one_line(tmp_path):
    with pytest.raises(UserError, match="export knows the priors diffusion, autoregressive, flow, not ddim"):
        export_forecaster(untrained("ddim"), tmp_path, to="torchscript")


def test_graphs_that_forecast_otherwise_are_not_kept(tmp_path, monkeypatch):
    export_forecaster(untrained(), tmp_path / "good", to="torchscript")
    before = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    noise = export.torch_noise
    monkeypatch.setattr(export, "torch_noise", lambda shape, size, seed: noise(shape, size, seed + 100))
    for name in ("good", "none"):
        with pytest.raises(RunError, match="forecast otherwise than torch"):
            export_forecaster(untrained(), tmp_path / name, to="torchscript")
    assert {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()} == before
    assert not (tmp_path / "none").exists()


def test_files_do_not_tell_where_they_were_made(small):
    _, out = small
    here = str(Path(export.__file__).parents[2]).encode()
    for path in out.glob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            assert not [name for name in archive.namelist() if here in archive.read(name)]


# ONNX


@pytest.fixture(scope="module", params=["default", "faithful flow"])
def onnx(request, tmp_path_factory):
    """A forecaster and its export to ONNX, which takes the exporter a while."""
    for package in export.PACKAGES:
        pytest.importorskip(package, reason=f"needs {package}: pip install 'neurocl[export]'")
    forecaster, out = untrained(**MODELS[request.param]), tmp_path_factory.mktemp("onnx")
    export_forecaster(forecaster, out, to="onnx")
    return forecaster, out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_forecasts_from_onnx_are_those_of_torch_for_any_number_of_scenes_agents_and_samples(onnx):
    forecaster, out = onnx
    runner = Runner(out, threads=1)
    for case in CASES.values():
        scenes = difficult(forecaster.shape, *case)
        for sampler in ("unmask", "posterior"):
            found, expected = both(forecaster, runner, scenes, case[-1], sampler=sampler)
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_onnx_graph_gives_what_its_module_gives(onnx):
    forecaster, out = onnx
    runner = Runner(out, threads=1)
    for case in CASES:
        for seed in range(4):
            check_graphs(forecaster, runner, case, seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx_files_are_valid_hold_no_paths_and_forecast_without_torch(onnx, tmp_path):
    import onnx as package

    forecaster, out = onnx
    here = str(Path(export.__file__).parents[2]).encode()
    for path in out.glob("*.onnx"):
        package.checker.check_model(path)
        data = path.read_bytes()
        assert here not in data
        assert b"site-packages" not in data
    past = difficult(forecaster.shape, 1, 3, 3).past.numpy()
    np.save(tmp_path / "past.npy", past)
    words = (
        "import sys, numpy as np; from neurocl.trajectory.runner import Runner; folder, here = sys.argv[1:];"
        "found = Runner(folder, threads=1).forecast(np.load(here + '/past.npy'), num_samples=3, steps=4);"
        "np.save(here + '/found.npy', found); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", words, str(out), str(tmp_path)], check=True)
    again = Runner(out, threads=1).forecast(past, num_samples=3, steps=4)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), again)
