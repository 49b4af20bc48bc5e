"""Merges by linear algebra against the plain way: Iso-C on the shapes of a ViT-B/16, and the SVD merge of LoRA layers.

    python benchmarks/merging_linear_algebra.py --threads 1             # two of the twelve blocks, two LoRA layers
    python benchmarks/merging_linear_algebra.py --device cuda           # all blocks, three LoRA layers
    python benchmarks/merging_linear_algebra.py --quick                 # an eighth of the width, seconds

Iso-C: one float64 SVD per matrix (sum of task matrices, singular values replaced by their mean) against ``iso_c``,
which is handed all matrices of one shape at once. LoRA: PEFT's ``svd`` combination, which sums dense updates and takes
their SVD (``torch.linalg.svd`` with full matrices, its default), against ``lora_svd``. Contenders take turns. Seconds
are processor time on a CPU, which other programs do not stretch, and elapsed time on a GPU.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from neurocl.compat.torchvision import ensure_torchaudio, ensure_torchvision
from neurocl.merging.adapters import LoraLayer, lora_svd
from neurocl.merging.iso import iso_c

NUM_TASKS = 8
TASK_RANK = 64
ISO_BOUND, ISO_ERROR = 0.6, 1e-10
NUM_ADAPTERS, LORA_RANK = 4, 16
LORA_BOUND, LORA_ERROR = 20.0, 1e-5

Shapes = dict[str, tuple[int, int, int]]


ResultT = TypeVar("ResultT")


def timed(function: Callable[[], ResultT], device: torch.device) -> tuple[ResultT, float]:
    """The result, and the seconds it took."""
    if device.type == "cpu":
        start = time.process_time()
        result = function()
        return result, time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def verdict(holds: bool) -> str:
    return "met" if holds else "MISSED"


def vit_shapes(num_blocks: int, width: int) -> Shapes:
    """Count, rows and columns of the matrices of a ViT-B/16 in CLIP, by name."""
    return {
        "attention in": (num_blocks, 3 * width, width),
        "attention out": (num_blocks, width, width),
        "MLP in": (num_blocks, 4 * width, width),
        "MLP out": (num_blocks, width, 4 * width),
        "projection": (1, width, 2 * width // 3),
        "positions": (1, 197, width),
    }


def task_models(count: int, rows: int, columns: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Base [count, m, n] and fine-tuned matrices [N, count, m, n]; changes of rank 64 and noise of equal norm."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)

    base = normal(count, rows, columns) / math.sqrt(columns)
    models = base.expand(NUM_TASKS, -1, -1, -1).clone()
    for model in models:
        model += 1e-3 * normal(count, rows, columns)
        model += 1e-3 / math.sqrt(TASK_RANK) * normal(count, rows, TASK_RANK) @ normal(count, TASK_RANK, columns)
    return base, models


def iso_c_by_svd(base: Tensor, models: Tensor) -> Tensor:
    merged = torch.empty_like(base)
    for index in range(len(base)):
        total = (models[:, index] - base[index]).sum(dim=0)
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        merged[index] = base[index] + values.mean() * left @ right
    return merged


def compare_iso(shapes: Shapes, device: torch.device, repeats: int) -> None:
    print(f"\nIso-C, float64, {NUM_TASKS} tasks, {device}, median of {repeats}; ratio: ours / plain")
    print(f"  {'':14} {'matrices':>16} {'plain s':>8} {'ours s':>8} {'ratio':>6} {'error':>8}")
    total_plain = total_ours = worst = 0.0
    for seed, (name, (count, rows, columns)) in enumerate(shapes.items()):
        base, models = task_models(count, rows, columns, device, seed)
        plain_seconds, our_seconds = [], []
        iso_c(base[:1], models[:, :1])
        for _ in range(repeats):
            expected, seconds = timed(partial(iso_c_by_svd, base, models), device)
            plain_seconds.append(seconds)
            merged, seconds = timed(partial(iso_c, base, models), device)
            our_seconds.append(seconds)
        norms = torch.linalg.matrix_norm(expected - base)
        error = float((torch.linalg.matrix_norm(merged - expected) / norms).max())
        plain, ours = statistics.median(plain_seconds), statistics.median(our_seconds)
        size = f"{count} x {rows}x{columns}"
        print(f"  {name:14} {size:>16} {plain:8.2f} {ours:8.2f} {ours / plain:6.2f} {error:8.0e}")
        total_plain, total_ours, worst = total_plain + plain, total_ours + ours, max(worst, error)
    ratio = total_ours / total_plain
    print(f"  {'all':14} {'':16} {total_plain:8.2f} {total_ours:8.2f} {ratio:6.2f} {worst:8.0e}")
    print(f"  at most {ISO_BOUND} x the time: {verdict(ratio <= ISO_BOUND)}; ", end="")
    print(f"relative error below {ISO_ERROR:g}: {verdict(worst < ISO_ERROR)}")


def lora_layers(width: int, device: torch.device, seed: int) -> list[LoraLayer]:
    generator = torch.Generator(device).manual_seed(seed)
    layers = []
    for _ in range(NUM_ADAPTERS):
        a = torch.randn(LORA_RANK, width, generator=generator, device=device) / math.sqrt(width)
        b = torch.randn(width, LORA_RANK, generator=generator, device=device) / math.sqrt(width)
        layers.append(LoraLayer(a, b, 2.0))
    return layers


def written_out_svd(layers: list[LoraLayer], weights: list[float]) -> Tensor:
    """What PEFT does for ``svd``: dense sum in the dtype of the factors, full SVD, cut to the rank."""
    total = torch.zeros(len(layers[0].B), layers[0].A.shape[1], device=layers[0].A.device)
    for layer, weight in zip(layers, weights, strict=True):
        total += weight * layer.scaling * (layer.B @ layer.A)
    left, values, right = torch.linalg.svd(total, full_matrices=True)
    return torch.cat([left[:, :LORA_RANK] * values[:LORA_RANK], right[:LORA_RANK].mT])


def peft_svd(layers: list[LoraLayer], weights: list[float]) -> Callable[[], Tensor]:
    """PEFT's own weighted combination of the adapters on one linear layer.

    Raises:
        ImportError: PEFT cannot be imported.
    """
    import peft
    from torch import nn

    width = layers[0].A.shape[1]
    network = nn.Sequential(nn.Linear(width, len(layers[0].B), bias=False, device=layers[0].A.device))
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["0"])
    model: Any = peft.get_peft_model(network, config, adapter_name="0")
    for index in range(1, len(layers)):
        model.add_adapter(str(index), config)
    linear = model.base_model.model[0]
    for index, layer in enumerate(layers):
        linear.lora_A[str(index)].weight.data.copy_(layer.A)
        linear.lora_B[str(index)].weight.data.copy_(layer.B)
    names = [str(index) for index in range(len(layers))]

    def combine() -> Tensor:
        if "merged" in linear.lora_A:
            model.delete_adapter("merged")
        model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=LORA_RANK)
        scaling = linear.scaling["merged"]
        return torch.cat([scaling * linear.lora_B["merged"].weight.data, linear.lora_A["merged"].weight.data.mT])

    return combine


def lora_peer() -> tuple[str, Callable[[list[LoraLayer], list[float]], Callable[[], Tensor]]]:
    """PEFT if it can be imported, otherwise its computation written out."""
    ensure_torchvision()
    ensure_torchaudio()
    try:
        import peft
    except ImportError:
        return "PEFT's computation written out (peft cannot be imported)", lambda *given: partial(
            written_out_svd, *given
        )
    return f"PEFT {peft.__version__}", peft_svd


def compare_lora(width: int, num_layers: int, device: torch.device) -> None:
    peer, prepare = lora_peer()
    print(f"\nLoRA svd, {NUM_ADAPTERS} adapters of rank {LORA_RANK}, {width}x{width}, float32, {device}; peer: {peer}")
    print(f"  {'layer':>5} {'peer s':>8} {'ours s':>8} {'speed-up':>8} {'difference':>10}")
    weights = [0.7, 0.5, 1.0, 0.3]
    slowest, worst = math.inf, 0.0
    lora_svd(lora_layers(64, device, seed=99), weights=weights)
    for index in range(num_layers):
        layers = lora_layers(width, device, seed=index)
        factors, peer_seconds = timed(prepare(layers, weights), device)
        turns = [timed(partial(lora_svd, layers, weights=weights), device) for _ in range(5)]
        ours = statistics.median(seconds for _, seconds in turns)
        expected = factors[:width].double() @ factors[width:].double().mT
        difference = float((turns[0][0].delta() - expected).norm() / expected.norm())
        print(f"  {index:5} {peer_seconds:8.2f} {ours:8.4f} {peer_seconds / ours:8.0f} {difference:10.0e}")
        slowest, worst = min(slowest, peer_seconds / ours), max(worst, difference)
    print(f"  at least {LORA_BOUND:g} x as fast: {verdict(slowest >= LORA_BOUND)}; ", end="")
    print(f"relative difference below {LORA_ERROR:g}: {verdict(worst < LORA_ERROR)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of Iso-C")
    parser.add_argument("--blocks", type=int, help="transformer blocks; 2 on a CPU, 12 on a GPU")
    parser.add_argument("--layers", type=int, help="LoRA layers; 2 on a CPU, 3 on a GPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="an eighth of the width, one block, one layer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {machine}")
    num_blocks = options.blocks or (1 if options.quick else 12 if on_gpu else 2)
    num_layers = options.layers or (1 if options.quick else 3 if on_gpu else 2)
    print(f"ViT-B/16: {num_blocks} of 12 blocks")
    compare_iso(vit_shapes(num_blocks, 96 if options.quick else 768), device, options.repeats)
    compare_lora(512 if options.quick else 4096, num_layers, device)


if __name__ == "__main__":
    main()
