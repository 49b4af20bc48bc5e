"""Forecasts from exported graphs: all that is not in them, in numpy, as the reference for a port to another language.

Besides numpy this file needs onnxruntime for ONNX, or torch for TorchScript, and nothing else of neurocl.

``N`` samples, ``S`` scenes, ``A`` agents, ``F`` agents up to the last one that is forecast, ``T_o`` observed and
``T_p`` predicted steps, ``K`` codes, ``D`` values of a latent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
TINY = 1e-30
CHOICE_TEMPERATURE = 4.5
NUM_TIMES = 1000  # of the flow: time 0 is clean, time 1000 is noise

Array = NDArray[Any]
Graph = Callable[[Mapping[str, Array]], dict[str, Array]]


class Runner:
    """A forecaster from the folder that ``neurocl trajectory export`` wrote.

    The graphs name what they take and give in ``manifest.json``; what one gives under a name is what another takes
    under it.

    - ``context`` runs once: from pasts to all that stays the same for every sample and step;
    - the graph that ``manifest["step"]`` names (``denoiser``, ``next_code`` or ``velocity``) runs in the loop that
      draws codes or latents;
    - ``decoder`` runs once: from codes or latents to displacements from where each agent was last seen.

    Args:
        folder: with ``manifest.json`` and the graphs.
        threads: of onnxruntime; torch has its own setting.

    Raises:
        ValueError: not an export, of another version, or a file that was changed.
    """

    def __init__(self, folder: Path | str, *, threads: int | None = None) -> None:
        path = Path(folder) / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{folder} is not an export (it has no manifest.json)")
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if self.manifest.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {self.manifest.get('schema')}, this runner reads {SCHEMA}")
        load = _onnx if self.manifest["format"] == "onnx" else _torchscript
        self._graphs: dict[str, Graph] = {}
        for name, graph in self.manifest["graphs"].items():
            data = (path.parent / graph["file"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != graph["sha256"]:
                raise ValueError(f"{path.parent / graph['file']}: its SHA-256 is not the one in manifest.json")
            self._graphs[name] = load(data, graph, threads)

    def forecast(
        self,
        past: Array,
        past_mask: Array | None = None,
        kind: Array | None = None,
        target_mask: Array | None = None,
        *,
        num_samples: int = 20,
        steps: int = 5,
        sampler: str = "unmask",
        seed: int = 0,
        noise: Array | None = None,
    ) -> Array:
        """Draw samples of the future, float32 [N, S, A, T_p, 2] in the unit of the training data.

        Agents that are not forecast, or were never seen, are NaN. Work grows with the number of agents up to the last
        one that is forecast, so put those first.

        Args:
            past: positions, [S, A, T_o, 2].
            past_mask: bool [S, A, T_o], where agents were seen; None takes the finite positions.
            kind: int [S, A], places in ``manifest["kinds"]``; None takes the first.
            target_mask: bool [S, A], whom to forecast; None for everybody.
            num_samples: N.
            steps: of the sampler; more cost time and forecast a little better. An autoregressive prior has none.
            sampler: of the diffusion, ``unmask`` or ``posterior``.
            seed: of numpy's generator, if there is no ``noise``.
            noise: all random numbers, of the shape :meth:`noise_shape`; see :meth:`noise`.

        Raises:
            ValueError: shapes that do not fit the model, no such sampler, or steps it cannot take.
        """
        num_observed = self.manifest["num_observed"]
        if past.ndim != 4 or past.shape[2:] != (num_observed, 2):
            raise ValueError(f"past must be [scenes, agents, {num_observed}, 2], got {list(past.shape)}")
        seen: Array = np.asarray(np.isfinite(past).all(axis=-1) if past_mask is None else past_mask)
        targets: Array = np.asarray(seen.any(axis=-1) if target_mask is None else target_mask)
        forecast = np.flatnonzero(targets.any(axis=0))
        count = int(forecast[-1]) + 1 if len(forecast) else 1
        inputs: dict[str, Array] = {
            "past": np.where(seen[..., None], past, 0).astype(np.float32),
            "past_mask": seen,
            "kind": np.zeros(past.shape[:2], np.int64) if kind is None else kind.astype(np.int64),
            "target_mask": targets[:, :count],
        }
        known = self._graphs["context"](inputs)
        shape = self.noise_shape(num_samples, len(past), count, steps, sampler)
        if noise is None:
            noise = self.noise(shape, seed)
        if noise.shape != shape:
            raise ValueError(f"noise must be {list(shape)}, got {list(noise.shape)}")
        noise = noise.astype(np.float32)
        if self.manifest["prior"] == "diffusion":
            known["codes"] = (self._unmask if sampler == "unmask" else self._diffuse)(known, noise)
        elif self.manifest["prior"] == "autoregressive":
            known["codes"] = self._write(known, noise)
        else:
            known["latents"] = self._flow(known, noise, steps)
        moves = self._graphs["decoder"](known)["moves"]
        positions = np.full((num_samples, *past.shape[:2], *moves.shape[3:]), np.nan, np.float32)
        positions[:, :, :count] = np.where(
            known["present"][:, :, None, None], moves + known["anchor"][:, :, None], np.nan
        )
        return positions

    def noise_shape(
        self, num_samples: int, num_scenes: int, num_forecast: int, steps: int, sampler: str = "unmask"
    ) -> tuple[int, ...]:
        """How many random numbers a forecast takes.

        ``diffusion``: [steps, 2 to unmask or 3 for the posterior, N, S, F, T_p]; ``autoregressive``: [T_p, N, S, F];
        ``flow``: [N, S, F, T_p, D].

        Raises:
            ValueError: no such sampler, or steps it cannot take.
        """
        if sampler not in ("unmask", "posterior"):
            raise ValueError(f"sampler must be unmask or posterior, got {sampler!r}")
        agents, length = (num_samples, num_scenes, num_forecast), self.manifest["num_predicted"]
        if self.manifest["prior"] == "autoregressive":
            return (length, *agents)
        most = self.manifest["diffusion"]["num_steps"] if self.manifest["prior"] == "diffusion" else NUM_TIMES
        if not 1 <= steps <= most:
            raise ValueError(f"steps must be between 1 and {most}, got {steps}")
        if self.manifest["prior"] == "diffusion":
            return (steps, 2 if sampler == "unmask" else 3, *agents, length)
        return (*agents, length, self.manifest["latent_size"])

    def noise(self, shape: tuple[int, ...], seed: int) -> Array:
        """Standard normal numbers for a flow, else uniform numbers in [0, 1)."""
        generator = np.random.default_rng(seed)
        if self.manifest["prior"] == "flow":
            return generator.standard_normal(shape, np.float32)
        return generator.random(shape, np.float32)

    def _unmask(self, known: dict[str, Array], noise: Array) -> Array:
        """Codes [N, S, F, T_p]: fill in the masked ones the network is surest of, fewer at first, and never look back.

        ``noise`` [steps, 2, N, S, F, T_p] draws codes, and shakes how sure the network is, less with every step.
        """
        num_codes, steps, length = self.manifest["num_codes"], len(noise), noise.shape[-1]
        mask = np.array(self.manifest["diffusion"]["mask"])[1:]
        codes = np.full(noise.shape[2:], num_codes, np.int64)
        for index in range(steps):
            masked = codes == num_codes
            # The time at which this many tokens are masked.
            share = np.float32(masked.sum()) / np.float32(masked.size)
            t = np.array(np.abs(mask - share).argmin(), np.int64)
            # At first all samples are alike, and the network sees one of them.
            seen = codes[:1] if index == 0 else codes
            p = softmax(self._graphs["denoiser"]({**known, "codes": seen, "t": t})["logits"])
            edges = np.broadcast_to(p.cumsum(axis=-1), (*codes.shape, num_codes))
            drawn = row_of(edges, noise[index, 0] * edges[..., -1])
            sure = np.take_along_axis(np.broadcast_to(p, edges.shape), drawn[..., None], axis=-1)[..., 0]
            gumbel = -np.log(-np.log(np.clip(noise[index, 1], TINY, np.float32(1 - 1e-7))))
            left_over = 1 - (index + 1) / steps
            sure = np.log(np.maximum(sure, TINY)) + np.float32(CHOICE_TEMPERATURE * left_over) * gumbel
            still = np.float32(length) * np.float32(math.cos(math.pi / 2 * (index + 1) / steps))
            still = np.floor(still) if index < steps - 1 else np.float32(0)
            rank = np.where(masked, sure, np.inf).argsort(axis=-1).argsort(axis=-1)
            codes = np.where(masked & (rank >= still), drawn, codes)
        return codes

    def _diffuse(self, known: dict[str, Array], noise: Array) -> Array:
        """Codes [N, S, F, T_p] by the posterior of the diffusion, in strides from all masked to clean."""
        num_codes, steps = self.manifest["num_codes"], len(noise)
        keep, mask = (np.array(self.manifest["diffusion"][name]) for name in ("keep", "mask"))
        last = self.manifest["diffusion"]["num_steps"] - 1
        times = [round(last * (1 - index / max(1, steps - 1))) for index in range(steps)]
        codes = np.full(noise.shape[2:], num_codes, np.int64)
        for index, (now, then) in enumerate(pairwise([*times, -1])):
            seen = codes[:1] if index == 0 else codes
            logits = self._graphs["denoiser"]({**known, "codes": seen, "t": np.array(now, np.int64)})["logits"]
            codes = draw_earlier(codes, softmax(logits), now, then, noise[index], keep, mask)
        return codes

    def _write(self, known: dict[str, Array], noise: Array) -> Array:
        """Codes [N, S, F, T_p] one after the other; what the network says of a code depends on earlier ones only."""
        length = len(noise)
        codes = np.zeros((*noise.shape[1:], length), np.int64)
        for index in range(length):
            logits = self._graphs["next_code"]({**known, "codes": codes[..., : length - 1]})["logits"]
            edges = softmax(logits[..., index, :]).cumsum(axis=-1)
            codes[..., index] = row_of(edges, noise[index] * edges[..., -1])
        return codes

    def _flow(self, known: dict[str, Array], noise: Array, steps: int) -> Array:
        """Latents [N, S, F, T_p, D] along straight lines from noise, in Euler steps."""
        levels = [np.float32(1 - index / steps) for index in range(steps + 1)]
        latents = noise
        for now, then in pairwise(levels):
            inputs = {**known, "latents": latents, "t": np.array(now * NUM_TIMES, np.float32)}
            latents = latents + (then - now) * self._graphs["velocity"](inputs)["velocity"]
        return latents


def draw_earlier(codes: Array, p: Array, now: int, then: int, noise: Array, keep: Array, mask: Array) -> Array:
    """Codes at time ``then``, given those at time ``now`` and a belief about the clean ones.

    A token is kept, replaced by any code, or masked, with cumulative probabilities ``keep``, K times ``replace``
    and ``mask`` (number K is the mask). The posterior is a mixture: stay; take a code from ``p``; take any code.

    Args:
        codes: [N, S, F, T_p].
        p: probabilities of the clean codes, [N or 1, S, F, T_p, K].
        now, then: times; -1 is clean.
        noise: uniform numbers [3, N, S, F, T_p]: whether to stay, which code, and from where.
        keep, mask: tables of the times -1 ... T - 1, float64.
    """
    num_codes = p.shape[-1]
    replace = (1 - keep - mask) / num_codes
    # From here on everything is float32, as in the network.
    keep_s, replace_s, mask_s = (np.float32(table[then + 1]) for table in (keep, replace, mask))
    keep_t, replace_t, mask_t = (np.float32(table[now + 1]) for table in (keep, replace, mask))
    step_keep = keep[now + 1] / max(keep[then + 1], TINY)
    step_mask = 1 - (1 - mask[now + 1]) / max(1 - mask[then + 1], TINY)
    step_replace = np.float32(max((1 - step_keep - step_mask) / num_codes, 0))

    masked = codes == num_codes
    own = np.minimum(codes, num_codes - 1)
    edges = np.broadcast_to(p.cumsum(axis=-1), (*codes.shape, num_codes))
    mine = np.take_along_axis(np.broadcast_to(p, edges.shape), own[..., None], axis=-1)[..., 0]
    mine = np.where(masked, np.float32(0), mine)

    # Of a code: itself, another one of p, or any other one. Of the mask: itself, one of p, or any.
    least = max(replace_t, np.float32(TINY))
    weight = mine / (keep_t + replace_t) + (1 - mine) / least
    stay = (keep_s * mine / (keep_t + replace_t) + replace_s * weight) * (np.float32(step_keep) + step_replace)
    stay = np.where(masked, mask_s / max(mask_t, np.float32(TINY)), stay)
    from_p = np.where(masked, keep_s, keep_s * (1 - mine) / least)
    from_any = replace_s * np.where(masked, np.float32(num_codes), (num_codes - 1) * weight)

    # A draw from p that leaves out the token's own code: jump over its share.
    aim = noise[1] * (edges[..., -1] - mine)
    before = np.take_along_axis(edges, own[..., None], axis=-1)[..., 0] - mine
    of_p = row_of(edges, np.where(masked | (aim < before), aim, aim + mine))
    choices = np.where(masked, num_codes, num_codes - 1)
    of_any = np.minimum((noise[1] * choices.astype(np.float32)).astype(np.int64), choices - 1)
    of_any = np.where(masked | (of_any < own), of_any, of_any + 1)
    moved = np.where(noise[2] * (from_p + from_any) < from_p, of_p, of_any)
    return np.where(noise[0] < stay, codes, moved)


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def row_of(edges: Array, aim: Array) -> Array:
    """The first entry of cumulative sums [..., K] that is above each aim [...], never one of zero probability."""
    top = edges[..., -1]
    below = np.minimum(aim, np.nextafter(top, np.zeros_like(top)))
    return np.asarray((edges <= below[..., None]).sum(axis=-1))


def _onnx(data: bytes, graph: Mapping[str, Any], threads: int | None) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    inputs, outputs = ([port["name"] for port in graph[side]] for side in ("inputs", "outputs"))

    def run(known: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(outputs, session.run(outputs, {name: known[name] for name in inputs}), strict=True))

    return run


def _torchscript(data: bytes, graph: Mapping[str, Any], threads: int | None) -> Graph:
    import io
    import warnings

    import torch

    with warnings.catch_warnings():
        # Deprecated since there is torch.export, whose files are tied to the version of torch.
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(io.BytesIO(data), map_location="cpu")
    inputs, outputs = ([port["name"] for port in graph[side]] for side in ("inputs", "outputs"))

    def run(known: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            found = module(*(torch.from_numpy(np.asarray(known[name], order="C")) for name in inputs))
        return {name: value.numpy() for name, value in zip(outputs, found, strict=True)}

    return run
