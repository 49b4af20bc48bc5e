"""Runs that break in the middle of a task and are taken up again, beside unbroken ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import resume_federated, run_federated
from neurocl.federated.payload import Payload, encode
from neurocl.runs import RunFolder


class Broken(Exception):
    """What a run breaks with."""


def kept(folder: Path) -> list[bytes]:
    """The server's state and what every client keeps, as bytes."""
    checkpoint = RunFolder.open(folder).load_checkpoint()
    state = Payload({name: value.numpy() for name, value in checkpoint.tensors.items()}, checkpoint.state["meta"])
    return [encode(state), *(path.read_bytes() for path in sorted((folder / "clients").iterdir()))]


def assert_a_broken_run_ends_like_an_unbroken_one(config: FederatedConfig, folder: Path, *, after: int = 3) -> None:
    """``after`` records the run breaks, right before the round is saved; the unbroken run needs no other processes."""
    whole, _ = run_federated(config.model_copy(update={"workers": 0}), out=folder / "whole")
    records = 0

    def say(record: dict[str, Any]) -> None:
        nonlocal records
        records += 1
        if records > after:
            raise Broken

    with pytest.raises(Broken):
        run_federated(config, out=folder / "broken", say=say)
    found = resume_federated(folder / "broken")
    for key in ("accuracy", "metrics", "bytes", "failures"):
        assert found[key] == whole[key], key
    assert kept(folder / "broken") == kept(folder / "whole")
