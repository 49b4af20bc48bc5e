"""From a configuration to what it stands for: starting values, the stream, the network, the method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from neurocl import config as configuration
from neurocl.backbones.catalog import BACKBONES
from neurocl.continual.catalog import AREAS, METHODS
from neurocl.continual.config import TrainConfig
from neurocl.continual.method import Method, Setting
from neurocl.continual.optimizer import build_optimizer
from neurocl.continual.presets import starting_values
from neurocl.continual.scenario import Scenario, class_permutation
from neurocl.data.augment import Augment
from neurocl.data.catalog import load_benchmark, load_dataset
from neurocl.devices import Runtime, generator_for, seed_everything
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

AUGMENT_STREAM = 2
WHOLE_SERIES_ONLY = ("er-ace", "lwf", "icarl")


def config_class(area: str) -> type[TrainConfig]:
    """The configuration class of a command group.

    Raises:
        UserError: no such area.
    """
    found: type[TrainConfig] = AREAS.load(area)
    return found


def resolve(area: str = "continual", *layers: Mapping[str, Any]) -> TrainConfig:
    """Merge ``layers`` (the last wins) over the starting values of their benchmark and method.

    Raises:
        UserError: an unknown key or name, or a value out of range.
    """
    model = config_class(area)
    given = configuration.merged({"area": area}, *layers)
    if given["area"] != area:
        raise UserError(f"the configuration is for `neurocl {given['area']} train`, not for `neurocl {area} train`")
    fields = model.model_fields
    method = str(given.get("method", fields["method"].default))
    dataset = str(given.get("dataset", fields["dataset"].default))
    METHODS.entry(method, area)
    benchmark = load_benchmark(dataset)
    size = given.get("buffer_size", fields["buffer_size"].default)
    start = starting_values(
        area,
        method,
        dataset,
        size if isinstance(size, int) and size > 0 else 200,
        epochs=benchmark.epochs,
        batch_size=benchmark.batch_size,
        augment=benchmark.augment,
    )
    if "batch_size" in given and "replay_batch" not in given:
        start.pop("replay_batch")
        given["replay_batch"] = given["batch_size"]
    if "schedule" in given:
        start.pop("milestones", None)
    config = configuration.validate(model, configuration.merged(start, given))
    if config.per_step_loss and config.method in WHOLE_SERIES_ONLY:
        raise UserError(f"temporal_separation has no meaning for {config.method}, whose loss needs averaged logits")
    method_class = METHODS.load(config.method, area)
    configuration.validate(method_class.Config, config.options, source=f"options of {config.method}")
    BACKBONES.entry(config.backbone, area)
    return config


def build_scenario(config: TrainConfig) -> Scenario:
    """The stream that ``config`` describes.

    Raises:
        UserError: the data set is absent or broken, or sizes and orders do not fit it.
    """
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise UserError(f"data_dir {config.data_dir} is not a folder")
    benchmark = load_benchmark(config.dataset)
    dataset = load_dataset(config.dataset, data_dir=config.data_dir, timesteps=config.frames or 1)
    if dataset.is_events and config.frames is None:
        # ordinary networks see one picture per recording: the event counts of its whole length
        dataset = replace(dataset, train_images=dataset.train_images[:, 0], test_images=dataset.test_images[:, 0])
    order = config.class_order
    if config.permute_classes:
        old_to_new = class_permutation(len(dataset.class_names), config.seed)
        order = tuple(int(old) for old in np.argsort(old_to_new))
    return Scenario(
        dataset,
        config.task_sizes or benchmark.task_sizes,
        class_order=order,
        val_fraction=config.val_fraction,
        seed=config.seed,
        max_train_per_class=config.max_train_per_class,
        max_test_per_class=config.max_test_per_class,
    )


def build_network(config: TrainConfig, scenario: Scenario) -> nn.Module:
    """The backbone that ``config`` names, freshly initialised from torch's global generator.

    Raises:
        UserError: the backbone does not know one of ``backbone_options``.
    """
    factory: Callable[..., nn.Module] = BACKBONES.load(config.backbone, config.area)
    arguments = config.network_arguments()
    known = [name for name in inspect.signature(factory).parameters if name not in ("input_shape", "num_classes")]
    for name in arguments:
        if name not in known:
            raise UserError(
                f"backbone {config.backbone} has no option {name!r}{did_you_mean(name, known)} "
                f"(it has {', '.join(known) or 'none'})"
            )
    try:
        return factory(scenario.input_shape, scenario.num_classes, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"backbone_options of {config.backbone}: {error}") from None


def build_method(config: TrainConfig, scenario: Scenario, runtime: Runtime) -> Method:
    """Network and method on the run's device, seeded."""
    if config.augment == "strong" and scenario.input_shape[-3] not in (1, 3):
        raise UserError("augment strong changes colours, which event frames do not have; use none or crop-flip")
    seed_everything(config.seed)
    benchmark = load_benchmark(config.dataset)
    network = build_network(config, scenario)
    setting = Setting(
        task_sizes=scenario.task_sizes,
        input_shape=scenario.input_shape,
        augment=Augment(config.augment, benchmark.mean, benchmark.std),
        buffer_size=config.buffer_size,
        batch_size=config.batch_size,
        replay_batch=config.replay_batch,
        epochs=config.epochs,
        per_step_loss=config.per_step_loss,
        make_optimizer=partial(build_optimizer, config.optimizer),
        augment_generator=generator_for(config.seed, AUGMENT_STREAM),
        seed=config.seed,
    )
    method_class: type[Method] = METHODS.load(config.method, config.area)
    options = configuration.validate(method_class.Config, config.options, source=f"options of {config.method}")
    method = method_class(network, setting, options)
    return method.to(runtime.device)
