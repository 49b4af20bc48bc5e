"""What clients do with their data: epochs of training, features, statistics of classes and of layers' inputs.

``N`` samples of a client, ``B`` batch, ``d`` features, ``i`` inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.errors import RunError
from neurocl.federated.method import Client, Place, Samples, Task
from neurocl.federated.network import Classifier, evaluating

EVALUATION_BATCH = 256

Loss = Callable[[Tensor, Tensor], Tensor]


def batches(samples: Samples, size: int, generator: torch.Generator | None = None) -> Iterator[Samples]:
    """Batches of at most ``size``, shuffled if there is a generator; the smaller last one is kept."""
    order = torch.arange(len(samples)) if generator is None else torch.randperm(len(samples), generator=generator)
    for rows in order.split(size):
        yield Samples(samples.x[rows], samples.y[rows])


def task_loss(network: nn.Module, task: Task) -> Loss:
    """Cross-entropy over the classes of the current task only."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = network(x)[:, task.classes.start : task.classes.stop]
        return F.cross_entropy(logits, y - task.classes.start)

    return loss


def make_optimizer(
    kind: Literal["adamw", "adam", "sgd"], groups: Sequence[dict[str, Any]], lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """A new optimiser; Adam in its fused form, which takes two thirds of the time in small networks.

    Args:
        kind: which one.
        groups: parameters with rates of their own.
        lr: of groups without one.
        weight_decay: likewise.
    """
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay)
    adam = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return adam(groups, lr=lr, weight_decay=weight_decay, fused=True)


def train(
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    client: Client,
    place: Place,
    *,
    epochs: int,
    batch_size: int,
    clip: float = 0.0,
    after_step: Callable[[], None] | None = None,
) -> float:
    """Epochs of minibatches over the client's data; returns the mean loss of the last epoch.

    Args:
        loss: of a batch.
        optimizer: a new one in every round: no momentum is kept.
        client: its data and random numbers.
        place: where the run is.
        epochs: over the client's data, shuffled anew each time.
        batch_size: of a step.
        clip: largest norm of the gradient; 0 for none.
        after_step: called after every update.

    Raises:
        RunError: the loss is not finite.
    """
    generator = client.generator(place, "batches")
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    total, count = 0.0, 0
    for _ in range(epochs):
        total, count = 0.0, 0
        for batch in batches(client.data, batch_size, generator):
            value = loss(batch.x.to(client.device), batch.y.to(client.device))
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            if clip:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            if after_step is not None:
                after_step()
            total, count = total + float(value.detach()) * len(batch), count + len(batch)
    mean = total / max(1, count)
    if not mean == mean or mean in (float("inf"), -float("inf")):
        raise RunError(f"client {client.number}: the loss is {mean}; lower the learning rate")
    return mean


def features_of(network: Classifier, samples: Samples, device: torch.device | str = "cpu") -> Tensor:
    """Features [N, d] of all samples in eval mode, float32."""
    with evaluating(network):
        found = [network.features(batch.x.to(device)).cpu() for batch in batches(samples, EVALUATION_BATCH)]
    return torch.cat(found) if found else torch.empty(0, network.head.in_features)


class ClassStatistics(NamedTuple):
    """Of the features of a client.

    Attributes:
        classes: that it has, int64 [c], sorted.
        counts: samples of each, int64 [c].
        means: float64 [c, d].
        variances: unbiased, float64 [c, d]; zero where there is one sample.
    """

    classes: Tensor
    counts: Tensor
    means: Tensor
    variances: Tensor


def class_statistics(features: Tensor, labels: Tensor, *, min_count: int = 1) -> ClassStatistics:
    """Counts, means and unbiased variances of the classes with at least ``min_count`` samples.

    Args:
        features: [N, d].
        labels: [N].
        min_count: classes with fewer samples are left out.
    """
    classes, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    values = features.double()
    size = (len(classes), values.shape[1])
    means = torch.zeros(size, dtype=torch.float64).index_add_(0, inverse, values) / counts[:, None].clamp(min=1)
    squares = torch.zeros(size, dtype=torch.float64).index_add_(0, inverse, (values - means[inverse]).square())
    variances = squares / (counts[:, None] - 1).clamp(min=1)
    kept = counts >= min_count
    return ClassStatistics(classes[kept], counts[kept], means[kept], variances[kept])


def input_grams(
    network: nn.Module,
    layers: Iterable[str],
    samples: Samples,
    *,
    diagonal: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Sums of x x^T over all inputs x of linear layers, float64 [i, i]; or of their diagonals only, [i].

    Args:
        network: in any mode; it is run in eval mode.
        layers: names of modules whose (last axis of the) input is measured.
        samples: the client's.
        diagonal: layers of which only the diagonal is wanted.
        device: where the network is.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            found = x.square().sum(dim=0) if name in diagonal else x.T @ x
            sums[name] = sums[name] + found if name in sums else found

        return add

    handles = [network.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        with evaluating(network):
            for batch in batches(samples, EVALUATION_BATCH):
                network(batch.x.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: value.cpu() for name, value in sums.items()}
