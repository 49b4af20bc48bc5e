"""Every merge on a CUDA device gives the numbers of the CPU."""

import pytest
import torch

from neurocl.merging.catalog import MERGES
from neurocl.merging.memory import merge
from neurocl.merging.statistics import Statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = {"a.weight": (48, 32), "b.weight": (32, 48), "a.bias": (48,), "conv.weight": (6, 3, 3, 3)}


def models(count):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = [
        {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for _ in range(count)
    ]
    return base, experts


def statistics(kind, experts):
    found = []
    for index, state in enumerate(experts):
        generator = torch.Generator().manual_seed(index)
        own = Statistics()
        for name, value in state.items():
            if kind == "fisher":
                own.add("fisher", name, torch.rand(value.shape, generator=generator), num_samples=1, num_rows=1)
            elif value.dim() == 2:
                x = torch.randn(100, value.shape[1], generator=generator, dtype=torch.float64)
                own.add("gram", name, x.T @ x, num_samples=100, num_rows=100)
        found.append(own)
    return found


@pytest.mark.parametrize("name", MERGES.names("weights"))
def test_a_merge_on_the_gpu_equals_the_one_on_the_cpu(name):
    declared = MERGES.load(name).merge
    base, experts = models(declared.num_models or 3)
    needed = statistics(declared.statistic, experts) if declared.statistic else None
    on_cpu = merge(base, experts, name, statistics=needed)
    on_gpu = merge(base, experts, name, statistics=needed, device="cuda")
    for key, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[key].cpu(), value, rtol=1e-5, atol=1e-6)
