"""A real training run that takes seconds, of three agents who walk on arcs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from neurocl.trajectory.config import resolve
from neurocl.trajectory.training import train

SMALL: dict[str, Any] = {
    "model": {"width": 16, "heads": 2, "hidden": 16, "num_codes": 8, "rank": 2},
    "trunk": {"width": 16, "heads": 2, "hidden": 16},
    "stage1": {"steps": 6, "batch_size": 16, "validate_every": 6},
    "stage2": {"steps": 4, "batch_size": 16, "validate_every": 4},
    "diffusion_steps": 10,
    "device": "cpu",
    "threads": 1,
}


def small_run(folder: Path) -> Path:
    """Train in ``folder``; returns the run folder. The recording, in metres, is ``walk.txt`` beside it."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 6, 3)[:, None] + rng.normal(0, 0.05, (3, 240)).cumsum(axis=1)
    xy = (0.4 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)).cumsum(axis=1)
    rows = [f"{10 * t}\t{n}\t{xy[n, t, 0]:.4f}\t{xy[n, t, 1]:.4f}" for t in range(240) for n in range(3)]
    path = folder / "walk.txt"
    path.write_text("\n".join(rows) + "\n")
    return train(resolve("small", SMALL, {"files": (path,)}), out=folder / "run").path
