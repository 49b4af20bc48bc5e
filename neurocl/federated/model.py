"""The model of a federated run, to predict with: out of the run's folder, or out of one that was taken away from it.

``B`` batch, ``C`` classes of all tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from neurocl.config import Config, validate
from neurocl.errors import NeuroclError, UserError
from neurocl.federated.blueprint import network_of
from neurocl.federated.catalog import FEDERATED, method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import load_federated_config
from neurocl.federated.local_training import EVALUATION_BATCH
from neurocl.federated.method import FederatedMethod, Predictor, Samples, Task
from neurocl.federated.network import Classifier, evaluating
from neurocl.federated.payload import Payload
from neurocl.federated.pilora import NearestPrototype
from neurocl.federated.problem import Problem, Source
from neurocl.runs import RunFolder, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
START, STATE = "start.", "state."


class Description(Config):
    """What a model that was taken away says of itself.

    Attributes:
        format: of the folder.
        neurocl: version that wrote it.
        form: ``network``, a plain classifier, or ``state``: the network that everybody started from and what the method
            learnt, from which the method makes its model again.
        dataset, method: of the run.
        model: whether the run was over, or how far it was.
        accuracy: final average accuracy in per cent, where the run was over.
        class_names: C names, in the order of the scores.
        seen: that many of the first classes were learnt; scores of the others mean nothing.
        tasks: number of classes of each.
        task: whose turn it was last, from 0.
        inputs: what a sample is.
        sample_shape: its shape; of pictures height and width may differ where ``inputs`` says so.
        blueprint: how the network is built; empty where only the owner's function can.
        head: a linear layer, or prototypes that are compared by distance.
        lora_places: of the source.
        options: of the method.
        seed: of the run, where the method draws from it what the model needs.
        meta: of the state.
        privacy: the guarantee of the run, if there is one.
    """

    format: Literal["neurocl-federated-1"] = "neurocl-federated-1"
    neurocl: str
    form: Literal["network", "state"]
    dataset: str
    method: str
    model: str
    accuracy: float | None = None
    class_names: tuple[str, ...]
    seen: Annotated[int, Field(ge=1)]
    tasks: tuple[Annotated[int, Field(ge=1)], ...]
    task: int
    inputs: str
    sample_shape: tuple[Annotated[int, Field(ge=1)], ...]
    blueprint: dict[str, Any]
    head: Literal["linear", "nearest-prototype"] = "linear"
    lora_places: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0)] | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    privacy: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class FederatedModel:
    """A model that learns no more: call it with samples [B, ...] for scores [B, C] on the CPU.

    Attributes:
        predict: from samples to scores, in one go and on the model's device.
        network: the same as a module in eval mode, where the method ends as a plain network; else None.
        class_names: C names.
        seen: that many of the first classes were learnt.
        inputs: what a sample is.
    """

    predict: Predictor
    network: Classifier | None
    class_names: tuple[str, ...]
    seen: int
    inputs: str

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        found = [self.predict(rows).cpu() for rows in x.split(EVALUATION_BATCH)]
        return torch.cat(found) if found else torch.zeros(0, len(self.class_names))

    def classes(self, x: Tensor) -> Tensor:
        """Numbers [B] of the classes with the highest scores, among those that were learnt."""
        return self(x)[:, : self.seen].argmax(dim=1)


@dataclass(frozen=True, eq=False)
class Saved:
    """A run as its last checkpoint left it.

    Attributes:
        path: of the run.
        problem, method, state: as they were.
        task: the last one that was worked on.
        finished: everything is over.
        where: how far it was, in words.
        result: of a finished run.
    """

    path: Path
    problem: Problem
    method: FederatedMethod
    state: Payload
    task: Task
    finished: bool
    where: str
    result: Mapping[str, Any]


def saved_run(path: Path, device: str = "cpu") -> Saved:
    """Read a run.

    Raises:
        UserError: no federated run, one without a checkpoint or with a damaged one, one whose method leaves every
            client with a model of its own, or data that are not there.
    """
    folder = RunFolder.open(path)
    config = load_federated_config(folder)
    if FEDERATED.load(config.method).personal:
        raise UserError(f"{path}: with {config.method} every client has a model of its own, there is none to take away")
    if not folder.has_checkpoint():
        raise UserError(f"{path} has no model yet: its first round is not over; go on with --resume {path}")
    checkpoint = folder.load_checkpoint()
    problem = problem_for(config.model_copy(update={"device": device}))
    method = method_for(problem)
    state = Payload({name: value.numpy() for name, value in checkpoint.tensors.items()}, checkpoint.state["meta"])
    step = int(checkpoint.state["progress"]["step"])
    total = 0
    for task in problem.tasks:
        rounds = sum(phase.rounds for phase in method.phases(task))
        total += rounds
        if step <= total:
            break
    done, finished = step - (total - rounds), folder.has_result()
    where = f"after exchange {done} of {rounds} of task {task.index + 1} of {len(problem.tasks)}"
    result = folder.read_result() if finished else {}
    return Saved(path, problem, method, state, task, finished, "finished" if finished else where, result)


def load_model(
    path: Path | str, *, network: Callable[[], Classifier] | None = None, device: str = "cpu"
) -> FederatedModel:
    """The server's model of a run, to predict with.

    Args:
        path: folder of the run, finished or not, or one that :func:`~neurocl.federated.export.export_model` wrote with
            ``to="model"``, which needs no data.
        network: builds the network of a data set of one's own, with any weights: what its ``Source`` has as ``build``.
            No code is ever loaded because a model names it.
        device: where to compute.

    Raises:
        UserError: neither a run nor such a folder, a damaged file, or a network that is not given or does not fit.
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        return model_of(saved_run(path, device))
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise UserError(f"{path} is neither a federated run nor a model taken from one ({CONFIG}, {WEIGHTS})")
    found = validate(Description, _values(path / CONFIG), source=str(path / CONFIG))
    try:
        tensors = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{path / WEIGHTS}: not a safetensors file, or a damaged one ({error})") from None
    try:
        return _rebuilt(path, found, tensors, network, device)
    except NeuroclError:
        raise
    except Exception as error:  # who wrote the folder is unknown: whatever does not fit shows up somewhere
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: no model can be made of it ({type(error).__name__}: {told})") from error


def model_of(saved: Saved) -> FederatedModel:
    """The model of a run."""
    source = saved.problem.source
    network = saved.method.folded(saved.state, saved.task)
    return FederatedModel(
        saved.method.predictor(saved.state, saved.task),
        network.eval() if network is not None else None,
        source.class_names,
        saved.task.classes.stop,
        source.inputs,
    )


def _values(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or "format" not in found:
        raise UserError(f"{path} describes no model of a federated run")
    return found


def _rebuilt(
    path: Path,
    found: Description,
    tensors: Mapping[str, Tensor],
    network: Callable[[], Classifier] | None,
    device: str,
) -> FederatedModel:
    if not 0 <= found.task < len(found.tasks):
        raise UserError(f"{path / CONFIG}: there is no task {found.task}")
    _check_sizes(path, found, tensors)
    if found.blueprint:
        empty = network_of(found.blueprint, len(found.class_names))
    elif network is not None:
        empty = network()
    else:
        raise UserError(
            f"{path}: its network is its owner's: load_model(folder, network=...) with the function that builds it"
        )
    if found.form == "network":
        if found.head == "nearest-prototype":
            empty.register_module("head", NearestPrototype(torch.zeros(len(found.class_names), empty.head.in_features)))
        _fill(path, empty, tensors)
        whole = empty.to(device).eval()
        return FederatedModel(network_predictor(whole, device), whole, found.class_names, found.seen, found.inputs)
    _fill(path, empty, {name.removeprefix(START): value for name, value in tensors.items() if name.startswith(START)})
    nothing = Samples(torch.zeros(0, *found.sample_shape), torch.zeros(0, dtype=torch.int64))
    source = Source(
        found.dataset,
        nothing,
        nothing,
        found.class_names,
        lambda: copy.deepcopy(empty),
        lora_places=found.lora_places,
        blueprint=found.blueprint,
        inputs=found.inputs,
    )
    config = FederatedConfig(
        dataset=found.dataset,
        method=found.method,
        options=found.options,
        classes_per_task=found.tasks,
        seed=found.seed or 0,
        device=device,
    )
    problem = problem_for(config, source)
    arrays = {name.removeprefix(STATE): value.numpy() for name, value in tensors.items() if name.startswith(STATE)}
    try:
        predict = method_for(problem).predictor(Payload(arrays, found.meta), problem.tasks[found.task])
    except KeyError as error:
        raise UserError(f"{path / WEIGHTS}: {error} of method {found.method} is missing") from None
    return FederatedModel(predict, None, found.class_names, found.seen, found.inputs)


def network_predictor(network: Classifier, device: str) -> Predictor:
    """Scores of a network in eval mode without gradients."""

    def predict(x: Tensor) -> Tensor:
        with evaluating(network):
            scores: Tensor = network(x.to(device))
        return scores

    return predict


def _check_sizes(path: Path, found: Description, tensors: Mapping[str, Tensor]) -> None:
    """That the weights are those of the described network, before any memory is taken for it.

    Raises:
        UserError: they are not.
    """
    start = "" if found.form == "network" else START
    rows = {tensors[name].shape[0] for name in (f"{start}head.weight", f"{start}head.prototypes") if name in tensors}
    if rows != {len(found.class_names)} or found.seen > len(found.class_names):
        raise UserError(f"{path}: {len(found.class_names)} class names, {found.seen} learnt, do not fit its head")
    if not found.blueprint:
        return
    layers = found.blueprint.get("model", {}).get("num_hidden_layers", 0)
    if not 0 <= layers <= len(tensors):
        raise UserError(f"{path / CONFIG}: {layers} layers do not fit {len(tensors)} arrays")
    with torch.device("meta"):
        plan = network_of(found.blueprint, len(found.class_names)).backbone.state_dict()
    for name, value in plan.items():
        given = tensors.get(f"{start}backbone.{name}")
        if given is None or given.shape != value.shape:
            raise UserError(f"{path / WEIGHTS} does not fit the network: backbone.{name}")


def _fill(path: Path, network: Classifier, tensors: Mapping[str, Tensor]) -> None:
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(f"{path / WEIGHTS} does not fit the network: {' '.join(str(error).split())[:200]}") from None
