"""Samples without data: a generator learns what the server's model takes for its classes.

``B`` batch, ``S`` samples, ``C`` classes, ``z`` noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from neurocl.config import Config
from neurocl.errors import RunError
from neurocl.federated.network import evaluating

# Channels of the generator of pictures, and units of the one of vectors.
WIDTH = 64, 256


class SynthesisConfig(Config):
    """Of the samples and the generator.

    Attributes:
        steps: batches that are made for every task.
        inner_steps: of the noise and the generator for each of them.
        batch_size: samples of one.
        noise: numbers that a sample is made of.
        lr: of the generator and the student.
        noise_lr: of the noise.
        one_hot: weight of the cross-entropy of the model's scores with the wanted class.
        adversarial: weight of the divergence of the student from the model, where they choose the same class.
        warm_up: steps before the student learns and counts.
        student_steps: of the student after every step, on a batch of what has been made so far.
        student_temperature: of its distillation.
        low, high: between which the values of samples lie.
    """

    steps: Annotated[int, Field(ge=1)] = 30
    inner_steps: Annotated[int, Field(ge=1)] = 80
    batch_size: Annotated[int, Field(ge=2)] = 16
    noise: Annotated[int, Field(ge=1)] = 256
    lr: Annotated[float, Field(gt=0)] = 2e-3
    noise_lr: Annotated[float, Field(gt=0)] = 0.01
    one_hot: Annotated[float, Field(ge=0)] = 0.5
    adversarial: Annotated[float, Field(ge=0)] = 1.0
    warm_up: Annotated[int, Field(ge=0)] = 20
    student_steps: Annotated[int, Field(ge=0)] = 50
    student_temperature: Annotated[float, Field(gt=0)] = 20.0
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _range(self) -> SynthesisConfig:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        return self


class VectorGenerator(nn.Module):
    """Noise [B, z] -> [B, *shape] between 0 and 1: a perceptron with one hidden layer."""

    def __init__(self, noise: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        width = WIDTH[1]
        self.layers = nn.Sequential(
            nn.Linear(noise, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.2), nn.Linear(width, math.prod(self.shape))
        )

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(z).sigmoid()
        return out.view(-1, *self.shape)


class PictureGenerator(nn.Module):
    """Noise [B, z] -> [B, channels, height, width] between 0 and 1: from a quarter of the size by convolutions."""

    def __init__(self, noise: int, shape: Sequence[int]) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.small = WIDTH[0], -(-self.height // 4), -(-self.width // 4)
        self.first = nn.Linear(noise, math.prod(self.small))
        self.layers = nn.Sequential(
            nn.BatchNorm2d(WIDTH[0]),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(WIDTH[0], WIDTH[0], 3, padding=1),
            nn.BatchNorm2d(WIDTH[0]),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(WIDTH[0], WIDTH[0], 3, padding=1),
            nn.BatchNorm2d(WIDTH[0]),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH[0], channels, 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(self.first(z).view(-1, *self.small)).sigmoid()
        return out[:, :, : self.height, : self.width]


def generator_for(noise: int, shape: Sequence[int], random: torch.Generator) -> nn.Module:
    """An untrained generator of samples [*shape]; three axes are a picture, all else a vector."""
    # The layers draw their start from the global numbers; nobody else's may change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=random)))
        return PictureGenerator(noise, shape) if len(shape) == 3 else VectorGenerator(noise, shape)


def synthesize(
    teacher: nn.Module,
    student: nn.Module,
    classes: range,
    shape: Sequence[int],
    config: SynthesisConfig,
    random: torch.Generator,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Samples [S, *shape] that the teacher takes for ``classes`` and the student does not know; S = steps * batch_size.

    Every step draws noise and wanted classes, then minimises over the noise and the generator
    one_hot * CE(teacher, class) - adversarial * KL(teacher || student) and keeps the batch of the lowest loss; the
    student then learns from all batches so far. There is no term for statistics of batch normalisation.

    Args:
        teacher: the server's model; frozen, in eval mode.
        student: a model that is trained here.
        classes: that are wanted; scores of classes from 0 to their last compete.
        shape: of a sample.
        config: see there.
        random: every choice.
        device: of both models.

    Raises:
        RunError: the generator diverged.

    Reference: Zhang et al., "TARGET: federated class-continual learning via exemplar-free distillation", ICCV 2023,
    arXiv 2303.06937; Fang et al., "Contrastive model inversion for data-free knowledge distillation", IJCAI 2021,
    arXiv 2105.08584.
    """
    seen = classes.stop
    teacher.eval().requires_grad_(False)
    generator = generator_for(config.noise, shape, random).to(device)
    learner = torch.optim.Adam(student.parameters(), lr=config.lr)
    made: list[Tensor] = []
    for step in range(config.steps):
        rival = student.eval() if step >= config.warm_up and config.adversarial else None
        wanted = torch.randint(classes.start, seen, (config.batch_size,), generator=random).to(device)
        noise = torch.randn(config.batch_size, config.noise, generator=random).to(device)
        made.append(_best_batch(teacher, rival, generator, noise, wanted, seen, config))
        if step >= config.warm_up:
            _teach(student, learner, teacher, torch.cat(made), seen, config, random)
    found = torch.cat(made)
    if not found.isfinite().all():
        raise RunError("the synthetic samples are not finite; lower synthesis.lr")
    return found


Model = Callable[[Tensor], Tensor]


def _best_batch(
    teacher: Model,
    student: Model | None,
    generator: nn.Module,
    noise: Tensor,
    wanted: Tensor,
    seen: int,
    config: SynthesisConfig,
) -> Tensor:
    """The batch of the lowest loss among the inner steps."""
    noise.requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": list(generator.parameters())},
        {"params": [noise], "lr": config.noise_lr},
    ]
    optimizer = torch.optim.Adam(groups, lr=config.lr, betas=(0.5, 0.999))
    best, lowest = torch.empty(0), math.inf
    for _ in range(config.inner_steps):
        samples = config.low + (config.high - config.low) * generator(noise)
        scores = teacher(samples)[:, :seen]
        loss = config.one_hot * F.cross_entropy(scores, wanted)
        if student is not None:
            loss = loss - config.adversarial * disagreement(scores, student(samples)[:, :seen])
        if not len(best) or float(loss.detach()) < lowest:
            best, lowest = samples.detach().clone(), float(loss.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return best


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over B of KL(teacher || student) where both choose the same class, and 0 elsewhere.

    Args:
        teacher, student: scores [B, C].
    """
    ours, theirs = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    # Not F.kl_div, whose gradient by a probability that underflows is not a number.
    divergence = (ours.exp() * (ours - theirs)).sum(dim=1)
    return (divergence * (teacher.argmax(dim=1) == student.argmax(dim=1))).mean()


def _teach(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: nn.Module,
    samples: Tensor,
    seen: int,
    config: SynthesisConfig,
    random: torch.Generator,
) -> None:
    """Steps of distillation from the teacher."""
    heat = config.student_temperature
    student.train()
    for _ in range(config.student_steps):
        rows = torch.randint(len(samples), (config.batch_size,), generator=random)
        x = samples[rows.to(samples.device)]
        with evaluating(teacher):
            targets = (teacher(x)[:, :seen] / heat).softmax(dim=1)
        # Without the square of the temperature the gradient would all but vanish.
        loss = heat**2 * F.kl_div((student(x)[:, :seen] / heat).log_softmax(dim=1), targets, reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
