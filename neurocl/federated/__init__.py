"""Federated continual learning: clients keep their data."""

from typing import TYPE_CHECKING

from neurocl.lazy import lazy_attributes

if TYPE_CHECKING:
    from neurocl.federated.catalog import FEDERATED, PROBLEMS, method_for, problem_for
    from neurocl.federated.config import FederatedConfig, PrivacyConfig, SecureSumConfig
    from neurocl.federated.driver import FederatedRun, resume_federated, run_federated
    from neurocl.federated.exchange import Fault, ProcessExchange, SequentialExchange, Stores
    from neurocl.federated.export import Exported, export_model
    from neurocl.federated.method import Client, FederatedMethod, MethodConfig, Phase, Place, Reply, Samples, Task
    from neurocl.federated.model import FederatedModel, load_model
    from neurocl.federated.partition import PartitionConfig, split_task
    from neurocl.federated.payload import Payload, PayloadError, decode, encode, num_bytes
    from neurocl.federated.problem import Problem, Source
    from neurocl.federated.unlearning import unlearn

_HOMES = {
    "FEDERATED": "catalog",
    "PROBLEMS": "catalog",
    "method_for": "catalog",
    "problem_for": "catalog",
    "FederatedConfig": "config",
    "PrivacyConfig": "config",
    "SecureSumConfig": "config",
    "FederatedRun": "driver",
    "resume_federated": "driver",
    "run_federated": "driver",
    "Fault": "exchange",
    "ProcessExchange": "exchange",
    "SequentialExchange": "exchange",
    "Stores": "exchange",
    "Exported": "export",
    "export_model": "export",
    "Client": "method",
    "FederatedMethod": "method",
    "MethodConfig": "method",
    "Phase": "method",
    "Place": "method",
    "Reply": "method",
    "Samples": "method",
    "Task": "method",
    "FederatedModel": "model",
    "load_model": "model",
    "PartitionConfig": "partition",
    "split_task": "partition",
    "Payload": "payload",
    "PayloadError": "payload",
    "decode": "payload",
    "encode": "payload",
    "num_bytes": "payload",
    "Problem": "problem",
    "Source": "problem",
    "unlearn": "unlearning",
}

__all__ = [
    "FEDERATED",
    "PROBLEMS",
    "Client",
    "Exported",
    "Fault",
    "FederatedConfig",
    "FederatedMethod",
    "FederatedModel",
    "FederatedRun",
    "MethodConfig",
    "PartitionConfig",
    "Payload",
    "PayloadError",
    "Phase",
    "Place",
    "PrivacyConfig",
    "Problem",
    "ProcessExchange",
    "Reply",
    "Samples",
    "SecureSumConfig",
    "SequentialExchange",
    "Source",
    "Stores",
    "Task",
    "decode",
    "encode",
    "export_model",
    "load_model",
    "method_for",
    "num_bytes",
    "problem_for",
    "resume_federated",
    "run_federated",
    "split_task",
    "unlearn",
]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
