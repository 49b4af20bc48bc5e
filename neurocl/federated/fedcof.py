"""FedCOF: class covariances out of the spread of the clients' class means, and the classifier that they give.

``C`` classes, ``K`` means of a class (one or more of every client that has it), ``d`` features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from neurocl.errors import UserError
from neurocl.federated.class_table import ClassTable, row_objection, told
from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.fedncm import cosine_predictor, normalised_rows, unseen_rows, with_rows
from neurocl.federated.local_training import class_statistics, features_of
from neurocl.federated.method import Client, Phase, Place, Predictor, Reply, Store, Task
from neurocl.federated.network import HEAD_WEIGHT, Classifier
from neurocl.federated.payload import Payload, arrays_of, tensors
from neurocl.merging.linear_algebra import solve_psd

KEPT, SUMMED = "told.", "sums."
#: share of the mean variance that ``gamma: auto`` adds, the geometric middle of what works on unlike features
AUTO_SHARE = 0.03
#: least samples of a part when a client splits a class
SMALLEST_PART = 2

Gamma = Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FedCofConfig(FedAvgConfig):
    """Of FedCOF.

    Attributes:
        gamma: added to every class's variances; ``auto`` for 3 % of the mean variance, whatever the features' scale.
        single: covariance of a class of which there is one mean only: ``gamma`` for gamma alone, ``pool`` for the
            average of the other classes.
        subsets: parts into which a client splits a class at random, of at least two (and ``min_count``) samples each;
            more means estimate better, cost more and tell more.
        min_count: clients do not tell classes of which they have fewer samples; the mean of one sample is the sample.
        forgettable: the server keeps every client's means and can forget one; else only sums, d x d for each class.
        then: ``none`` leaves the network as it is; ``lp`` goes on with rounds of FedAvg on the head, ``ft`` on all.
        weights: of these rounds, as for FedAvg.
        train: given by ``then``.
        backbone_lr: of these rounds, as for FedAvg.
    """

    gamma: Gamma = "auto"
    single: Literal["gamma", "pool"] = "gamma"
    subsets: Annotated[int, Field(ge=1)] = 1
    min_count: Annotated[int, Field(ge=1)] = 1
    forgettable: bool = True
    then: Literal["none", "lp", "ft"] = "none"

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        if "train" in self.model_fields_set:
            raise ValueError("fedcof trains what then says: use then lp or ft in place of train")
        return self


@dataclass
class ClassSums:
    """What the covariance of one class is computed from; sums, so that means can be put in and taken out in any order.

    Attributes:
        count: samples, sum of n.
        groups: K, number of means.
        total: sum of n m, [d].
        outer: sum of n m m^T, [d, d].
    """

    count: Tensor
    groups: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def zeros(cls, num_features: int) -> ClassSums:
        """Before the first mean; float64."""
        size, kind = num_features, torch.float64
        return cls(
            torch.zeros((), dtype=kind),
            torch.zeros((), dtype=kind),
            torch.zeros(size, dtype=kind),
            torch.zeros(size, size, dtype=kind),
        )

    def add(self, counts: Tensor, means: Tensor, sign: int = 1) -> ClassSums:
        """With means [K, d] of ``counts`` [K] samples put in; in place."""
        weighted = counts[:, None] * means
        self.count += sign * counts.sum()
        self.groups += sign * len(counts)
        self.total += sign * weighted.sum(dim=0)
        self.outer += sign * (weighted.mT @ means)
        return self

    def remove(self, counts: Tensor, means: Tensor) -> ClassSums:
        """With means taken out that were put in before; in place."""
        return self.add(counts, means, -1)

    def covariance(self) -> Tensor:
        """sum_k n_k (m_k - mu)(m_k - mu)^T / (K - 1), [d, d]: unbiased; zero if K is less than two."""
        if self.groups < 2:
            return torch.zeros_like(self.outer)
        found: Tensor = (self.outer - torch.outer(self.total, self.total) / self.count) / (self.groups - 1)
        return found


def fedcof_gram(
    classes: Iterable[ClassSums], gamma: float | Literal["auto"], single: Literal["gamma", "pool"] = "gamma"
) -> tuple[Tensor, Tensor]:
    """G = sum_c (N_c - 1) (Sigma_c + gamma I) + N mu mu^T, [d, d], and the class sums N_c mu_c, [C, d].

    The scatter between the classes is left out on purpose: that makes the ridge solution a discriminant analysis.

    Args:
        classes: one at a time is enough; all with samples.
        gamma: absolute, or ``auto``.
        single: the covariance of a class with one mean.
    """
    totals, count = [], 0.0
    within = estimates = torch.zeros(())
    num_estimates, known, alone = 0, 0.0, 0.0
    for sums in classes:
        totals.append(sums.total.clone())
        count += float(sums.count)
        freedom = float(sums.count) - 1
        if sums.groups < 2:
            alone += freedom
            continue
        covariance = sums.covariance()
        within, estimates = within + freedom * covariance, estimates + covariance
        num_estimates, known = num_estimates + 1, known + freedom
    stacked = torch.stack(totals)
    size = stacked.shape[1]
    within = within.expand(size, size)
    if gamma == "auto":
        # Without any estimate, the scale of the means keeps G regular and the order of the scores sensible.
        scale = within.trace() / (size * known) if known else (stacked / count).square().mean()
        gamma = AUTO_SHARE * float(scale) or 1.0
    if single == "pool" and num_estimates:
        within = within + alone / num_estimates * estimates
    middle = stacked.sum(dim=0)
    # If every class has one sample, nothing but gamma is left to make G regular.
    shrinkage = gamma * max(known + alone, 1.0) * torch.eye(size, dtype=stacked.dtype)
    return within + shrinkage + torch.outer(middle, middle) / count, stacked


def fedcof_weights(
    classes: Iterable[ClassSums], gamma: float | Literal["auto"] = "auto", single: Literal["gamma", "pool"] = "gamma"
) -> Tensor:
    """Rows of the classifier, [C, d] of length one, without bias: G^+ N_c mu_c normalised.

    Args:
        classes: with samples, in order.
        gamma: absolute, or ``auto``.
        single: the covariance of a class with one mean.

    Reference: Goswami et al., "Covariances for free: exploiting mean distributions for training-free federated
    learning", NeurIPS 2025, arXiv 2412.14326.
    """
    gram, totals = fedcof_gram(classes, gamma, single)
    return normalised_rows(solve_psd(gram, totals.mT).mT)


class FedCof(FedAvg):
    """Clients send class means once for each task; the server makes a classifier of them, which rounds may refine.

    If clients' features differ by more than their samples (another camera, another clinic), that difference is taken
    for spread within the class. With ``ft`` the backbone moves on and the means of earlier tasks stay as they were.

    Reference: Goswami et al., "Covariances for free: exploiting mean distributions for training-free federated
    learning", NeurIPS 2025, arXiv 2412.14326.
    """

    Config = FedCofConfig
    config: FedCofConfig
    sum_only = False
    reveals = "how many samples of each class a client has and the mean of their features; later its trained weights"

    def phases(self, task: Task) -> Sequence[Phase]:
        rounds = super().phases(task) if self.config.then != "none" else ()
        return (Phase("statistics", 1, train=False), *rounds)

    def trained(self, network: Classifier) -> list[str]:
        if self.config.then == "none":
            return []
        # The classifier has no bias, so none is trained either.
        return [HEAD_WEIGHT] + (network.backbone_names() if self.config.then == "ft" else [])

    def initial_state(self) -> Payload:
        size = self.problem.num_features
        if self.config.forgettable:
            kept = ClassTable.empty(size).store(KEPT)
        else:
            kept = _stored([], size)
        return Payload({**super().initial_state().arrays, **kept})

    def message(self, state: Payload, place: Place) -> Payload:
        names = self.trained(self.network())
        if place.phase.name == "statistics":
            names = names[1:]  # features do not depend on the head
        return Payload({name: state.arrays[name] for name in names})

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        if place.phase.name != "statistics":
            return super().client(client, place, message)
        features = features_of(self.loaded(message), client.data, client.device)
        found = class_statistics(features, client.data.y, min_count=self.config.min_count)
        classes, counts, means = found.classes, found.counts, found.means
        if self.config.subsets > 1:
            generator = client.generator(place, "subsets")
            parts = [
                part_means(features[client.data.y == number], self.config.subsets, self._smallest_part, generator)
                for number in classes
            ]
            classes = classes.repeat_interleave(torch.tensor([len(part[0]) for part in parts], dtype=torch.int64))
            counts = torch.cat([part[0] for part in parts]) if parts else counts
            means = torch.cat([part[1] for part in parts]) if parts else means
        arrays, meta = told(classes, counts, means)
        return Payload(arrays, {"n": len(client.data), **meta})

    @property
    def _smallest_part(self) -> int:
        return max(self.config.min_count, SMALLEST_PART)

    def expected(self, state: Payload, place: Place) -> Sequence[str]:
        return [] if place.phase.name == "statistics" else super().expected(state, place)

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        if place.phase.name != "statistics":
            return super().objection(state, place, reply)
        config, size = self.config, self.problem.num_features
        return row_objection(reply, place.task.classes, size, min_count=config.min_count, repeats=config.subsets)

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        if place.phase.name != "statistics":
            return super().aggregate(state, place, replies)
        received = ClassTable.received(replies)
        if self.config.forgettable:
            kept = ClassTable.kept(state.arrays, KEPT).joined(received).store(KEPT)
        else:
            sums = _loaded(state)
            size = received.means.shape[1]
            sums += [ClassSums.zeros(size) for _ in range(place.task.classes.stop - len(sums))]
            for number in place.task.classes:
                sums[number].add(*received.of_class(number).float64())
            kept = _stored(sums, size)
        state = Payload({**state.arrays, **kept}, state.meta)
        if self.config.then == "none":
            return state
        weight = self.classifier(state)[place.task.classes.start : place.task.classes.stop]
        head = state.arrays[HEAD_WEIGHT].copy()
        rows = np.arange(place.task.classes.start, place.task.classes.stop)
        there = (~weight.isnan().any(dim=1)).numpy()
        head[rows[there]] = weight.numpy()[there]
        return Payload({**state.arrays, HEAD_WEIGHT: head}, state.meta)

    def classifier(self, state: Payload) -> Tensor:
        """Rows [C, d] out of the statistics of a state; NaN for classes that nobody has."""
        weight = unseen_rows(self.problem.num_classes, self.problem.num_features)
        if self.config.forgettable:
            present = np.unique(ClassTable.kept(state.arrays, KEPT).classes)
        else:
            present = np.flatnonzero(state.arrays[f"{SUMMED}count"])
        if len(present):
            weight[present] = fedcof_weights(self._sums(state), self.config.gamma, self.config.single)
        return weight

    def _sums(self, state: Payload) -> Iterator[ClassSums]:
        """Of every class that somebody has, in order and one at a time: d x d numbers of all classes may be many."""
        if not self.config.forgettable:
            yield from (sums for sums in _loaded(state) if sums.count > 0)
            return
        table = ClassTable.kept(state.arrays, KEPT)
        for number in np.unique(table.classes):
            counts, means = table.of_class(number).float64()
            yield ClassSums.zeros(means.shape[1]).add(counts, means)

    def forget(self, state: Payload, client: int) -> Payload:
        if self.config.then != "none":
            raise UserError("the rounds after fedcof trained weights on a client's samples; use then none to forget it")
        if not self.config.forgettable:
            raise UserError("fedcof with forgettable false keeps only sums over clients; only true can forget one")
        kept = ClassTable.kept(state.arrays, KEPT).without(client).store(KEPT)
        return Payload({**state.arrays, **kept}, state.meta)

    def predictor(self, state: Payload, task: Task) -> Predictor:
        if self.config.then != "none":
            return super().predictor(state, task)
        return cosine_predictor(self.network(), self.classifier(state))

    def folded(self, state: Payload, task: Task) -> Classifier:
        if self.config.then != "none":
            return self.model(state, task)
        return with_rows(self.network(), self.classifier(state))


def part_means(features: Tensor, subsets: int, smallest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A class cut into up to ``subsets`` random parts of nearly equal size.

    Args:
        features: of its samples, [N, d].
        subsets: parts wanted.
        smallest: least samples of a part, unless there is only one.
        generator: of the order.
    Returns: counts int64 [g] and means float64 [g, d].
    """
    num_parts = max(1, min(subsets, len(features) // smallest))
    parts = features.double()[torch.randperm(len(features), generator=generator)].tensor_split(num_parts)
    counts = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    return counts, torch.stack([part.mean(dim=0) for part in parts])


def _stored(classes: Sequence[ClassSums], num_features: int) -> Store:
    """Sums of classes 0, 1, ... as arrays of a state."""
    shapes = {"count": (), "groups": (), "total": (num_features,), "outer": (num_features, num_features)}
    if not classes:
        return {SUMMED + name: np.zeros((0, *shape)) for name, shape in shapes.items()}
    return arrays_of({name: torch.stack([getattr(one, name) for one in classes]) for name in shapes}, SUMMED)


def _loaded(state: Payload) -> list[ClassSums]:
    found = tensors(state, SUMMED)
    columns = (found[name].unbind() for name in ("count", "groups", "total", "outer"))
    return [ClassSums(*values) for values in zip(*columns, strict=True)]
