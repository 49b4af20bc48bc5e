"""Joint: all samples of all tasks in one place, an upper bound for federations."""

from __future__ import annotations

from neurocl.errors import UserError
from neurocl.federated.config import FederatedConfig
from neurocl.federated.fedavg import FedAvg
from neurocl.federated.partition import PartitionConfig


class Joint(FedAvg):
    """One client, one task: every sample is seen in as many epochs as in a federation with the same configuration."""

    sum_only = False
    reveals = "everything: there is no federation"

    @classmethod
    def arranged(cls, config: FederatedConfig) -> FederatedConfig:
        """The configuration with one client and one task; how many there were does not matter.

        Raises:
            UserError: privacy of clients is asked for.
        """
        if config.privacy is not None:
            raise UserError("joint puts the samples of all clients in one place: it has no privacy to offer")
        alone = PartitionConfig(kind="iid", num_clients=1)
        return config.model_copy(
            update={"classes_per_task": 0, "partition": alone, "participation": 1.0, "min_clients": 1}
        )
