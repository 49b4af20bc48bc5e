"""Fed3R: ridge regression on a frozen backbone; its sums over clients are exactly those of all data together.

``C`` classes, ``c`` classes that a client has, ``d`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from neurocl.federated.class_table import CLASSES
from neurocl.federated.fedncm import cosine_predictor, normalised_rows, unseen_rows, with_rows
from neurocl.federated.local_training import features_of
from neurocl.federated.method import Client, FederatedMethod, MethodConfig, Phase, Place, Predictor, Reply, Store, Task
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload
from neurocl.merging.linear_algebra import solve_psd

GRAM, SUMS = "gram", "class.sums"
OWNERS = "class.owners"
EVERYBODY = "all"


class Fed3rConfig(MethodConfig):
    """Of Fed3R.

    Attributes:
        ridge: added to the diagonal of the second moments.
        forgettable: the server keeps every client's second moments, d x d numbers, so that it can forget one; else only
            their sum.
    """

    ridge: Annotated[float, Field(ge=0)] = 0.01
    forgettable: bool = False


class Fed3r(FederatedMethod):
    """Ridge regression on features, rows normalised: one message for each task, no training.

    Reference: Fani et al., "Accelerating heterogeneous federated learning with closed-form classifiers", ICML 2024,
    arXiv 2406.01116.
    """

    Config = Fed3rConfig
    config: Fed3rConfig
    reveals = "the second moments of a client's features and their sum over each class"

    def phases(self, task: Task) -> Sequence[Phase]:
        return (Phase("statistics", 1, train=False),)

    def initial_state(self) -> Payload:
        return Payload()

    def message(self, state: Payload, place: Place) -> Payload:
        # Everybody has the frozen backbone.
        return Payload()

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        features = features_of(self.problem.network(), client.data, client.device).double()
        classes, inverse = client.data.y.unique(return_inverse=True)
        sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64).index_add_(0, inverse, features)
        arrays = {GRAM: (features.mT @ features).float().numpy(), SUMS: sums.float().numpy()}
        return Payload(arrays, {"n": len(client.data), CLASSES: classes.tolist()})

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        numbers = reply.meta.get(CLASSES)
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            return "classes must be a list of class numbers"
        if any(number not in place.task.classes for number in numbers) or len(set(numbers)) < len(numbers):
            return "classes must be different ones of the task"
        size = self.problem.num_features
        for name, shape in {GRAM: (size, size), SUMS: (len(numbers), size)}.items():
            array = reply.arrays.get(name)
            if array is None:
                return f"{name} is missing"
            if array.dtype.name != "float32" or array.shape != shape:
                return f"{name} is {array.dtype} {list(array.shape)}, expected float32 {list(shape)}"
        return ""

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        arrays = dict(state.arrays)
        for reply in replies:
            owner = str(reply.client) if self.config.forgettable else EVERYBODY
            gram, classes = reply.payload.arrays[GRAM], np.array(reply.payload.meta[CLASSES], dtype=np.int64)
            sums, known = self._none(gram.shape[0])
            sums[classes], known[classes] = reply.payload.arrays[SUMS], True
            before = {name: arrays.get(f"{name}.{owner}") for name in ("gram", "sums", "known")}
            arrays[f"gram.{owner}"] = gram.astype(np.float64) if before["gram"] is None else before["gram"] + gram
            arrays[f"sums.{owner}"] = sums if before["sums"] is None else before["sums"] + sums
            arrays[f"known.{owner}"] = known if before["known"] is None else before["known"] | known
        return Payload(arrays, state.meta)

    def _none(self, num_features: int) -> tuple[NDArray[Any], NDArray[Any]]:
        shape = (self.problem.num_classes, num_features)
        return np.zeros(shape), np.zeros(shape[0], dtype=bool)

    def summed(self, state: Payload, place: Place) -> dict[str, tuple[int, ...]]:
        classes, size = len(place.task.classes), self.problem.num_features
        return {"n": (), GRAM: (size, size), SUMS: (classes, size), OWNERS: (classes,)}

    def summand(self, place: Place, reply: Payload) -> Store:
        """With sums over all classes of the task, so that nobody sees which a client has, and who has each counted."""
        sums = np.zeros((len(place.task.classes), self.problem.num_features))
        owners = np.zeros(len(sums))
        rows = np.array(reply.meta[CLASSES], dtype=np.int64) - place.task.classes.start
        sums[rows], owners[rows] = reply.arrays[SUMS], 1
        return {"n": np.array(reply.meta["n"]), GRAM: reply.arrays[GRAM], SUMS: sums, OWNERS: owners}

    def of_sum(self, state: Payload, place: Place, total: Store) -> Payload:
        rows = np.flatnonzero(total[OWNERS] > 0)
        arrays = {GRAM: total[GRAM].astype(np.float32), SUMS: total[SUMS][rows].astype(np.float32)}
        return Payload(arrays, {"n": int(total["n"]), CLASSES: (rows + place.task.classes.start).tolist()})

    def forget(self, state: Payload, client: int) -> Payload:
        if not self.config.forgettable:
            return super().forget(state, client)
        gone = {f"{name}.{client}" for name in ("gram", "sums", "known")}
        return Payload({name: array for name, array in state.arrays.items() if name not in gone}, state.meta)

    def totals(self, state: Payload) -> Store:
        """``gram`` [d, d], ``sums`` [C, d] and which classes are ``known`` [C], over all clients of the state."""
        size = self.problem.num_features
        gram = np.zeros((size, size))
        sums, known = self._none(size)
        for name, array in state.arrays.items():
            if name.startswith("gram."):
                gram += array
            elif name.startswith("sums."):
                sums += array
            else:
                known |= array
        return {"gram": gram, "sums": sums, "known": known}

    def classifier(self, state: Payload) -> Tensor:
        """Rows [C, d] of length one; NaN for classes that nobody has."""
        totals = {name: torch.from_numpy(array) for name, array in self.totals(state).items()}
        found = ridge_weights(totals["gram"], totals["sums"], self.config.ridge)
        return torch.where(totals["known"][:, None], found, unseen_rows(*found.shape))

    def predictor(self, state: Payload, task: Task) -> Predictor:
        return cosine_predictor(self.problem.network(), self.classifier(state))

    def folded(self, state: Payload, task: Task) -> Classifier:
        return with_rows(self.problem.network(), self.classifier(state))


def ridge_weights(gram: Tensor, sums: Tensor, ridge: float) -> Tensor:
    """Normalised rows of sums (gram + ridge I)^+, [C, d].

    Args:
        gram: second moments, not centred, [d, d].
        sums: of the features of every class, [C, d].
        ridge: absolute.
    """
    system = (gram + gram.mT) / 2 + ridge * torch.eye(len(gram), dtype=gram.dtype)
    return normalised_rows(solve_psd(system, sums.mT).mT)
