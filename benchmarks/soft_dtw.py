"""Soft-DTW value and gradient with respect to x: neurocl against tslearn and pysdtw, in one process.

Prints one row per size with the ratio (fastest peer) / (neurocl's numba kernel), then the worst ratios.

    python benchmarks/soft_dtw.py [--threads 1] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import product

import numpy as np

Call = Callable[[], None]


def measure(calls: dict[str, Call], repeats: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of one call, all contestants taking turns in every repeat."""
    loops = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        loops[name] = max(1, int(seconds / repeats / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(loops[name]):
                call()
            times[name].append((time.perf_counter() - start) / loops[name] * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and numba")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(arguments.threads)

    import numba
    import pysdtw
    import torch
    import tslearn
    from tslearn.metrics import SoftDTWLossPyTorch

    from neurocl.spiking.softdtw import soft_dtw, soft_dtw_divergence

    torch.set_num_threads(arguments.threads)
    print(
        f"threads {arguments.threads}, torch {torch.__version__}, numba {numba.__version__}, "
        f"numpy {np.__version__}, tslearn {tslearn.__version__}, pysdtw {pysdtw.__version__}"
    )
    print("milliseconds, value + gradient wrt x, float32, autograd included")

    def half_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3)

    tslearn_half = SoftDTWLossPyTorch(gamma=1.0, dist_func=half_distances)
    tslearn_default = SoftDTWLossPyTorch(gamma=1.0)
    pysdtw_cpu = pysdtw.SoftDTW(gamma=1.0, use_cuda=False)

    batches, steps, features = (
        ((64, 256), (2, 8), (10,)) if arguments.quick else ((10, 64, 256, 512), (2, 4, 8, 16), (10, 100))
    )
    sizes = list(product(batches, steps, features)) + ([] if arguments.quick else [(32, 128, 10), (32, 256, 10)])
    repeats, seconds = (5, 0.1) if arguments.quick else (9, 0.3)
    peers = ("tslearn half", "tslearn", "pysdtw")
    ours = ("numba", "torch", "divergence")
    print(f"{'B':>4} {'T':>4} {'K':>4}" + "".join(f"{name:>14}" for name in (*ours, *peers)) + f"{'ratio':>9}")
    ratios = {}
    generator = torch.Generator().manual_seed(0)
    for batch, length, width in sizes:
        x = torch.randn(batch, length, width, generator=generator).requires_grad_()
        y = torch.randn(batch, length, width, generator=generator)

        def gradient_of(function: Callable[..., torch.Tensor], x: torch.Tensor = x, y: torch.Tensor = y) -> Call:
            def call() -> None:
                x.grad = None
                function(x, y).sum().backward()

            return call

        medians = measure(
            {
                "numba": gradient_of(lambda x, y: soft_dtw(x, y, backend="numba")),
                "torch": gradient_of(lambda x, y: soft_dtw(x, y, backend="torch")),
                "divergence": gradient_of(lambda x, y: soft_dtw_divergence(x, y, reduction="none")),
                "tslearn half": gradient_of(tslearn_half),
                "tslearn": gradient_of(tslearn_default),
                "pysdtw": gradient_of(pysdtw_cpu),
            },
            repeats,
            seconds,
        )
        ratios[batch, length, width] = ratio = min(medians[peer] for peer in peers) / medians["numba"]
        cells = "".join(f"{medians[name]:14.4f}" for name in (*ours, *peers))
        print(f"{batch:4d} {length:4d} {width:4d}{cells}{ratio:9.2f}", flush=True)

    print("worst ratio {:.2f} at B, T, K = {}".format(*min((ratio, size) for size, ratio in ratios.items())))
    large = [(ratio, size) for size, ratio in ratios.items() if size[0] >= 256 and size[1] >= 8]
    print("worst ratio for B >= 256, T >= 8: {:.2f} at B, T, K = {}".format(*min(large)))


if __name__ == "__main__":
    main()
