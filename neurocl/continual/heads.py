"""Finding and replacing the linear head of a network, whether it spikes or not."""

from __future__ import annotations

from torch import nn

from neurocl.errors import UserError


def head_owner(network: nn.Module) -> nn.Module:
    """The module that holds ``head`` and ``num_features``: the network, or the spiking one inside a classifier."""
    inner = getattr(network, "network", None)
    return inner if isinstance(inner, nn.Module) else network


def linear_head(network: nn.Module, *, wanted_by: str) -> nn.Linear:
    """The linear layer called ``head``.

    Raises:
        UserError: the backbone has none; the message names ``wanted_by``.
    """
    head = getattr(head_owner(network), "head", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{wanted_by} needs a backbone whose last layer is a linear `head`; this one has none")
    return head
