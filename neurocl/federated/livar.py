"""LIVAR: LoRA factors weighted by how training moved them, the head's rows by how varied the client's features are.

``K`` clients, ``L`` adapted layers, ``C`` classes of the task, ``d`` features, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurocl.federated.local_training import class_statistics, features_of
from neurocl.federated.lora import FACTOR_A, FACTOR_B, HEAD, Form, Lora, LoraConfig, layers_of
from neurocl.federated.method import Client, Place, Reply, Task, mean_arrays, weighted_sum
from neurocl.federated.network import Classifier, parameters_of
from neurocl.federated.payload import Payload, arrays_of, tensors

Floats = NDArray[np.float64]

IMPORTANCE = {FACTOR_A: "importance_a", FACTOR_B: "importance_b"}
EVIDENCE, DELTA = "evidence", "delta."

QUANTILES_A, QUANTILES_B = (0.25, 0.5), (0.6, 0.8)
# Rows: importance of B below, between and above its quantiles; columns: of A. The paper's SHAP analysis, all digits.
TABLE = np.array(
    [
        [0.03813978, 0.03813978, 0.03813978],
        [0.09813978, 0.08813978, 0.07813978],
        [0.19313978, 0.11813978, 0.09313978],
    ]
)
# Share of the squared mean below which a variance says nothing.
SMALLEST_VARIANCE = 1e-12


class LivarConfig(LoraConfig):
    """Of LIVAR.

    Attributes:
        weights: clients count by their samples or all the same, where the evaluated product is weighted so.
        train: the adapters and the head; there is nothing else.
        backbone_lr: learning rate of the adapters as a share of the head's.
        rank: r.
        previous: what becomes of the modules of earlier tasks; the paper has one task only.
        eval_delta: what is tested: the mean of the clients' products weighted by importance, or by samples as in the
            published code, or the product of the merged factors, from which the clients go on in any case.
        importance: the sum over updates of abs(gradient x change), or of abs(sum of the gradient).
        reset: importances add up over the whole run, or begin anew in every round.
        features: of which network the variances are; the published code takes the one without adapters.
        single: a class of which nobody has two different samples is weighted by counts, or keeps its row.
    """

    eval_delta: Literal["importance_product", "sample_product", "factor"] = "importance_product"
    importance: Literal["path", "gradient"] = "path"
    reset: Literal["never", "round"] = "never"
    features: Literal["adapted", "frozen"] = "adapted"
    single: Literal["count", "keep"] = "count"


class Livar(Lora):
    """Weight each layer's LoRA factors by their importances, and each class's row of the head by feature variance.

    Variance alone decides on a row: a client with two samples that lie far apart outweighs one with hundreds. Meant
    for one task; later ones are handled as in ``lora``.

    Reference: Fiorini, Mosconi, Buzzega, Salami and Calderara, "Intrinsic training signals for federated learning
    aggregation", ICIAP 2025, arXiv 2507.06813.
    """

    Config = LivarConfig
    config: LivarConfig
    sum_only = False
    reveals = "the client's factors and head, how far each layer moved, its classes and how varied their features are"

    def initial_state(self) -> Payload:
        return self._without_delta(super().initial_state())

    def begin_task(self, state: Payload, task: Task) -> Payload:
        return state if task.index == 0 else self._without_delta(super().begin_task(state, task))

    def _without_delta(self, state: Payload) -> Payload:
        if self.config.eval_delta == "factor":
            return state
        zeros = {DELTA + layer: torch.zeros_like(module).float() for layer, module in super().module(state).items()}
        return Payload({**state.arrays, **arrays_of(zeros)}, state.meta)

    def module(self, state: Payload) -> dict[str, Tensor]:
        if self.config.eval_delta == "factor":
            return super().module(state)
        return {layer: delta.double() for layer, delta in tensors(state, DELTA).items()}

    def after_step(
        self, network: Classifier, client: Client, place: Place, message: Payload
    ) -> Callable[[], None] | None:
        layers = layers_of(message)
        for name in IMPORTANCE.values():
            kept = client.store.get(name)
            start = kept.copy() if kept is not None and self.config.reset == "never" else np.zeros(len(layers))
            client.store[name] = start
        own = parameters_of(network, [layer + factor for layer in layers for factor in IMPORTANCE])
        gradients: dict[str, Tensor] = {}
        before: dict[str, Tensor] = {}

        def remember(name: str) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                # Before the gradient is clipped and the parameter moves.
                assert parameter.grad is not None
                gradients[name] = parameter.grad.detach().clone()
                before[name] = parameter.detach().clone()

            return hook

        for name, parameter in own.items():
            parameter.register_post_accumulate_grad_hook(remember(name))

        def add() -> None:
            for factor, key in IMPORTANCE.items():
                for index, layer in enumerate(layers):
                    name = layer + factor
                    moved = before[name] - own[name].detach() if self.config.importance == "path" else None
                    client.store[key][index] += step_importance(gradients[name], moved)

        return add

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        answer = super().reply(network, client, place, message)
        measured: dict[str, NDArray[Any]] = {
            name: client.store[name].astype(np.float32) for name in IMPORTANCE.values()
        }
        seen = network if self.config.features == "adapted" else self.problem.network()
        features = features_of(seen, client.data, client.device)
        measured[EVIDENCE] = evidence(features, client.data.y, place.task).astype(np.float32)
        return Payload({**answer.arrays, **measured}, answer.meta)

    def wanted(self, state: Payload, place: Place) -> dict[str, Form]:
        count = (len(layers_of(state)),)
        measured: dict[str, Form] = {name: (count, "float32") for name in IMPORTANCE.values()}
        measured[EVIDENCE] = ((len(place.task.classes),), "float32")
        return super().wanted(state, place) | measured

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        reason = super().objection(state, place, reply)
        if reason:
            return reason
        negative = [name for name in IMPORTANCE.values() if reply.arrays[name].min(initial=0) < 0]
        return f"{negative[0]} has negative entries" if negative else ""

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        importance = [np.stack([reply.payload.arrays[name] for reply in replies]) for name in IMPORTANCE.values()]
        weights = layer_weights(*importance)
        samples = self.weights(replies)
        arrays = dict(state.arrays)
        for index, layer in enumerate(layers_of(state)):
            trust = weights[:, index]
            arrays |= mean_arrays(replies, [layer + FACTOR_A, layer + FACTOR_B], trust)
            if self.config.eval_delta != "factor":
                products = [
                    reply.payload.arrays[layer + FACTOR_B].astype(np.float64) @ reply.payload.arrays[layer + FACTOR_A]
                    for reply in replies
                ]
                chosen = trust if self.config.eval_delta == "importance_product" else samples
                arrays[DELTA + layer] = weighted_sum(products, chosen).astype(np.float32)
        said = np.stack([reply.payload.arrays[EVIDENCE] for reply in replies])
        rows = row_weights(said, counts=self.config.single == "count")
        for name in HEAD:
            head = state.arrays[name].copy()
            for column, number in enumerate(place.task.classes):
                if rows[:, column].any():
                    head[number] = weighted_sum(
                        [reply.payload.arrays[name][number] for reply in replies], rows[:, column]
                    )
            arrays[name] = head
        return Payload(arrays, state.meta)


def step_importance(gradient: Tensor, moved: Tensor | None) -> float:
    """abs(sum of gradient x (before - after)) of one parameter and update; of the gradient alone without ``moved``.

    Entries of the gradient that are not finite count as zero.
    """
    gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    return float((gradient if moved is None else gradient * moved).double().sum().abs())


def layer_weights(importance_a: NDArray[Any], importance_b: NDArray[Any]) -> Floats:
    """Weights of clients [K, L], columns adding up to 1, from importances [K, L] of their factors.

    The quantiles are over all clients and layers, linearly interpolated.
    """
    a, b = importance_a.astype(np.float64), importance_b.astype(np.float64)
    low_a, high_a = np.quantile(a, QUANTILES_A)
    low_b, high_b = np.quantile(b, QUANTILES_B)
    values = TABLE[(b >= low_b).astype(int) + (b > high_b), (a >= low_a).astype(int) + (a > high_a)]
    found: Floats = values / values.sum(axis=0)
    return found


def evidence(features: Tensor, labels: Tensor, task: Task) -> Floats:
    """What a client has of every class of a task, [C]: the mean over features of their unbiased variance.

    Where that is zero (one sample, or duplicates) it is minus the number of samples; 0 without any.
    """
    found = class_statistics(features, labels)
    spread = found.variances.mean(dim=1)
    # Features are float32: less than this is the rounding of duplicates.
    varied = spread > SMALLEST_VARIANCE * found.means.square().mean(dim=1)
    values = np.zeros(len(task.classes))
    values[found.classes.numpy() - task.classes.start] = torch.where(varied, spread, -found.counts).numpy()
    return values


def row_weights(said: NDArray[Any], *, counts: bool) -> Floats:
    """Weights of clients in the rows of the head, [K, C]: shares of the variances in their evidence [K, C].

    Args:
        said: see :func:`evidence`.
        counts: where nobody has a variance, shares of the counts; else such a column is zero.
    """
    variances = np.clip(said, 0, None).astype(np.float64)
    numbers = np.clip(-said, 0, None).astype(np.float64) if counts else np.zeros_like(variances)
    chosen = np.where(variances.any(axis=0), variances, numbers)
    total = chosen.sum(axis=0)
    found: Floats = np.divide(chosen, total, out=np.zeros_like(chosen), where=total > 0)
    return found
