"""LoRM: rounds train one LoRA factor while all clients share the other, so that merging is a least-squares problem.

``K`` clients, ``C`` classes, ``d`` features; ``o`` outputs, ``i`` inputs and ``r`` rank of an adapted layer.

A client sends, besides what it trained, the Gram matrix G = X^T X of the inputs of every adapted layer (by default its
diagonal [i]) and of the head [d, d]. The server finds the weights whose responses are nearest to those of all clients
on their own inputs, as a change of what it had: F <- F + [sum_k (F_k - F) H_k] (sum_k H_k)^+, where H = G in an A round
and for the head, and H = A G A^T in a B round. What nobody's inputs reach stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from neurocl.federated.local_training import input_grams
from neurocl.federated.lora import (
    FACTOR_A,
    FACTOR_B,
    HEAD,
    PAST,
    AdapterConfig,
    AdapterMethod,
    Form,
    form,
    layers_of,
    misfit,
    negative_gram,
    own_names,
)
from neurocl.federated.method import Client, Phase, Place, Reply, Samples, Store, Task
from neurocl.federated.network import HEAD_BIAS, HEAD_WEIGHT, Classifier
from neurocl.federated.payload import Payload, arrays_of, tensors
from neurocl.merging.linear_algebra import solve_psd
from neurocl.merging.lorm import RunningTaskMerge, projected
from neurocl.merging.regmean import divided, shrunk

TASK_GRAM = "task-gram"
GRAM, PRODUCT, HEAD_GRAM = "gram.", "product.", "gram.head"
NUMERATOR, DENOMINATOR, TOTAL = "tasks.numerator.", "tasks.gram.", "tasks.total."
SUFFIX = {"a": FACTOR_A, "b": FACTOR_B}


class LormConfig(AdapterConfig):
    """Of LoRM.

    Attributes:
        weights: clients count by their samples in the head's bias, or all the same; everything else is weighted by the
            Gram matrices, where more samples weigh more.
        train: the adapters and the head; there is nothing else.
        backbone_lr: learning rate of the adapters as a share of the head's.
        rank: r.
        lr_a, lr_b: learning rates of the factors where they differ from that.
        train_matrix: the factor that is trained: in turn, beginning with B, or always the same one (for ablations; with
            A alone, B is drawn and A starts at zero).
        gram: send the diagonals of the adapted layers' Gram matrices or all of them.
        alpha: with full ones, the factor on their entries off the diagonal.
        head_alpha: the same for the head's Gram matrix.
        message: clients send their factors, or the products that the server adds up, in float64: the same merge, fit
            for secure summation.
    """

    lr_a: Annotated[float, Field(gt=0)] | None = None
    lr_b: Annotated[float, Field(gt=0)] | None = None
    train_matrix: Literal["alternate", "b", "a"] = "alternate"
    gram: Literal["diag", "full"] = "diag"
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    head_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    message: Literal["factors", "sums"] = "factors"

    @property
    def diagonal(self) -> bool:
        """Only the diagonals of the adapted layers' Gram matrices are known."""
        return self.gram == "diag" or self.alpha == 0


class Lorm(AdapterMethod):
    """Merge factors, heads and the modules of all tasks in closed form by matching responses.

    Every task is trained on the frozen weights alone; the modules of all tasks meet at test time only.

    Reference: Salami, Buzzega, Mosconi et al., "Closed-form merging of parameter-efficient modules for federated
    continual learning", ICLR 2025, arXiv 2410.17961.
    """

    Config = LormConfig
    config: LormConfig
    reveals = "one trained factor, the head, squared sums of every layer's inputs, the features' Gram matrix and n"

    def phases(self, task: Task) -> Sequence[Phase]:
        return (*super().phases(task), Phase(TASK_GRAM, train=False))

    def learning_rate(self, name: str) -> float:
        own = self.config.lr_a if name.endswith(FACTOR_A) else self.config.lr_b if name.endswith(FACTOR_B) else None
        return own if own is not None else super().learning_rate(name)

    def initial_state(self) -> Payload:
        state = super().initial_state()
        arrays = {name: array for name, array in state.arrays.items() if not name.startswith(PAST)}
        for layer in layers_of(state):
            o, i = state.arrays[PAST + layer].shape
            arrays[NUMERATOR + layer] = np.zeros((o, i))
            arrays[TOTAL + layer] = np.zeros((o, i))
            arrays[DENOMINATOR + layer] = np.zeros(i if self.config.diagonal else (i, i))
        return self._begun(Payload(arrays, {"num_tasks": 0}), 0)

    def begin_task(self, state: Payload, task: Task) -> Payload:
        return self._begun(state, task.index)

    def _begun(self, state: Payload, task: int) -> Payload:
        """Fresh factors, no Gram matrices yet, and the factor that is trained first."""
        grams = {GRAM + layer: np.zeros_like(state.arrays[DENOMINATOR + layer]) for layer in layers_of(state)}
        first = "a" if self.config.train_matrix == "a" else "b"
        return Payload({**state.arrays, **self.fresh_factors(state, task), **grams}, {**state.meta, "factor": first})

    def fresh_factors(self, state: Payload, task: int) -> Store:
        found = super().fresh_factors(state, task)
        if self.config.train_matrix != "a":
            return found
        # With B = 0 the gradient of A is zero for ever: the roles of the factors are exchanged.
        generator = self.server_rng("adapters b", task)
        for layer in layers_of(state):
            shape = found[layer + FACTOR_B].shape
            bound = 1 / np.sqrt(shape[1])
            found[layer + FACTOR_B] = generator.uniform(-bound, bound, shape).astype(np.float32)
            found[layer + FACTOR_A] = np.zeros_like(found[layer + FACTOR_A])
        return found

    def message(self, state: Payload, place: Place) -> Payload:
        if place.phase.name == TASK_GRAM:
            return Payload({name: state.arrays[name] for name in own_names(state) if name not in HEAD})
        return Payload(super().message(state, place).arrays, {"factor": state.meta["factor"]})

    def loaded(self, payload: Payload) -> Classifier:
        network = super().loaded(payload)
        trained = SUFFIX[str(payload.meta["factor"])] if "factor" in payload.meta else ""
        for name, parameter in network.named_parameters():
            if name.endswith((FACTOR_A, FACTOR_B)):
                parameter.requires_grad_(bool(trained) and name.endswith(trained))
        return network

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        if place.phase.name != TASK_GRAM or not len(client.data):
            return super().client(client, place, message)
        grams = self._grams(self.loaded(message), layers_of(message), client.data)
        return Payload(grams, {"n": len(client.data)})

    def _grams(self, network: Classifier, layers: Sequence[str], samples: Samples) -> Store:
        places = {f"{layer}.layer": layer for layer in layers}
        diagonal = list(places) if self.config.diagonal else []
        found = input_grams(network, places, samples, diagonal=diagonal, device=self.problem.config.device)
        return arrays_of({places[name]: less(gram, self.config.alpha).float() for name, gram in found.items()}, GRAM)

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        answer = super().reply(network, client, place, message)
        grams = self._grams(network, layers_of(message), client.data)
        head = input_grams(network, ["head"], client.data, device=client.device)["head"]
        grams |= arrays_of({HEAD_GRAM: less(head, self.config.head_alpha).float()})
        full = Payload({**answer.arrays, **grams}, answer.meta)
        if self.config.message == "factors":
            return full
        products = self._products(message, full, str(message.meta["factor"]))
        return Payload({**arrays_of(products), **grams}, answer.meta)

    def _products(self, before: Payload, reply: Payload, factor: str) -> dict[str, Tensor]:
        """(F_k - F) H_k of everything trained, in float64; for the bias the number of samples is H."""
        old, new = tensors(before), tensors(reply)

        def change(name: str) -> Tensor:
            return new[name].double() - old[name].double()

        found = {}
        for layer in layers_of(before):
            name = layer + SUFFIX[factor]
            gram = system(new[GRAM + layer], old[layer + FACTOR_A] if factor == "b" else None)
            found[PRODUCT + name] = times(change(name), gram)
        found[PRODUCT + HEAD_WEIGHT] = times(change(HEAD_WEIGHT), new[HEAD_GRAM].double())
        found[PRODUCT + HEAD_BIAS] = change(HEAD_BIAS) * self._count(reply)
        return found

    def _count(self, reply: Payload) -> float:
        return float(reply.meta["n"]) if self.config.weights == "samples" else 1.0  # type: ignore[arg-type]

    def wanted(self, state: Payload, place: Place) -> dict[str, Form]:
        found: dict[str, Form] = {
            GRAM + layer: (state.arrays[DENOMINATOR + layer].shape, "float32") for layer in layers_of(state)
        }
        if place.phase.name == TASK_GRAM:
            return found
        suffix = SUFFIX[str(state.meta["factor"])]
        trained = [*(layer + suffix for layer in layers_of(state)), *HEAD]
        if self.config.message == "factors":
            found |= {name: form(state, name) for name in trained}
        else:
            found |= {PRODUCT + name: (state.arrays[name].shape, "float64") for name in trained}
        d = state.arrays[HEAD_WEIGHT].shape[1]
        found[HEAD_GRAM] = ((d, d) if self.config.head_alpha else (d,), "float32")
        return found

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        reason = misfit(reply, self.wanted(state, place))
        return reason or negative_gram(reply, GRAM)

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        grams = summed([tensors(reply.payload, GRAM) for reply in replies])
        kept = arrays_of({layer: grams[layer] for layer in layers_of(state)}, GRAM)
        if place.phase.name == TASK_GRAM:
            return Payload({**state.arrays, **kept}, state.meta)
        factor = str(state.meta["factor"])
        if self.config.message == "sums":
            products = summed([tensors(reply.payload, PRODUCT) for reply in replies])
        else:
            each = [self._products(state, reply.payload, factor) for reply in replies]
            products = {name.removeprefix(PRODUCT): total for name, total in summed(each).items()}
        old = tensors(state)
        merged = {}
        for layer in layers_of(state):
            name = layer + SUFFIX[factor]
            total = system(grams[layer], old[layer + FACTOR_A] if factor == "b" else None)
            merged[name] = old[name].double() + solved(products[name], total)
        # Rows of other classes are not what this task is about, whatever decay or a bad client did to them.
        rows = slice(place.task.classes.start, place.task.classes.stop)
        weight, bias = old[HEAD_WEIGHT].double(), old[HEAD_BIAS].double()
        weight[rows] += solved(products[HEAD_WEIGHT], grams["head"])[rows]
        bias[rows] += products[HEAD_BIAS][rows] / sum(self._count(reply.payload) for reply in replies)
        merged |= {HEAD_WEIGHT: weight, HEAD_BIAS: bias}
        if self.config.train_matrix == "alternate":
            factor = "a" if factor == "b" else "b"
        arrays = arrays_of({name: value.float() for name, value in merged.items()})
        return Payload({**state.arrays, **arrays, **kept}, {**state.meta, "factor": factor})

    def end_task(self, state: Payload, task: Task) -> Payload:
        # If nobody answered in the last phase, the Gram matrices are those of the last round.
        own = tensors(state)
        arrays: dict[str, Tensor] = {}
        for layer in layers_of(state):
            running = self._running(state, layer)
            running.add(own[layer + FACTOR_B], own[layer + FACTOR_A], own[GRAM + layer])
            arrays[NUMERATOR + layer] = running.numerator
            arrays[DENOMINATOR + layer] = running.gram
            arrays[TOTAL + layer] = running.total
        return Payload({**state.arrays, **arrays_of(arrays)}, {**state.meta, "num_tasks": task.index + 1})

    def _running(self, state: Payload, layer: str) -> RunningTaskMerge:
        names = (NUMERATOR + layer, DENOMINATOR + layer, TOTAL + layer)
        numerator, gram, total = (torch.from_numpy(np.array(state.arrays[name])) for name in names)
        return RunningTaskMerge(numerator, gram, total, int(state.meta["num_tasks"]))  # type: ignore[arg-type]

    def change(self, state: Payload, task: int) -> dict[str, Tensor]:
        if state.meta["num_tasks"] == task + 1:
            return {layer: self._running(state, layer).value() for layer in layers_of(state)}
        # In the middle of a task its Gram matrices are not known: the plain mean of all modules, as published.
        own, found = tensors(state), {}
        for layer in layers_of(state):
            module = own[layer + FACTOR_B].double() @ own[layer + FACTOR_A].double()
            found[layer] = (own[TOTAL + layer] + module) / (task + 1)
        return found


def less(gram: Tensor, off_diagonal: float) -> Tensor:
    """A Gram matrix [i, i] with smaller entries off the diagonal, [i] if they are gone; a diagonal [i] as it is."""
    return gram if gram.ndim == 1 else shrunk(gram[None], off_diagonal)[0]


def system(gram: Tensor, A: Tensor | None) -> Tensor:
    """H of a round, float64: A G A^T [r, r] if A [r, i] is shared, else G, [i, i] or its diagonal [i]."""
    return gram.double() if A is None else projected(A, gram[None])[0]


def times(change: Tensor, matrix: Tensor) -> Tensor:
    """``change`` [o, i] times a matrix [i, i] or diagonal [i]."""
    return change * matrix if matrix.ndim == 1 else change @ matrix


def solved(product: Tensor, matrix: Tensor) -> Tensor:
    """``product`` [o, i] times the pseudo-inverse of a matrix [i, i] or diagonal [i]."""
    return divided(product, matrix) if matrix.ndim == 1 else solve_psd(matrix, product.mT).mT


def summed(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums over clients, in the order given, in float64."""
    total = {name: value.double() for name, value in each[0].items()}
    for one in each[1:]:
        for name in total:
            total[name] = total[name] + one[name]
    return total
