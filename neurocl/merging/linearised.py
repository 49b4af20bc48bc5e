"""A network replaced by its first-order Taylor expansion around the weights that it started from.

``B`` batch, ``E`` outputs of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel


def unit_rows(embedding: Tensor) -> Tensor:
    """Rows of [B, E] scaled to unit length: the features whose drift TAK measures."""
    return F.normalize(embedding, dim=1)


def first_order(
    module: nn.Module,
    start: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    inputs: Tensor,
    output: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output at ``start`` and its derivative in the direction of ``deltas``, both [B, E], in one forward pass.

    Args:
        module: the network; parameters that ``deltas`` lacks are its own.
        start: parameters by name, at least those in ``deltas``.
        deltas: direction by parameter name; gradients flow back to it.
        inputs: [B, ...].
        output: applied to the network's output before the derivative is taken, such as a normalisation.
    """
    names = list(deltas)

    def forward(*values: Tensor) -> Tensor:
        found = functional_call(module, dict(zip(names, values, strict=True)), (inputs,))
        result: Tensor = found if output is None else output(found)
        return result

    # The fused attention kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH):
        found = jvp(forward, tuple(start[name] for name in names), tuple(deltas[name] for name in names))
    return found[0], found[1]


class Linearised(nn.Module):
    """``f(start) + J (parameters - start)``: the network as a linear function of its parameters.

    The parameters are those of ``module``, which is not copied: training it trains this, loading weights into it moves
    this.

    Args:
        module: the network.
        start: parameters around which it is expanded; a copy of the module's present ones if None.
        output: applied to the network's output and linearised with it.
    Reference: Ortiz-Jimenez, Favero and Frossard, "Task Arithmetic in the Tangent Space", NeurIPS 2023,
    arXiv 2305.12827.
    """

    def __init__(
        self,
        module: nn.Module,
        start: Mapping[str, Tensor] | None = None,
        output: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        own = dict(module.named_parameters())
        self.start = {name: (start or own)[name].detach().to(value).clone() for name, value in own.items()}
        self.output = output

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            # Forward-mode derivatives cannot be taken of inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                return self._expanded(inputs.clone())
        return self._expanded(inputs)

    def _expanded(self, inputs: Tensor) -> Tensor:
        deltas = {name: value - self.start[name] for name, value in self.module.named_parameters()}
        value, change = first_order(self.module, self.start, deltas, inputs, self.output)
        return value.detach() + change
