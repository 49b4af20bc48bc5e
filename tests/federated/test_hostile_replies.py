"""Whatever a client sends, the server goes on: it neither fails nor ends with numbers that are not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from neurocl.errors import RunError
from neurocl.federated.catalog import FEDERATED
from neurocl.federated.exchange import Exchange, Outcome, Reply, checked, sorted_outcome
from neurocl.federated.method import Place
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import LARGEST_NUMBER, Payload, check_finite, encode
from tests.federated.small_problem import config, in_memory

NAMES = [entry.name for entry in FEDERATED.entries() if entry.name != "joint"]
OPTIONS: dict[str, dict[str, Any]] = {
    "target": {"synthesis": {"steps": 2, "inner_steps": 2, "warm_up": 1, "student_steps": 1}},
    "tangent-ridge": {"train": "head"},
    "tangent": {"ledger": True},
}


def filled(payload: Payload, value: float, n: float) -> Payload:
    """Every number replaced, names and shapes as they should be."""
    arrays = {
        name: np.full_like(array, np.clip(value, *limits(array))) if array.dtype.kind != "b" else array
        for name, array in payload.arrays.items()
    }
    return Payload(arrays, {**payload.meta, "n": n})


def limits(array: np.ndarray[Any, Any]) -> tuple[float, float]:
    found = np.finfo(array.dtype) if array.dtype.kind == "f" else np.iinfo(array.dtype)
    return max(found.min, -LARGEST_NUMBER), min(found.max, LARGEST_NUMBER)


SPOILT = {
    "largest": lambda payload: filled(payload, LARGEST_NUMBER, 10),
    "smallest": lambda payload: filled(payload, -LARGEST_NUMBER, 10),
    "zeros": lambda payload: filled(payload, 0.0, 10),
    "tiny": lambda payload: filled(payload, 1e-38, 1e-300),
    "claimed": lambda payload: Payload(payload.arrays, {**payload.meta, "n": LARGEST_NUMBER}),
    "more": lambda payload: Payload({**payload.arrays, "other": np.ones(3)}, {**payload.meta, "other": "text"}),
    "less": lambda payload: Payload(dict(list(payload.arrays.items())[1:]), payload.meta),
    "bare": lambda payload: Payload(meta={"n": 3}),
    "flat": lambda payload: Payload({name: array.ravel() for name, array in payload.arrays.items()}, payload.meta),
    "unspoken": lambda payload: Payload(payload.arrays, {name: "x" if name != "n" else 1 for name in payload.meta}),
}


class Hostile:
    """An exchange in which client 0 sends something else."""

    def __init__(self, inner: Exchange, spoil: Any) -> None:
        self.inner, self.spoil = inner, spoil

    def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Outcome:
        found = self.inner(place, messages, attempt)
        items = [self._sent(reply) if reply.client == 0 else reply for reply in found.replies]
        return sorted_outcome([*items, *found.failures])

    def _sent(self, reply: Reply) -> Any:
        return checked(0, encode(self.spoil(reply.payload)))

    def close(self) -> None:
        """Nothing was started."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_server_survives_what_a_client_sends(name: str) -> None:
    own = config(
        method=name,
        options=OPTIONS.get(name, {}),
        optimizer="sgd" if name == "scaffold" else "adamw",
        partition=PartitionConfig(num_clients=5 if name == "krum" else 3, beta=1.0),
        rounds=1,
        max_repeats=0,
    )
    for kind, spoil in SPOILT.items():
        run, _ = in_memory(own)
        run.exchange = Hostile(run.exchange, spoil)  # type: ignore[assignment]
        # After a plain mean of huge weights nobody can train any more.
        with contextlib.suppress(*([RunError] if kind in ("largest", "smallest", "claimed") else [])):
            run.run()
        assert check_finite(run.state) is None, f"{kind}: {check_finite(run.state)}"
