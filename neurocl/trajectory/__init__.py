"""Trajectory forecasting: codes for futures that adapt to every agent, and a discrete diffusion over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurocl.lazy import lazy_attributes

if TYPE_CHECKING:
    from neurocl.trajectory.config import TrajectoryConfig, resolve
    from neurocl.trajectory.datasets import load_scenes
    from neurocl.trajectory.evaluation import evaluate
    from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
    from neurocl.trajectory.plots import animate_forecast, draw_forecast
    from neurocl.trajectory.readers import read_recordings, read_tracks
    from neurocl.trajectory.scenes import Forecast, Scenes, TrackSet
    from neurocl.trajectory.training import resume, train
    from neurocl.trajectory.writers import write_forecast, write_tracks

_HOMES = {
    "Forecast": "scenes",
    "Forecaster": "forecaster",
    "SamplingConfig": "forecaster",
    "Scenes": "scenes",
    "TrackSet": "scenes",
    "TrajectoryConfig": "config",
    "animate_forecast": "plots",
    "draw_forecast": "plots",
    "evaluate": "evaluation",
    "load_scenes": "datasets",
    "read_recordings": "readers",
    "read_tracks": "readers",
    "resolve": "config",
    "resume": "training",
    "train": "training",
    "write_forecast": "writers",
    "write_tracks": "writers",
}

__all__ = [
    "Forecast",
    "Forecaster",
    "SamplingConfig",
    "Scenes",
    "TrackSet",
    "TrajectoryConfig",
    "animate_forecast",
    "draw_forecast",
    "evaluate",
    "load_scenes",
    "read_recordings",
    "read_tracks",
    "resolve",
    "resume",
    "train",
    "write_forecast",
    "write_tracks",
]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
