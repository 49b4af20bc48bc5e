"""What a removal of clients is judged on: accuracies, whether their samples are still told apart, distance to gold.

``N`` and ``M`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from neurocl.federated.driver import count_correct
from neurocl.federated.local_training import EVALUATION_BATCH, batches
from neurocl.federated.method import FederatedMethod, Predictor, Samples
from neurocl.federated.payload import Payload
from neurocl.federated.problem import Problem
from neurocl.federated.tangent import Tangent

OWN_SHARE = 0.6


@dataclass(frozen=True)
class Judge:
    """What a removal is judged on.

    Args:
        problem: of the run.
        clients: that leave.
        gone: that left earlier, and count nowhere.
    """

    problem: Problem
    clients: frozenset[int]
    gone: frozenset[int] = frozenset()

    def __call__(self, predict: Predictor) -> dict[str, float | None]:
        """Accuracies in per cent and ``membership``; None where there are no samples.

        ``forget`` is on the training samples of those who leave, ``retain`` on those of the others; ``test`` on all
        test samples, ``test_own`` on classes of which those who leave have over 60 % of the training samples,
        ``test_others`` on the rest. ``membership`` is the area under the curve of telling their training samples
        from test samples in the same proportions of classes by the loss: 0.5 if nothing tells them apart.
        """
        everybody = frozenset(range(self.problem.num_clients)) - self.gone
        forget, retain = self._training(self.clients), self._training(everybody - self.clients)
        test = _joined([self.problem.test_samples(task) for task in self.problem.tasks])
        held = torch.bincount(forget.y, minlength=self.problem.num_classes)
        both = held + torch.bincount(retain.y, minlength=self.problem.num_classes)
        own = (held > OWN_SHARE * both)[test.y]
        parts = {
            "forget": forget,
            "retain": retain,
            "test": test,
            "test_own": Samples(test.x[own], test.y[own]),
            "test_others": Samples(test.x[~own], test.y[~own]),
        }
        seen = self.problem.tasks[-1].classes.stop
        found: dict[str, float | None] = {
            name: 100 * count_correct(predict, part, seen) / len(part) if len(part) else None
            for name, part in parts.items()
        }
        unseen = _joined(
            [
                self.problem.local_test_samples(client, task)
                for client in sorted(self.clients)
                for task in self.problem.tasks
            ]
        )
        both_there = len(forget) > 0 and len(unseen) > 0
        found["membership"] = (
            membership_auc(losses(predict, forget, seen), losses(predict, unseen, seen)) if both_there else None
        )
        return found

    def _training(self, clients: frozenset[int]) -> Samples:
        return _joined(
            [self.problem.train_samples(client, task) for client in sorted(clients) for task in self.problem.tasks]
        )


def _joined(parts: Sequence[Samples]) -> Samples:
    return Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


@torch.no_grad()
def losses(predict: Predictor, samples: Samples, seen: int) -> Tensor:
    """Cross-entropy of every sample over the classes seen so far, float64 [N]; infinite for impossible classes."""
    found = [
        F.cross_entropy(predict(batch.x)[:, :seen].cpu().double(), batch.y, reduction="none")
        for batch in batches(samples, EVALUATION_BATCH)
    ]
    return torch.cat(found).nan_to_num(nan=math.inf)


def membership_auc(members: Tensor, others: Tensor) -> float:
    """How likely a member's loss is below another's, ties counted half.

    Args:
        members: losses of samples that were trained on, [N].
        others: losses of samples that were not, [M].
    """
    ranks = rankdata(torch.cat([others, members]).numpy())
    above = ranks[: len(others)].sum() - len(others) * (len(others) + 1) / 2
    return float(above / (len(members) * len(others)))


@torch.no_grad()
def function_distance(one: Predictor, other: Predictor, samples: Samples, seen: int) -> float:
    """Mean total-variation distance, 0 to 1, of the class probabilities of two models."""
    total = 0.0
    for batch in batches(samples, EVALUATION_BATCH):
        found = [predict(batch.x)[:, :seen].cpu().double().softmax(dim=1).nan_to_num() for predict in (one, other)]
        total += float((found[0] - found[1]).abs().sum()) / 2
    return total / max(1, len(samples))


def compared(
    problem: Problem, method: FederatedMethod, states: Mapping[str, Payload], judge: Judge
) -> dict[str, dict[str, Any]]:
    """Accuracies of every state, and with one called ``gold`` how far the others are from it.

    Args:
        problem, method: of the run.
        states: ``before``, ``after``, with ``repaired`` and ``gold`` where they exist.
        judge: of the removal.
    """
    last = problem.tasks[-1]
    models = {name: method.predictor(state, last) for name, state in states.items()}
    found: dict[str, dict[str, Any]] = {"accuracy": {name: judge(predict) for name, predict in models.items()}}
    if "gold" not in states:
        return found
    test = _joined([problem.test_samples(task) for task in problem.tasks])
    others = [name for name in states if name != "gold"]
    found["distance"] = {
        name: function_distance(models[name], models["gold"], test, last.classes.stop) for name in others
    }
    if isinstance(method, Tangent):
        gold = method.tau(states["gold"])
        found["weight_distance"] = {
            name: math.sqrt(sum(float(np.square(tau - gold[key]).sum()) for key, tau in method.tau(state).items()))
            for name, state in states.items()
            if name != "gold"
        }
    return found
