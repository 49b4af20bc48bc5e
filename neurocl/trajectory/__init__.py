"""Trajectory forecasting: codes for futures that adapt to every agent, and a discrete diffusion over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurocl.lazy import lazy_attributes

if TYPE_CHECKING:
    from neurocl.trajectory.calibration import Calibration
    from neurocl.trajectory.config import TrajectoryConfig, resolve
    from neurocl.trajectory.datasets import load_scenes
    from neurocl.trajectory.evaluation import Evaluation, evaluate
    from neurocl.trajectory.export import export_forecaster
    from neurocl.trajectory.fields import field
    from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
    from neurocl.trajectory.plots import (
        animate_forecast,
        draw_forecast,
        forecast_figure,
    )
    from neurocl.trajectory.plots_canvas import save_figure
    from neurocl.trajectory.plots_density import density_figure
    from neurocl.trajectory.plots_model import (
        code_use,
        code_use_figure,
        codebook_figure,
        codebook_view,
        horizon_figure,
        learning_figure,
        measure_horizons,
    )
    from neurocl.trajectory.readers import read_recordings, read_tracks
    from neurocl.trajectory.runner import Runner
    from neurocl.trajectory.scenes import Forecast, Scenes, TrackSet
    from neurocl.trajectory.streaming import Streamer
    from neurocl.trajectory.training import resume, train
    from neurocl.trajectory.writers import write_forecast, write_tracks

_HOMES = {
    "Calibration": "calibration",
    "Evaluation": "evaluation",
    "Forecast": "scenes",
    "Forecaster": "forecaster",
    "Runner": "runner",
    "SamplingConfig": "forecaster",
    "Scenes": "scenes",
    "Streamer": "streaming",
    "TrackSet": "scenes",
    "TrajectoryConfig": "config",
    "animate_forecast": "plots",
    "code_use": "plots_model",
    "code_use_figure": "plots_model",
    "codebook_figure": "plots_model",
    "codebook_view": "plots_model",
    "density_figure": "plots_density",
    "draw_forecast": "plots",
    "evaluate": "evaluation",
    "export_forecaster": "export",
    "field": "fields",
    "forecast_figure": "plots",
    "horizon_figure": "plots_model",
    "learning_figure": "plots_model",
    "load_scenes": "datasets",
    "measure_horizons": "plots_model",
    "read_recordings": "readers",
    "read_tracks": "readers",
    "resolve": "config",
    "resume": "training",
    "save_figure": "plots_canvas",
    "train": "training",
    "write_forecast": "writers",
    "write_tracks": "writers",
}

__all__ = [
    "Calibration",
    "Evaluation",
    "Forecast",
    "Forecaster",
    "Runner",
    "SamplingConfig",
    "Scenes",
    "Streamer",
    "TrackSet",
    "TrajectoryConfig",
    "animate_forecast",
    "code_use",
    "code_use_figure",
    "codebook_figure",
    "codebook_view",
    "density_figure",
    "draw_forecast",
    "evaluate",
    "export_forecaster",
    "field",
    "forecast_figure",
    "horizon_figure",
    "learning_figure",
    "load_scenes",
    "measure_horizons",
    "read_recordings",
    "read_tracks",
    "resolve",
    "resume",
    "save_figure",
    "train",
    "write_forecast",
    "write_tracks",
]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
