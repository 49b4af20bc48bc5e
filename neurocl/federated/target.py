"""TARGET: clients rehearse earlier tasks on samples that the server makes out of its own model.

``S`` synthetic samples of a task, ``C`` classes, ``B`` batch.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import EVALUATION_BATCH, Loss, batches
from neurocl.federated.lwf import distillation
from neurocl.federated.method import Client, Place, Samples, Task
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload
from neurocl.federated.randomness import torch_stream
from neurocl.federated.synthesis import SynthesisConfig, synthesize

SAMPLES, SCORES = "synthetic.x", "synthetic.scores"


class TargetConfig(FedAvgConfig):
    """Of TARGET.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        distillation: weight of the distillation on synthetic samples; 0 is FedAvg.
        temperature: of it.
        synthesis: how the samples are made.
    """

    distillation: Annotated[float, Field(ge=0)] = 25.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    synthesis: SynthesisConfig = SynthesisConfig()


class Target(FedAvg):
    """At the end of a task the server makes samples of its classes; the scores of all of them are its model's then.

    In later tasks every message carries all samples so far and their scores, and every step of a client distils the
    scores of the old classes on a batch of them.

    Reference: Zhang et al., "TARGET: federated class-continual learning via exemplar-free distillation", ICCV 2023,
    arXiv 2303.06937.
    """

    Config = TargetConfig
    config: TargetConfig

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        plain = super().loss(network, client, place, message)
        if SAMPLES not in message.arrays or self.config.distillation == 0:
            return plain
        samples, scores = (torch.tensor(message.arrays[name]) for name in (SAMPLES, SCORES))
        generator = client.generator(place, "synthetic")
        size, first = self.problem.config.batch_size, place.task.classes.start

        def loss(x: Tensor, y: Tensor) -> Tensor:
            rows = torch.randint(len(samples), (size,), generator=generator)
            found, wanted = network(samples[rows].to(client.device)), scores[rows].to(client.device)
            kept = distillation(found[:, :first], wanted, self.config.temperature)
            return plain(x, y) + self.config.distillation * kept

        return loss

    def end_task(self, state: Payload, task: Task) -> Payload:
        if task == self.problem.tasks[-1] or self.config.distillation == 0:
            return state
        made = synthesize(
            self.loaded(state),
            self.network(),
            task.classes,
            self.problem.source.test.x.shape[1:],
            self.config.synthesis,
            torch_stream(self.problem.config.seed, "server synthesis", task.index),
            device=self.problem.config.device,
        )
        own = made.float().cpu().numpy()
        samples = np.concatenate([state.arrays[SAMPLES], own]) if SAMPLES in state.arrays else own
        return Payload({**state.arrays, SAMPLES: samples, SCORES: self._scores(state, task, samples)}, state.meta)

    def _scores(self, state: Payload, task: Task, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of the classes seen so far, [S, C]."""
        predict, x = self.predictor(state, task), torch.from_numpy(samples)
        rows = Samples(x, torch.zeros(len(x), dtype=torch.int64))
        found = [predict(batch.x)[:, : task.classes.stop].cpu() for batch in batches(rows, EVALUATION_BATCH)]
        return torch.cat(found).numpy()
