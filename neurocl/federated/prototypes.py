"""Generative prototypes: clients describe the features of a class by Gaussians, the server re-trains the head on draws.

The server's model of a class is the mixture of its clients' Gaussians. ``K`` components of a class, ``d`` features,
``C`` classes, ``S`` classes seen, ``H`` draws of each class in an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from neurocl.federated.class_table import ClassTable, row_objection, told
from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import class_statistics, features_of
from neurocl.federated.method import Client, Place, Reply
from neurocl.federated.network import HEAD_BIAS, HEAD_WEIGHT, Classifier
from neurocl.federated.payload import Payload, arrays_of

KEPT = "told."
MOMENTUM = 0.9
TEMPERATURE = 0.1
#: added to every variance
SMALLEST_VARIANCE = 1e-8
#: keeps the normalised logits finite where all logits are zero
TINY = 1e-12

Batch = tuple[Tensor, Tensor]


class PrototypesConfig(FedAvgConfig):
    """Of methods that re-train the head on draws from the classes' mixtures.

    Attributes:
        classes: whose draws: of all tasks so far, or of the current task.
        min_count: clients say nothing of classes of which they have fewer samples; two are needed for a variance.
        single: a class of which no client has ``min_count`` samples is skipped, or ``pooled``: clients tell single
            samples too and the average variance of their other classes stands in.
        keep_absent: a client without a reply keeps its Gaussians until the task ends; else a class is only what the
            replies of the last round told of it.
        covariance: of the Gaussians; ``full`` costs d x d numbers for each class of a client.
        variance_factor: of diagonal covariances, when drawing.
        draws: H.
        draw: exactly H of each class, or as a multinomial deals them.
        epochs: of re-training, each with new draws.
        rebalance_lr: learning rate of re-training.
        schedule: of that learning rate over the epochs.
        normalise: divide logits by their norm and 0.1 before the softmax.
        weights: clients count by their samples, or all the same.
        train: what clients train: the whole network or the head alone.
        backbone_lr: learning rate of what is not the head, as a share of the head's.
    """

    classes: Literal["seen", "task"] = "seen"
    min_count: Annotated[int, Field(ge=2)] = 2
    single: Literal["skip", "pooled"] = "skip"
    keep_absent: bool = False
    covariance: Literal["diagonal", "full"] = "diagonal"
    variance_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    draws: Annotated[int, Field(ge=1)] = 256
    draw: Literal["balanced", "multinomial"] = "balanced"
    epochs: Annotated[int, Field(ge=1)] = 5
    rebalance_lr: Annotated[float, Field(gt=0)] = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    normalise: bool = True

    @model_validator(mode="after")
    def _told_or_not(self) -> Self:
        if self.single == "pooled" and self.min_count > 2:
            raise ValueError("single pooled tells single samples, which min_count above 2 forbids")
        return self


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one class, ready to draw from.

    Attributes:
        shares: of the components, [K], adding up to one.
        means: [K, d].
        roots: with root root^T = covariance: standard deviations [K, d], or matrices [K, d, d].
    """

    shares: Tensor
    means: Tensor
    roots: Tensor

    @classmethod
    def of(cls, counts: Tensor, means: Tensor, spreads: Tensor, *, factor: float = 1.0) -> Mixture:
        """Components N(m_k, factor (v_k + 1e-8)), weighted by their samples.

        Args:
            counts: [K].
            means: [K, d].
            spreads: variances [K, d]; or covariances [K, d, d], which are not multiplied.
            factor: of the variances.
        """
        if spreads.ndim == 2:
            roots = (factor * (spreads + SMALLEST_VARIANCE)).sqrt()
        else:
            # Few samples make covariances singular, where a Cholesky factor may not exist.
            values, vectors = torch.linalg.eigh((spreads + spreads.mT) / 2)
            roots = vectors * (values.clamp(min=0) + SMALLEST_VARIANCE).sqrt().unsqueeze(-2)
        return cls(counts / counts.sum(), means, roots)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d] of the mixture."""
        mean = self.shares @ self.means
        away = self.means - mean
        diagonal = self.roots.ndim == 2
        within = (self.roots.square()).diag_embed() if diagonal else self.roots @ self.roots.mT
        spread = within + away.unsqueeze(-1) * away.unsqueeze(-2)
        return mean, torch.einsum("k,kij->ij", self.shares, spread)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws, [count, d]."""
        size = self.means.shape[1]
        noise = torch.randn(count, size, dtype=self.means.dtype, generator=generator)
        chosen = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        if self.roots.ndim == 2:
            return self.means[chosen] + self.roots[chosen] * noise
        drawn = self.means[chosen]
        for component in chosen.unique():
            rows = chosen == component
            drawn[rows] += noise[rows] @ self.roots[component].mT
        return drawn


def mixtures_of(table: ClassTable, *, factor: float = 1.0, min_count: int = 2) -> dict[int, Mixture]:
    """The mixture of every class of a table, float64.

    Rows of fewer than ``min_count`` samples count only where a class has no others; their variance is then the average
    over the other rows of the same client, or of all clients.
    """
    found = {}
    measured = table.rows(table.counts >= min_count)
    for number in np.unique(table.classes):
        rows = measured.of_class(number)
        spreads = rows.spreads
        if not len(rows.counts):
            rows = table.of_class(number)
            spreads = np.stack([_stand_in(measured, client) for client in rows.clients])
        counts, means = rows.float64()
        found[int(number)] = Mixture.of(counts, means, torch.from_numpy(spreads.astype(np.float64)), factor=factor)
    return found


def _stand_in(measured: ClassTable, client: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    own = measured.spreads[measured.clients == client].astype(np.float64)
    others = own if len(own) else measured.spreads.astype(np.float64)
    return others.mean(axis=0) if len(others) else np.zeros(measured.spreads.shape[1:])


def draw_epoch(
    mixtures: Mapping[int, Mixture], draws: int, generator: torch.Generator, *, draw: str = "balanced"
) -> list[Batch]:
    """Features and labels for one epoch: as many batches of ``draws`` as there are classes, shuffled.

    Args:
        mixtures: by class.
        draws: H, of each class on average.
        generator: of everything.
        draw: ``balanced`` for exactly H of each class, ``multinomial`` for as many as come.
    """
    total = draws * len(mixtures)
    counts = torch.full((len(mixtures),), draws)
    if draw == "multinomial":
        chosen = torch.randint(len(mixtures), (total,), generator=generator)
        counts = chosen.bincount(minlength=len(mixtures))
    features = torch.cat(
        [one.sample(int(count), generator) for one, count in zip(mixtures.values(), counts, strict=True)]
    )
    labels = torch.tensor(list(mixtures)).repeat_interleave(counts)
    order = torch.randperm(total, generator=generator)
    return list(zip(features[order].split(draws), labels[order].split(draws), strict=True))


def normalised_loss(logits: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cross-entropy of logits of length 1 / temperature: only their direction can be learnt, not their size.

    Args:
        logits: [B, S].
        labels: [B].
        temperature: the smaller, the sharper.

    Reference: Wei et al., "Mitigating neural network overconfidence with logit normalization", ICML 2022,
    arXiv 2205.09310.
    """
    length = logits.norm(dim=1, keepdim=True)
    return F.cross_entropy((logits + TINY) / (length + TINY) / temperature, labels)


def rebalance(
    weight: Tensor,
    bias: Tensor,
    epochs: Iterable[Sequence[Batch]],
    *,
    seen: int,
    lr: float,
    cosine_over: int = 0,
    normalise: bool = True,
) -> tuple[Tensor, Tensor, list[float]]:
    """Re-train a linear head on features by SGD with momentum 0.9.

    Args:
        weight: [C, d], unchanged.
        bias: [C], unchanged.
        epochs: batches of features [H, d] and labels [H], for one epoch after the other.
        seen: S; the softmax is over classes 0 to S - 1.
        lr: learning rate.
        cosine_over: epochs over which it falls to zero along a cosine; 0 for a constant one.
        normalise: use :func:`normalised_loss`.
    Returns: weight, bias and the loss of every batch.
    """
    weight, bias = (value.detach().clone().requires_grad_() for value in (weight, bias))
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=MOMENTUM)
    losses = []
    for number, epoch in enumerate(epochs):
        if cosine_over:
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * number / cosine_over)) / 2
        for features, labels in epoch:
            logits = F.linear(features, weight, bias)[:, :seen]
            loss = normalised_loss(logits, labels) if normalise else F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return weight.detach(), bias.detach(), losses


def class_covariances(features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Unbiased covariances [c, d, d] of classes with at least two samples, zero for others; float64.

    Args:
        features: [N, d].
        labels: [N].
        classes: [c].
    """
    found = []
    for number in classes:
        own = features[labels == number].double()
        away = own - own.mean(dim=0)
        found.append(away.mT @ away / max(1, len(own) - 1))
    size = features.shape[1]
    return torch.stack(found) if found else torch.zeros(0, size, size, dtype=torch.float64)


class Prototypes(FedAvg):
    """FedAvg whose clients also describe their classes, and whose server re-trains the averaged head on draws.

    Subclasses say what clients train.
    """

    Config = PrototypesConfig
    config: PrototypesConfig
    sum_only = False
    reveals = (
        "the client's trained weights and of each class the number of samples, mean and variance of their features; "
        "with two samples these are the features themselves"
    )

    def initial_state(self) -> Payload:
        arrays = super().initial_state().arrays
        weight = arrays[HEAD_WEIGHT]
        if not weight.any():
            # The gradient of normalised logits grows as the head shrinks: from zeros it leaps to where it stays.
            bound = weight.shape[1] ** -0.5
            drawn = self.server_rng("head", 0).uniform(-bound, bound, weight.shape)
            arrays = arrays | {HEAD_WEIGHT: drawn.astype(weight.dtype)}
        return Payload({**arrays, **ClassTable.empty(self._size, self._spread).store(KEPT)})

    @property
    def _size(self) -> int:
        return int(self.problem.num_features)

    @property
    def _spread(self) -> tuple[int, ...]:
        return (self._size, self._size) if self.config.covariance == "full" else (self._size,)

    @property
    def _smallest_count(self) -> int:
        return 1 if self.config.single == "pooled" else self.config.min_count

    def message(self, state: Payload, place: Place) -> Payload:
        names = self.trained(self.network())
        return Payload({name: state.arrays[name] for name in names})

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        trained = super().reply(network, client, place, message)
        features = features_of(network, client.data, client.device)
        found = class_statistics(features, client.data.y, min_count=self._smallest_count)
        full = self.config.covariance == "full"
        spreads = class_covariances(features, client.data.y, found.classes) if full else found.variances
        arrays, meta = told(found.classes, found.counts, found.means, spreads)
        return Payload({**trained.arrays, **arrays}, {**trained.meta, **meta})

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        return super().objection(state, place, reply) or row_objection(
            reply, place.task.classes, self._size, spread=self._spread, min_count=self._smallest_count
        )

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        names = self.trained(self.network())
        head = [name for name in (HEAD_WEIGHT, HEAD_BIAS) if name in names]
        averaged = super().aggregate(state, place, replies)
        table = self._renewed(ClassTable.kept(state.arrays, KEPT), ClassTable.received(replies))
        arrays = {name: averaged.arrays[name] for name in names} | table.store(KEPT)
        weight, bias = (torch.from_numpy(arrays[name].copy()) for name in head)
        generator = self.server_generator(place, "prototypes")
        weight, bias = self.rebalanced(weight, bias, table, place, generator)
        # Nobody's Gaussians, however wild, may spoil the head.
        if weight.isfinite().all() and bias.isfinite().all():
            arrays |= arrays_of({HEAD_WEIGHT: weight, HEAD_BIAS: bias})
        return Payload(arrays, state.meta)

    def _renewed(self, kept: ClassTable, told: ClassTable) -> ClassTable:
        """The table after a round: what was told replaces what was known of the same classes."""
        again = np.isin(kept.classes, told.classes)
        if self.config.keep_absent:
            again &= np.isin(kept.clients, told.clients)
        return kept.rows(~again).joined(told)

    def rebalanced(
        self, weight: Tensor, bias: Tensor, table: ClassTable, place: Place, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The head after re-training on draws."""
        config = self.config
        if config.classes == "task":
            table = table.rows(np.isin(table.classes, place.task.classes))
        mixtures = mixtures_of(table, factor=config.variance_factor, min_count=config.min_count)
        if not mixtures:
            return weight, bias

        def epochs() -> Iterator[list[Batch]]:
            for _ in range(config.epochs):
                drawn = draw_epoch(mixtures, config.draws, generator, draw=config.draw)
                yield [(features.to(weight.dtype), labels) for features, labels in drawn]

        weight, bias, _ = rebalance(
            weight,
            bias,
            epochs(),
            seen=place.task.classes.stop,
            lr=config.rebalance_lr,
            cosine_over=config.epochs if config.schedule == "cosine" else 0,
            normalise=config.normalise,
        )
        return weight, bias
