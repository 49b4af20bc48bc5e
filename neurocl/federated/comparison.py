"""Several methods over the same clients and seeds; runs that are finished are not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neurocl.errors import UserError
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import Say, load_federated_config, resume_federated, run_federated
from neurocl.runs import RunFolder, fresh_folder, make_folder


def compare(
    configs: Sequence[FederatedConfig], *, out: Path | None = None, say: Say | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Results by method, in the order of the configurations.

    Args:
        configs: one per run.
        out: folder that holds a run folder for each; unfinished ones are resumed.
        say: called with every record of the runs' logs.

    Raises:
        UserError: a folder that holds a run of another configuration.
        RunError, Interrupted: as :func:`~neurocl.federated.driver.run_federated`.
    """
    folder = fresh_folder("federated-comparison") if out is None else out
    make_folder(folder)
    found: dict[str, list[dict[str, Any]]] = {}
    for config in configs:
        path = folder / f"{config.method}-{config.seed}"
        if say is not None:
            say({"event": "run", "text": f"{config.method}, seed {config.seed}"})
        found.setdefault(config.method, []).append(_result(config, path, say))
    return found


def _result(config: FederatedConfig, path: Path, say: Say | None) -> dict[str, Any]:
    if not path.is_dir():
        return run_federated(config, out=path, say=say)[0]
    run = RunFolder.open(path)
    if load_federated_config(run) != config:
        raise UserError(f"{path} holds a run of another configuration; choose another --out")
    return run.read_result() if run.has_result() else resume_federated(path, say=say)
