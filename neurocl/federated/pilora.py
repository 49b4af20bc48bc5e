"""PILoRA: one small LoRA per task, kept orthogonal to the earlier ones, and classes as trained prototypes.

``K`` clients, ``T`` tasks, ``C`` classes, ``c`` those of a task, ``d`` features; ``o`` outputs, ``i`` inputs and ``r``
rank of an adapted part of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from neurocl.backbones.vit import VisionTransformer
from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import (
    EVALUATION_BATCH,
    Loss,
    class_statistics,
    features_of,
    make_optimizer,
    train,
)
from neurocl.federated.lora import Form, misfit
from neurocl.federated.method import Client, Place, Predictor, Reply, Task, weighted_sum
from neurocl.federated.network import Classifier, evaluating, linear_layers
from neurocl.federated.payload import Payload, arrays_of, tensors
from neurocl.federated.randomness import torch_stream

PROTOTYPES, MEANS, COUNTS = "prototypes", "means", "counts"
START = 0.1  # standard deviation of prototypes before they learn


class PiLoraConfig(FedAvgConfig):
    """Of PILoRA.

    Attributes:
        weights: of the clients in the average of the LoRA factors.
        train: the LoRA of the task and the prototypes of its classes; there is nothing else.
        backbone_lr: learning rate of the LoRA as a share of the prototypes', which learn fast.
        lr: of the prototypes where the run sets none.
        rank: r.
        temperature: of the distances.
        pull: weight of the distance to a sample's own prototype.
        orthogonal: weight of the products with the factors A of earlier tasks.
        sparse: weight of the absolute values of A.
        sharpness: of the weights that clients' prototypes get.
    """

    train: Literal["all"] = "all"
    backbone_lr: Annotated[float, Field(gt=0)] = 0.005
    lr: Annotated[float, Field(gt=0)] = 0.02
    rank: Annotated[int, Field(ge=1)] = 4
    temperature: Annotated[float, Field(gt=0)] = 1.0
    pull: Annotated[float, Field(ge=0)] = 0.001
    orthogonal: Annotated[float, Field(ge=0)] = 0.5
    sparse: Annotated[float, Field(ge=0)] = 0.01
    sharpness: Annotated[float, Field(ge=0)] = 5.0


class IncrementalLora(nn.Module):
    """A frozen linear layer plus the sum over tasks of B A, on some of its rows.

    Args:
        layer: that is adapted.
        parts: rows of its weight by name.
        tasks: T.
        rank: r.

    ``<part>_A`` is [T, r, i], ``<part>_B`` [T, o, r]; only those of task ``seen - 1`` learn, later ones do not count.
    """

    def __init__(self, layer: nn.Linear, parts: Mapping[str, slice], tasks: int, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.rows = dict(parts)
        self.seen = 1
        for name, rows in parts.items():
            size = len(range(*rows.indices(layer.out_features)))
            setattr(self, f"{name}_A", nn.Parameter(torch.zeros(tasks, rank, layer.in_features)))
            setattr(self, f"{name}_B", nn.Parameter(torch.zeros(tasks, size, rank)))

    def factors(self, part: str) -> tuple[Tensor, Tensor]:
        """A and B of a part, all tasks."""
        return getattr(self, f"{part}_A"), getattr(self, f"{part}_B")

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.clone()
        for part, rows in self.rows.items():
            factors_a, factors_b = self.factors(part)
            before = (factors_b[: self.seen - 1].detach() @ factors_a[: self.seen - 1].detach()).sum(dim=0)
            weight[rows] = weight[rows] + before + factors_b[self.seen - 1] @ factors_a[self.seen - 1]
        return F.linear(x, weight, self.layer.bias)

    def overlap(self) -> Tensor:
        """Sum of the absolute products of this task's rows of A with those of earlier tasks."""
        total = self.layer.weight.new_zeros(())
        for part in self.rows:
            factors_a, _ = self.factors(part)
            earlier = factors_a[: self.seen - 1].detach().flatten(0, 1)
            total = total + (factors_a[self.seen - 1] @ earlier.mT).abs().sum()
        return total

    def size(self) -> Tensor:
        """Sum of the absolute numbers in this task's A."""
        return torch.stack([self.factors(part)[0][self.seen - 1].abs().sum() for part in self.rows]).sum()


class NearestPrototype(nn.Module):
    """A head whose scores are minus the distances of :func:`mean_distances` to prototypes [C, d]."""

    def __init__(self, prototypes: Tensor) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(prototypes)

    def forward(self, features: Tensor) -> Tensor:
        return -mean_distances(features, self.prototypes)


class PiLora(FedAvg):
    """Average the LoRA of the task; weigh clients' prototypes by how near they are to the class means of all.

    The LoRA is on queries and values of a transformer's first block, or on a perceptron's first layer. A sample's class
    is that of the nearest prototype. Unlike in the public code, prototypes of classes that have not come yet take no
    part in training.

    Reference: Guo et al., "PILoRA: prototype guided incremental LoRA for federated class-incremental learning", ECCV
    2024, arXiv 2401.02094.
    """

    Config = PiLoraConfig
    config: PiLoraConfig
    sum_only = False
    reveals = "the client's LoRA and prototypes, and for each class how many samples it has and their mean feature"

    def network(self) -> Classifier:
        network: Classifier = self.problem.network()
        network.requires_grad_(False)
        name, parts = _place(network)
        parent, _, own = name.rpartition(".")
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        adapted = IncrementalLora(layer, parts, len(self.problem.tasks), self.config.rank)
        setattr(network.get_submodule(parent), own, adapted)
        return network.to(self.problem.config.device)

    def initial_state(self) -> Payload:
        network = self.network()
        factors = {name: value.detach() for name, value in _adapted(network).named_parameters(recurse=False)}
        seed = self.problem.config.seed
        for task in range(len(self.problem.tasks)):
            generator = torch_stream(seed, "server adapters", task)
            for part in _adapted(network).rows:
                bound = factors[f"{part}_A"].shape[2] ** -0.5
                factors[f"{part}_A"][task].uniform_(-bound, bound, generator=generator)
        prototypes = torch.randn(
            self.problem.num_classes, self.problem.num_features, generator=torch_stream(seed, "server prototypes", 0)
        )
        return Payload(arrays_of({**factors, PROTOTYPES: START * prototypes}))

    def with_factors(self, payload: Payload, seen: int) -> Classifier:
        """The network with the LoRAs of the first ``seen`` tasks."""
        network = self.network()
        adapted = _adapted(network)
        adapted.seen = seen
        received = tensors(payload)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters(recurse=False):
                parameter[:seen] = received[name][:seen].to(parameter)
        return network

    def message(self, state: Payload, place: Place) -> Payload:
        """Factors of the tasks and prototypes of the classes so far."""
        seen = place.task.index + 1
        found = {name: array[:seen] for name, array in state.arrays.items() if name != PROTOTYPES}
        return Payload({**found, PROTOTYPES: state.arrays[PROTOTYPES][: place.task.classes.stop]})

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        if not len(client.data):
            return Payload(meta={"n": 0})
        config, index, classes = self.problem.config, place.task.index, place.task.classes
        network, received = self.with_factors(message, index + 1), tensors(message)
        own = dict(_adapted(network).named_parameters(recurse=False))
        earlier = received[PROTOTYPES][: classes.start].to(client.device)
        prototypes = nn.Parameter(received[PROTOTYPES][classes.start :].to(client.device))
        rate = self.config.lr if config.lr is None else config.lr
        groups = [
            {"params": list(own.values()), "lr": rate * self.config.backbone_lr},
            {"params": [prototypes], "lr": rate},
        ]
        network.train()
        train(
            self._loss(network, earlier, prototypes),
            make_optimizer("adam", groups, rate, config.weight_decay),
            client,
            place,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            clip=config.clip,
        )
        found = class_statistics(features_of(network, client.data, client.device), client.data.y)
        means = torch.zeros(len(classes), self.problem.num_features)
        counts = torch.zeros(len(classes), dtype=torch.int64)
        rows = found.classes - classes.start
        means[rows], counts[rows] = found.means.float(), found.counts
        sent = {name: parameter.detach()[index] for name, parameter in own.items()}
        arrays = arrays_of({**sent, PROTOTYPES: prototypes.detach(), MEANS: means, COUNTS: counts})
        return Payload(arrays, {"n": len(client.data)})

    def _loss(self, network: Classifier, earlier: Tensor, prototypes: Tensor) -> Loss:
        config, adapted = self.config, _adapted(network)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            features = network.features(x)
            distances = mean_distances(features, torch.cat([earlier, prototypes]))
            total = F.cross_entropy(-distances / config.temperature, y)
            total = total + config.pull * distances.gather(1, y[:, None]).mean()
            return total + config.orthogonal * adapted.overlap() + config.sparse * adapted.size()

        return loss

    def _wanted(self, state: Payload, place: Place) -> dict[str, Form]:
        count, size = len(place.task.classes), state.arrays[PROTOTYPES].shape[1]
        found: dict[str, Form] = {
            name: (array.shape[1:], array.dtype.name) for name, array in state.arrays.items() if name != PROTOTYPES
        }
        rows: dict[str, Form] = {name: ((count, size), "float32") for name in (PROTOTYPES, MEANS)}
        return {**found, **rows, COUNTS: ((count,), "int64")}

    def expected(self, state: Payload, place: Place) -> Sequence[str]:
        return list(self._wanted(state, place))

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        reason = misfit(reply, self._wanted(state, place))
        if not reason and reply.arrays[COUNTS].min(initial=0) < 0:
            return f"{COUNTS} holds negative numbers"
        return reason

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        index, classes = place.task.index, place.task.classes
        weights, arrays = self.weights(replies), dict(state.arrays)
        for name in arrays:
            if name != PROTOTYPES:
                arrays[name] = arrays[name].copy()
                arrays[name][index] = weighted_sum([reply.payload.arrays[name] for reply in replies], weights)
        told = [tensors(reply.payload) for reply in replies]
        prototypes = torch.from_numpy(state.arrays[PROTOTYPES].copy())
        for row, number in enumerate(classes):
            means = [own[MEANS][row] for own in told if own[COUNTS][row] > 0]
            if means:
                own = torch.stack([client[PROTOTYPES][row] for client in told])
                prototypes[number] = weighed_prototype(own, torch.stack(means), self.config.sharpness)
        return Payload({**arrays, PROTOTYPES: prototypes.numpy()}, state.meta)

    def change(self, state: Payload, task: int) -> dict[str, Tensor]:
        """What the LoRAs of all tasks up to this one add to the frozen weights, by layer, float64 [o, i]."""
        network: Classifier = self.problem.network()
        name, parts = _place(network)
        found, own = torch.zeros(linear_layers(network)[name].weight.shape, dtype=torch.float64), tensors(state)
        for part, rows in parts.items():
            factors_a, factors_b = (own[f"{part}_{factor}"][: task + 1].double() for factor in "AB")
            found[rows] = (factors_b @ factors_a).sum(dim=0)
        return {name: found}

    def folded(self, state: Payload, task: Task) -> Classifier:
        network: Classifier = self.problem.network()
        layers = linear_layers(network)
        with torch.no_grad():
            for name, change in self.change(state, task.index).items():
                layers[name].weight += change.to(layers[name].weight)
        network.register_module("head", NearestPrototype(torch.from_numpy(state.arrays[PROTOTYPES].copy())))
        return network.to(self.problem.config.device)

    def predictor(self, state: Payload, task: Task) -> Predictor:
        network = self.with_factors(state, task.index + 1)
        device = torch.device(self.problem.config.device)
        prototypes = torch.from_numpy(state.arrays[PROTOTYPES].copy()).to(device)

        def predict(x: Tensor) -> Tensor:
            with evaluating(network):
                found = [network.features(rows.to(device)) for rows in x.split(EVALUATION_BATCH)]
                return -mean_distances(torch.cat(found), prototypes)

        return predict


def mean_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """sqrt(||z - m||^2 / d) of features z [B, d] and prototypes m [C, d]: [B, C]."""
    distances: Tensor = torch.cdist(features, prototypes) / features.shape[1] ** 0.5
    return distances


def weighed_prototype(prototypes: Tensor, means: Tensor, sharpness: float) -> Tensor:
    """One prototype [d] of the clients' [K, d]: heavy are those near to the class means [M, d] of all who have it.

    Weights are a softmax of the inverse sums of distances, stretched to 0..1 and multiplied by ``sharpness``.
    """
    own, others = prototypes.double(), means.double()
    near = 1 / (torch.cdist(own[None], others[None])[0].sum(dim=1) + 1e-10)
    spread = near.max() - near.min()
    stretched = (near - near.min()) / spread if spread > 0 else torch.zeros_like(near)
    merged: Tensor = (stretched * sharpness).softmax(dim=0) @ own
    return merged.to(prototypes.dtype)


def _place(network: Classifier) -> tuple[str, dict[str, slice]]:
    """The layer that gets the LoRA, and its rows."""
    for name, module in network.named_modules():
        if isinstance(module, VisionTransformer):
            width = module.config.width
            return f"{name}.blocks.0.attn.qkv", {"q": slice(0, width), "v": slice(2 * width, 3 * width)}
    first, layer = next(iter(linear_layers(network).items()))
    return first, {"w": slice(0, layer.out_features)}


def _adapted(network: Classifier) -> IncrementalLora:
    return next(module for module in network.modules() if isinstance(module, IncrementalLora))
