"""The merges that work entry by entry give the bits of the CPU on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurocl.merging.arithmetic import task_arithmetic
from neurocl.merging.average import average
from neurocl.merging.breadcrumbs import breadcrumbs, magnitude_prune
from neurocl.merging.dare import dare, dare_ties
from neurocl.merging.masks import compress, consensus, emr
from neurocl.merging.model_stock import model_stock
from neurocl.merging.slerp import slerp
from neurocl.merging.ties import ties
from tests.merging.pieces import random_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (average, {}),
        (task_arithmetic, {}),
        (ties, {}),
        (ties, {"sign": "frequency", "combine": "max"}),
        (dare, {"rescale": "l1"}),
        (dare_ties, {}),
        (breadcrumbs, {}),
        (magnitude_prune, {"rescale": "l2"}),
        (consensus, {"multitask": "ties-sum"}),
        (emr, {}),
        (model_stock, {}),
        (slerp, {"t": 0.3}),
    ],
)
def test_a_gpu_gives_the_bits_of_the_cpu(function: Any, options: dict[str, Any]) -> None:
    base, models = random_models(2, 40_009)
    expected = function(base, models, **options)
    assert torch.equal(function(base.cuda(), models.cuda(), **options).cpu(), expected)


@pytest.mark.parametrize("method", ["emr", "tall"])
def test_experts_compressed_on_a_gpu_are_those_of_the_cpu(method: Any) -> None:
    base, models = random_models(3, 13, 7)
    on_cpu = compress({"w": base}, [{"w": model} for model in models], method)
    on_gpu = compress({"w": base.cuda()}, [{"w": model.cuda()} for model in models], method)
    for index in range(3):
        torch.testing.assert_close(on_gpu.expert(index)["w"].cpu(), on_cpu.expert(index)["w"], rtol=1e-15, atol=1e-15)
