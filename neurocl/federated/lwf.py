"""LwF: clients keep the scores that the last task's model gave to the old classes on their new samples."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import Loss
from neurocl.federated.method import Client, Place, Task
from neurocl.federated.network import Classifier, evaluating
from neurocl.federated.payload import Payload

TEACHER = "teacher."


class LwfConfig(FedAvgConfig):
    """Of LwF.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        distillation: weight of the distillation loss; 0 is FedAvg.
        temperature: of the distillation.
        classes: distil the old classes, or those of the current task as the published federated code does.
    """

    distillation: Annotated[float, Field(ge=0)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 2.0
    classes: Literal["old", "task"] = "old"


class Lwf(FedAvg):
    """From the second task on the server's model of the last task, sent along with the weights, is the teacher.

    Reference: Li and Hoiem, "Learning without forgetting", ECCV 2016, arXiv 1606.09282.
    """

    Config = LwfConfig
    config: LwfConfig

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        known = {name: array for name, array in message.arrays.items() if name.startswith(TEACHER)}
        if not known or self.config.distillation == 0:
            return super().loss(network, client, place, message)
        teacher = self.loaded(Payload({name.removeprefix(TEACHER): array for name, array in known.items()}))
        first, last = place.task.classes.start, place.task.classes.stop
        distilled = slice(0, first) if self.config.classes == "old" else slice(first, last)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            logits = network(x)
            with evaluating(teacher):
                wanted = teacher(x)[:, distilled]
            kept = distillation(logits[:, distilled], wanted, self.config.temperature)
            return F.cross_entropy(logits[:, first:last], y - first) + self.config.distillation * kept

        return loss

    def end_task(self, state: Payload, task: Task) -> Payload:
        teacher = {TEACHER + name: state.arrays[name] for name in self._names}
        return Payload({**state.arrays, **teacher}, state.meta)


def distillation(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the probabilities of teacher and student to the power of 1/T, renormalised; mean over B.

    Its gradient with respect to the logits is (softmax(logits / T) - softmax(wanted / T)) / (T B).

    Args:
        logits: of the student, [B, C].
        wanted: of the teacher, [B, C].
        temperature: T.
    """
    targets = torch.softmax(wanted / temperature, dim=1)
    return -(targets * torch.log_softmax(logits / temperature, dim=1)).sum(dim=1).mean()
