"""Starting values of a run by benchmark, method and memory size, before anything the user says.

Sources: the STAER code for spiking networks; for ordinary ones the hyper-parameters that the
Mammoth framework publishes for the papers' tables (SGD without momentum). No values were found for
ER-ACE and joint training there: they start from those of ER and SGD.
"""

from __future__ import annotations

from typing import Any

# (benchmark, method) -> learning rate; values per memory size are keyed 200, 500, 5120
RATES: dict[tuple[str, str], float | dict[int, float]] = {
    ("seq-mnist", "sgd"): 0.03,
    ("seq-mnist", "joint"): 0.03,
    ("seq-mnist", "er"): {200: 0.01, 500: 0.1, 5120: 0.1},
    ("seq-mnist", "er-ace"): {200: 0.01, 500: 0.1, 5120: 0.1},
    ("seq-mnist", "der"): {200: 0.03, 500: 0.03, 5120: 0.1},
    ("seq-mnist", "derpp"): {200: 0.03, 500: 0.03, 5120: 0.1},
    ("seq-mnist", "icarl"): 0.1,
    ("seq-mnist", "ewc-online"): 0.03,
    ("seq-mnist", "lwf"): 0.03,
    ("seq-cifar10", "sgd"): 0.1,
    ("seq-cifar10", "joint"): 0.1,
    ("seq-cifar10", "er"): 0.1,
    ("seq-cifar10", "er-ace"): 0.1,
    ("seq-cifar10", "der"): 0.03,
    ("seq-cifar10", "derpp"): 0.03,
    ("seq-cifar10", "icarl"): {200: 0.1, 500: 0.1, 5120: 0.03},
    ("seq-cifar10", "ewc-online"): 0.03,
    ("seq-cifar10", "lwf"): 0.01,
}

OPTIONS: dict[tuple[str, str], dict[str, float | dict[int, float]]] = {
    ("seq-mnist", "der"): {"alpha": {200: 0.2, 500: 1.0, 5120: 0.5}},
    ("seq-mnist", "derpp"): {
        "alpha": {200: 0.2, 500: 1.0, 5120: 0.2},
        "beta": {200: 1.0, 500: 0.5, 5120: 0.5},
    },
    ("seq-mnist", "ewc-online"): {"penalty": 90.0},
    ("seq-mnist", "lwf"): {"alpha": 1.0},
    ("seq-cifar10", "der"): {"alpha": 0.3},
    ("seq-cifar10", "derpp"): {
        "alpha": {200: 0.1, 500: 0.2, 5120: 0.1},
        "beta": {200: 0.5, 500: 0.5, 5120: 1.0},
    },
    ("seq-cifar10", "ewc-online"): {"penalty": 10.0},
    ("seq-cifar10", "lwf"): {"alpha": 3.0},
}

REPLAY: dict[tuple[str, str], dict[int, int]] = {
    ("seq-mnist", "er"): {200: 10, 500: 10, 5120: 10},
    ("seq-mnist", "der"): {200: 10, 500: 128, 5120: 128},
    ("seq-mnist", "derpp"): {200: 128, 500: 10, 5120: 64},
}

BACKBONES = {
    "continual": {"seq-digits": "mlp", "seq-mnist": "mlp", "seq-fashion-mnist": "mlp", "seq-kmnist": "mlp"},
    "spiking": {"seq-digits": "spiking-mlp", "seq-nmnist": "spiking-resnet-small"},
}
DEFAULT_BACKBONE = {"continual": "resnet18", "spiking": "spiking-resnet19"}


def _by_memory(value: Any, buffer_size: int) -> Any:
    """The entry of the published memory size nearest to ``buffer_size`` on a ratio scale."""
    if not isinstance(value, dict):
        return value
    return value[min(value, key=lambda size: max(size / buffer_size, buffer_size / size))]


def starting_values(
    area: str, method: str, dataset: str, buffer_size: int, *, epochs: int, batch_size: int, augment: str
) -> dict[str, Any]:
    """Values for ``method`` on ``dataset``; epochs, batch size and augmentation are the benchmark's."""
    values: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "replay_batch": batch_size,
        "augment": augment,
        "backbone": BACKBONES[area].get(dataset, DEFAULT_BACKBONE[area]),
    }
    if area == "spiking":
        return values
    key = (dataset, method)
    rate = _by_memory(RATES.get(key, 0.1), buffer_size)
    values["optimizer"] = {"lr": rate}
    if key in OPTIONS:
        values["options"] = {name: _by_memory(value, buffer_size) for name, value in OPTIONS[key].items()}
    if method == "lwf" and dataset in ("seq-mnist", "seq-cifar10"):
        values["optimizer"]["weight_decay"] = 5e-4
    if key in REPLAY:
        values["replay_batch"] = _by_memory(REPLAY[key], buffer_size)
    if dataset == "seq-cifar100":
        values |= {"schedule": "multistep", "milestones": [35, 45]}
    return values
