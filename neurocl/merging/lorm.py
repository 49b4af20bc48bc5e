"""LoRM: closed-form merging of LoRA factors whose other factor is shared, and of the modules of successive tasks.

``N`` clients, ``o`` outputs, ``d`` inputs, ``r`` rank; a module is B A with B [o, r] and A [r, d]; the Gram matrix
G_i = X_i^T X_i [d, d] of the inputs of client i is a sum over its rows; its diagonal [d] alone will do everywhere.

min over (A, B) of sum_i ||(B A - B_i A_i) X_i^T||^2 has one solution when one of the factors is the same for everybody.

Reference: Salami, Buzzega, Mosconi et al., "Closed-form merging of parameter-efficient modules for federated continual
learning", ICLR 2025, arXiv 2410.17961.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neurocl.merging.linear_algebra import solve_psd
from neurocl.merging.regmean import divided, merge_responses, shrunk

Unseen = Literal["mean", "zero"]


def merge_b(
    A: Tensor, Bs: Tensor, grams: Tensor, *, off_diagonal: float = 1.0, ridge: float = 0.0, unseen: Unseen = "mean"
) -> Tensor:
    """Merge the B factors of clients that share A: B = (sum B_i A G_i A^T)(A (sum G_i) A^T)^+, an r x r system.

    Args:
        A: the shared factor, [r, d].
        Bs: the clients' factors, [N, o, r].
        grams: [N, d, d], or their diagonals [N, d].
        off_diagonal: factor on the entries off the diagonal of the Gram matrices, 0 to 1.
        ridge: pull towards the mean factor, relative to the mean of the system's diagonal.
        unseen: what directions without data get: the clients' mean, or zero as with a plain pseudo-inverse.
    Returns: [o, r].
    Raises: ValueError if the shapes do not fit.
    """
    if A.ndim != 2 or Bs.ndim != 3 or Bs.shape[2] != A.shape[0] or grams.shape[-1] != A.shape[1]:
        raise ValueError(
            f"A [r, d], Bs [N, o, r] and grams [N, d, d] expected, got {A.shape}, {Bs.shape}, {grams.shape}"
        )
    return _solve(Bs, projected(A, shrunk(grams, off_diagonal)), ridge, unseen)


def merge_a(
    As: Tensor, grams: Tensor, *, off_diagonal: float = 1.0, ridge: float = 0.0, unseen: Unseen = "mean"
) -> Tensor:
    """Merge the A factors of clients that share B: A = (sum A_i G_i)(sum G_i)^+, whatever B of full column rank.

    With diagonals (or ``off_diagonal=0``) every column is the average of the clients', weighted by how much each of
    them uses that input.

    Args:
        As: the clients' factors, [N, r, d].
        grams: [N, d, d], or their diagonals [N, d].
        off_diagonal: factor on the entries off the diagonal of the Gram matrices, 0 to 1.
        ridge: pull towards the mean factor, relative to the mean of the system's diagonal.
        unseen: what directions without data get: the clients' mean, or zero as with a plain pseudo-inverse.
    Returns: [r, d].
    Raises: ValueError if the shapes do not fit.
    """
    return _solve(As, shrunk(grams, off_diagonal), ridge, unseen)


def regmean_weights(
    weights: Tensor, grams: Tensor, *, off_diagonal: float = 1.0, ridge: float = 0.0, unseen: Unseen = "mean"
) -> Tensor:
    """Merge full matrices [N, o, d] the same way: W = (sum W_i G_i)(sum G_i)^+; arguments as in :func:`merge_a`."""
    return _solve(weights, shrunk(grams, off_diagonal), ridge, unseen)


def projected(A: Tensor, grams: Tensor) -> Tensor:
    """A G_i A^T [N, r, r] for Gram matrices [N, d, d] or diagonals [N, d]: what a client has to send in a B round."""
    A, grams = A.double(), grams.double()
    return (A * grams.unsqueeze(1) if grams.ndim == 2 else A @ grams) @ A.T


def _solve(factors: Tensor, grams: Tensor, ridge: float, unseen: Unseen) -> Tensor:
    """(sum F_i G_i)(sum G_i)^+ in float64, answered in the dtype of ``factors`` [N, k, d]."""
    work, grams = factors.double(), grams.double()
    if unseen == "mean":
        return merge_responses(work, grams, ridge=ridge).to(factors.dtype)
    total = grams.sum(0)
    if grams.ndim == 2:
        right = (work * grams.unsqueeze(1)).sum(0)
        merged = divided(right, total + ridge * total.mean())
    else:
        merged = solve_psd(total, torch.einsum("nod,nde->eo", work, grams), ridge=ridge).T
    return merged.to(factors.dtype)


@dataclass
class RunningTaskMerge:
    """The merge of the modules of all tasks so far, in memory that does not grow with their number.

    Delta = (sum B_t A_t G_t)(sum G_t)^+, kept as running sums in float64; ``mean`` is the plain mean of B_t A_t, which
    directions without data get.

    Attributes:
        numerator: sum of B_t A_t G_t, [o, d].
        gram: sum of G_t, [d, d], or [d] when only diagonals are kept.
        total: sum of B_t A_t, [o, d].
        num_tasks: how many there were.
    """

    numerator: Tensor
    gram: Tensor
    total: Tensor
    num_tasks: int = 0

    @classmethod
    def empty(
        cls, num_outputs: int, num_inputs: int, *, diagonal: bool = False, device: torch.device | str = "cpu"
    ) -> RunningTaskMerge:
        """Sums for a layer [num_outputs, num_inputs] before the first task."""
        shape = (num_inputs,) if diagonal else (num_inputs, num_inputs)
        return cls(
            torch.zeros(num_outputs, num_inputs, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(num_outputs, num_inputs, dtype=torch.float64, device=device),
        )

    def add(self, B: Tensor, A: Tensor, gram: Tensor, *, off_diagonal: float = 1.0) -> None:
        """Take in the module of one task.

        Args:
            B: [o, r].
            A: [r, d].
            gram: of the task, summed over its clients, [d, d]; only its diagonal is read if diagonals are kept.
            off_diagonal: factor on its entries off the diagonal, 0 to 1.
        Raises: ValueError if the shapes do not fit, or full Gram matrices are kept and a diagonal is given.
        """
        update = B.to(self.total) @ A.to(self.total)
        gram = gram.to(self.gram)
        if self.gram.ndim == 1 and gram.ndim == 2:
            gram = gram.diagonal()
        elif gram.ndim == 2:
            mask = torch.full_like(gram, off_diagonal).fill_diagonal_(1)
            gram = gram * mask
        if gram.shape != self.gram.shape or update.shape != self.total.shape:
            raise ValueError(f"a module {list(self.total.shape)} with Gram {list(self.gram.shape)} expected")
        self.numerator += update * gram if gram.ndim == 1 else update @ gram
        self.gram += gram
        self.total += update
        self.num_tasks += 1

    def value(self, *, unseen: Unseen = "mean") -> Tensor:
        """Delta [o, d] in float64, to be added to the frozen weight.

        Raises: ValueError before the first task.
        """
        if not self.num_tasks:
            raise ValueError("no task has been added")
        anchor = self.total / self.num_tasks if unseen == "mean" else torch.zeros_like(self.total)
        if self.gram.ndim == 1:
            return anchor + divided(self.numerator - anchor * self.gram, self.gram)
        right = self.numerator - anchor @ self.gram
        return anchor + solve_psd(self.gram, right.T).T
