"""What every expert of a suite is regularised with, from a few hundred training pictures of the tasks that it may know.

ITA and IEL know the tasks before theirs in the suite's order; TAK knows all others, by their K-FAC factors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neurocl.devices import Runtime
from neurocl.merging.collector import Wanted, collect
from neurocl.merging.ita_iel import Iel, Ita
from neurocl.merging.linearised import unit_rows
from neurocl.merging.statistics import Statistics
from neurocl.merging.suite import Suite, SuiteConfig, load_head, load_state, logits, network
from neurocl.merging.tak import Tak, aggregate
from neurocl.merging.training import Regulariser
from neurocl.runs import make_folder

NUM_EXAMPLES = 256

# The best on validation pictures of the digits suite (benchmarks/merging_regularisers.py --select), for ITA and IEL by
# the mean of the experts, for TAK by their plain sum. Published, on other networks: 0.02 to 5 for ITA, 100 to 500 for
# TAK. Strengths do not carry over: they scale with the sharpness of the loss and the number of tasks and tokens.
STRENGTHS = {"ita": 0.02, "iel": 10.0, "tak": 10000.0}

# As published: ITA and IEL change the matrices of the blocks; TAK changes everything but how pictures become tokens.
BLOCK_MATRICES = ("blocks.*",)
BEHIND_THE_TOKENS = ("cls_token", "blocks.*", "norm.*", "head.*")
PROJECTION = ("head.weight",)

State = dict[str, Tensor]


def regulariser_factory(config: SuiteConfig, runtime: Runtime) -> Callable[[Suite, str], Regulariser] | None:
    """What :func:`neurocl.merging.training.train_suite` takes as ``regularise``; None for plain fine-tuning.

    Statistics are taken at the base and kept in ``SUITE/statistics/TASK.safetensors``.

    Args:
        config: of the suite; its ``regularise`` and ``strength``.
        runtime: device and number format.
    """
    if config.regularise == "none":
        return None
    strength = STRENGTHS[config.regularise] if config.strength is None else config.strength
    build = {"ita": _ita, "iel": _iel, "tak": _tak}[config.regularise]
    return partial(build, strength=strength, runtime=runtime)


def _ita(suite: Suite, task: str, *, strength: float, runtime: Runtime) -> Regulariser:
    earlier = [_statistics(suite, name, "fisher", BLOCK_MATRICES, runtime) for name in _before(suite, task)]
    return Ita.of(_base(suite, runtime), earlier, strength=strength, parameters=BLOCK_MATRICES)


def _iel(suite: Suite, task: str, *, strength: float, runtime: Runtime) -> Regulariser:
    earlier = _before(suite, task)
    known = [_statistics(suite, name, "fisher", BLOCK_MATRICES, runtime) for name in [*earlier, task]]
    past: State = {}
    for name in earlier:
        for key, value in load_state(suite.path / "experts" / name).items():
            change = value - suite.base[key]
            past[key] = past[key] + change if key in past else change
    return Iel.of(_base(suite, runtime), known, past, strength=strength, parameters=BLOCK_MATRICES)


def _tak(suite: Suite, task: str, *, strength: float, runtime: Runtime) -> Regulariser:
    others = [name for name in suite.tasks if name != task]
    # One at a time: the aggregate is of the size of a single task, whatever their number.
    curvature = aggregate(_statistics(suite, name, "kfac", BEHIND_THE_TOKENS, runtime) for name in others)
    placed = curvature.to(runtime.device, torch.float32)
    return Tak(placed, strength=strength, projection=PROJECTION)


def _before(suite: Suite, task: str) -> tuple[str, ...]:
    return suite.tasks[: suite.tasks.index(task)]


def _base(suite: Suite, runtime: Runtime) -> nn.Module:
    return network(suite.network_config, suite.base).to(runtime.device)


def _statistics(suite: Suite, task: str, kind: Wanted, parameters: Sequence[str], runtime: Runtime) -> Statistics:
    """Of the base on a task, collected once."""
    path = suite.path / "statistics" / f"{task}.safetensors"
    if not path.is_file():
        _collect(suite, task, kind, parameters, runtime, path)
    # Always as it was stored, so that a suite that goes on later sees the same digits.
    return Statistics.load(path)


def _collect(suite: Suite, task: str, kind: Wanted, parameters: Sequence[str], runtime: Runtime, path: Path) -> None:
    head = load_head(suite.path, task) if kind == "fisher" else None

    def forward(module: nn.Module, batch: Any) -> Tensor:
        embedding = module(batch)
        return unit_rows(embedding) if head is None else logits(embedding, head.to(runtime.device))

    items = suite.items(task, "train").first(NUM_EXAMPLES)
    batches = (inputs.to(runtime.device) for inputs, _ in items.batches(64))
    found = collect(_base(suite, runtime), batches, kinds=(kind,), parameters=parameters, forward=forward)
    make_folder(path.parent)
    found.save(path, dtype=torch.float32)
