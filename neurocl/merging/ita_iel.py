"""ITA and IEL: task vectors that average well, by keeping the network where its loss is a bowl around the base.

``T`` tasks so far, the current one included; ``tau_t`` the task vector of one; ``F`` a diagonal Fisher matrix [*shape].

ITA (incremental task arithmetic) trains every task vector alone and pulls it to zero where earlier tasks are sensitive.
IEL (incremental ensemble learning) computes the loss on the average of all task vectors and pulls them together.
Both pull with a step of their own beside the optimizer's, so the strength is a step size, not a weight in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.merging.linear_inputs import find_taps
from neurocl.merging.statistics import Statistics

EPSILON = 1e-5
CLIP = 100.0

Compat = Literal["none", "reference"]


def fisher_distance(tau: Tensor, fisher: Tensor) -> Tensor:
    """Squared length ``||tau||_F^2 = sum F tau^2`` of a task vector."""
    return (fisher * tau.square()).sum()


def omega(taus: Tensor, weights: Tensor, fisher: Tensor) -> Tensor:
    """How much the members of an ensemble lose by being averaged, to second order.

    ``1/2 (sum_t w_t ||tau_t||_F^2 - ||sum_t w_t tau_t||_F^2)``; zero if all task vectors are equal.

    Args:
        taus: [T, *shape].
        weights: w, [T], not negative, summing to 1.
        fisher: [*shape].
    Reference: Porrello et al., "A Second-Order Perspective on Model Compositionality and Incremental Learning",
    ICLR 2025, arXiv 2405.16350.
    """
    spread = _weigh(weights, taus)
    own = (fisher * spread * taus).sum()
    return (own - fisher_distance(spread.sum(dim=0), fisher)) / 2


def omega_pairwise(taus: Tensor, weights: Tensor, fisher: Tensor) -> Tensor:
    """The same as :func:`omega`, as ``1/2 sum_{t > s} w_t w_s ||tau_t - tau_s||_F^2``."""
    differences = taus.unsqueeze(0) - taus.unsqueeze(1)
    lengths = (fisher * differences.square()).flatten(2).sum(dim=2)
    return (weights.unsqueeze(0) * weights.unsqueeze(1) * lengths).sum() / 4


def omega_gradient(taus: Tensor, weights: Tensor, fisher: Tensor) -> Tensor:
    """Gradient of :func:`omega` with respect to every task vector, ``w_t F (tau_t - sum_s w_s tau_s)``, [T, *shape]."""
    mean = _weigh(weights, taus).sum(dim=0)
    return _weigh(weights, fisher * (taus - mean))


def jensen_gap(taus: Tensor, weights: Tensor, hessian: Tensor) -> Tensor:
    """By how much a quadratic loss of the composed model is below the mean loss of its members.

    ``sum_t w_t l(tau_t) - l(sum_t w_t tau_t) = 1/2 sum_{t > s} w_t w_s (tau_t - tau_s)^T H (tau_t - tau_s)``

    Args:
        taus: [T, d].
        weights: [T], summing to 1.
        hessian: H, [d, d], symmetric.
    Reference: Porrello et al., arXiv 2405.16350, theorem 1.
    """
    differences = taus.unsqueeze(0) - taus.unsqueeze(1)
    lengths = ((differences @ hessian) * differences).sum(dim=2)
    return (weights.unsqueeze(0) * weights.unsqueeze(1) * lengths).sum() / 4


def _weigh(weights: Tensor, taus: Tensor) -> Tensor:
    return weights.reshape(-1, *[1] * (taus.ndim - 1)) * taus


def ita_fisher(sums: Sequence[Tensor], counts: Sequence[int], *, compat: Compat = "none") -> Tensor:
    """The metric of ITA: mean Fisher of the earlier tasks, ``(eps + sum_s f_s) / sum_s n_s``; eps for the first task.

    Args:
        sums: Fisher of each earlier task summed over its samples, [*shape] each.
        counts: samples of each.
        compat: ``"reference"`` counts samples as the published code does, ``2 n_0 + n_1 + ... + n_{t-2}`` from the
            third task on, which is their number only if all tasks are of one size.
    Returns: [*shape], or a scalar for the first task.
    Raises:
        ValueError: lists of different lengths.
    """
    if len(sums) != len(counts):
        raise ValueError(f"{len(sums)} Fisher sums with {len(counts)} counts")
    if not sums:
        return torch.tensor(EPSILON, dtype=torch.float64)
    quirk = compat == "reference" and len(counts) > 1
    num_samples = counts[0] + sum(counts[:-1]) if quirk else sum(counts)
    return (EPSILON + torch.stack(list(sums)).sum(dim=0)) / max(1, num_samples)


def iel_fisher(sums: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The metric of IEL: ``eps`` and the mean Fisher of all tasks so far, the current one included.

    Args:
        sums: Fisher of each task summed over its samples, [*shape] each.
        counts: samples of each.
    Raises:
        ValueError: no tasks, or lists of different lengths.
    """
    if not sums or len(sums) != len(counts):
        raise ValueError(f"{len(sums)} Fisher sums with {len(counts)} counts")
    return EPSILON + torch.stack(list(sums)).sum(dim=0) / max(1, sum(counts))


def ita_gradient(tau: Tensor, fisher: Tensor, strength: float) -> Tensor:
    """Pull of ITA on a task vector: ``alpha F tau``, the gradient of ``alpha/2 ||tau||_F^2``."""
    return strength * fisher * tau


def iel_gradient(tau: Tensor, past: Tensor, num_tasks: int, fisher: Tensor, strength: float) -> Tensor:
    """Pull of IEL on the current task vector: ``beta F ((1 - 1/T) tau_t - (1/T) sum_{s < t} tau_s)``.

    This is T times the gradient of ``beta omega``, as published. The first task takes T = 2 and is pulled to the base.

    Args:
        tau: current task vector.
        past: sum of the earlier ones.
        num_tasks: T, the current task included.
        fisher: metric, see :func:`iel_fisher`.
        strength: beta.
    """
    share = 1 / max(2, num_tasks)
    return strength * fisher * ((1 - share) * tau - share * past)


def lora_gradients(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Chain rule from the update ``B A`` to its factors.

    Args:
        gradient: with respect to ``B A``, [..., o, n].
        a: [..., r, n].
        b: [..., o, r].
    Returns: gradients of A, ``B^T g``, and of B, ``g A^T``.
    """
    return b.mT @ gradient, gradient @ a.mT


def decoupled_step(gradient: Tensor, factor: float, clip: float = CLIP) -> Tensor:
    """What to subtract from a parameter: the pull, its norm at most ``clip``, times the schedule's ``factor``."""
    norm = gradient.norm()
    return factor * gradient * torch.clamp(clip / norm.clamp(min=torch.finfo(norm.dtype).tiny), max=1.0)


def linear_weights(module: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """Names of the matrices of linear and attention layers, those like a glob pattern if there are any patterns.

    Raises:
        UserError: nothing matches.
    """
    names = [tap.weight for tap in find_taps(module)]
    chosen = [name for name in names if patterns is None or any(fnmatchcase(name, each) for each in patterns)]
    if not chosen:
        raise UserError(f"no linear layer is named like {', '.join(patterns or ['*'])} (there are {', '.join(names)})")
    return chosen


def _fisher_parts(names: Sequence[str], tasks: Sequence[Statistics]) -> dict[str, tuple[list[Tensor], list[int]]]:
    """Sums and counts by parameter name."""
    entries = {name: [task.sum("fisher", name) for task in tasks] for name in names}
    return {name: ([e.total for e in found], [e.num_samples for e in found]) for name, found in entries.items()}


def _towards(tau: Tensor, rest: Tensor, pull: Tensor, factor: float) -> Tensor:
    """The clipped step, nowhere longer than the way from ``tau`` to the point of ``rest`` where the pull is zero."""
    way = (tau - rest).abs()
    return decoupled_step(pull, factor).clamp(-way, way)


class Ita:
    """Regulariser of fine-tuning for one task of ITA; trains only the parameters that it has a metric for.

    A step shrinks each entry by ``factor * strength * F``; where that is more than 1 the entry becomes zero instead of
    flying off, so that an endless strength leaves the base.

    Args:
        fisher: metric by parameter name, from :func:`ita_fisher`; on the device of the network.
        strength: alpha.
    Reference: Porrello et al., "A Second-Order Perspective on Model Compositionality and Incremental Learning",
    ICLR 2025, arXiv 2405.16350.
    """

    def __init__(self, fisher: Mapping[str, Tensor], strength: float = 0.02) -> None:
        self.fisher = dict(fisher)
        self.strength = strength

    @classmethod
    def of(
        cls,
        module: nn.Module,
        earlier: Sequence[Statistics],
        *,
        strength: float = 0.02,
        parameters: Sequence[str] | None = None,
        compat: Compat = "none",
    ) -> Ita:
        """From the Fisher statistics of the earlier tasks at the base; none for the first task.

        Args:
            module: the network, for the names, types and device of its parameters.
            earlier: ``fisher`` sums of each earlier task.
            strength: alpha.
            parameters: glob patterns; the matrices of all linear layers if None.
            compat: see :func:`ita_fisher`.
        Raises:
            UserError: nothing matches, or a Fisher is missing.
        """
        names = linear_weights(module, parameters)
        parts = _fisher_parts(names, earlier)
        like = dict(module.named_parameters())
        return cls({name: ita_fisher(*parts[name], compat=compat).to(like[name]) for name in names}, strength)

    def trains(self, name: str) -> bool:
        """Whether there is a metric for that parameter."""
        return name in self.fisher

    def compose(self, deltas: Mapping[str, Tensor]) -> None:
        """The loss is that of the network being trained."""

    def penalty(self, deltas: Mapping[str, Tensor]) -> None:
        """Nothing: the pull does not go through the optimizer."""

    def step(self, deltas: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Pull of every task matrix towards zero."""
        return {
            name: _towards(tau, torch.zeros_like(tau), ita_gradient(tau, self.fisher[name], self.strength), factor)
            for name, tau in deltas.items()
        }


class Iel:
    """Regulariser of fine-tuning for one task of IEL; trains only the parameters that it has a metric for.

    What is trained is the current task vector; the loss is that of ``base + (sum of earlier ones + current) / T``.

    Args:
        fisher: metric by parameter name, from :func:`iel_fisher`; on the device of the network.
        past: sum of the earlier task vectors by parameter name, on the same device; nothing else of them is needed.
        num_past: how many there are.
        strength: beta.
    Reference: Porrello et al., "A Second-Order Perspective on Model Compositionality and Incremental Learning",
    ICLR 2025, arXiv 2405.16350.
    """

    def __init__(
        self, fisher: Mapping[str, Tensor], past: Mapping[str, Tensor], num_past: int, strength: float
    ) -> None:
        self.fisher = dict(fisher)
        self.past = dict(past)
        self.num_tasks = num_past + 1
        self.strength = strength

    @classmethod
    def of(
        cls,
        module: nn.Module,
        tasks: Sequence[Statistics],
        past: Mapping[str, Tensor],
        *,
        strength: float,
        parameters: Sequence[str] | None = None,
    ) -> Iel:
        """From the Fisher statistics of all tasks so far and the sum of the earlier task vectors.

        Args:
            module: the network, for the names, types and device of its parameters.
            tasks: ``fisher`` sums of each earlier task and, last, of the current one.
            past: sum of the earlier task vectors by name; what is absent counts as zero.
            strength: beta.
            parameters: glob patterns; the matrices of all linear layers if None.
        Raises:
            UserError: nothing matches, or a Fisher is missing.
        """
        names = linear_weights(module, parameters)
        parts = _fisher_parts(names, tasks)
        like = dict(module.named_parameters())
        fisher = {name: iel_fisher(*parts[name]).to(like[name]) for name in names}
        sums = {name: past[name].to(like[name]) for name in names if name in past}
        return cls(fisher, sums, len(tasks) - 1, strength)

    def trains(self, name: str) -> bool:
        """Whether there is a metric for that parameter."""
        return name in self.fisher

    def compose(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The uniform mean of all task vectors; None for the first task, whose mean is itself."""
        if self.num_tasks == 1:
            return None
        return {name: (tau + self._past(name, tau)) / self.num_tasks for name, tau in deltas.items()}

    def penalty(self, deltas: Mapping[str, Tensor]) -> None:
        """Nothing: the pull does not go through the optimizer."""

    def step(self, deltas: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Pull of every task matrix towards the mean of the earlier ones, for the first task towards zero."""
        found = {}
        for name, tau in deltas.items():
            past = self._past(name, tau)
            pull = iel_gradient(tau, past, self.num_tasks, self.fisher[name], self.strength)
            found[name] = _towards(tau, past / max(1, self.num_tasks - 1), pull, factor)
        return found

    def _past(self, name: str, tau: Tensor) -> Tensor:
        return self.past.get(name, torch.zeros_like(tau))
