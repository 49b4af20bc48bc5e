"""Decompositions that merges share: polar factor, truncated SVD, and the solution of a positive semi-definite system.

All of them work in float64, whatever they are given, and answer in the dtype of their input; leading dimensions
are batches.

``m``, ``n`` rows and columns of a matrix, ``r = min(m, n)``, ``k`` singular triplets kept.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SvdSolver = Literal["exact", "randomized"]

OVERSAMPLING = 16
POWER_ITERATIONS = 4
# Eigenvalues of a Gram matrix below this share of the largest carry no digit that can be trusted.
SMALLEST_EIGENVALUE = 1e-13
# Singular vectors that belong to larger eigenvalues than this share are orthogonal to 1e-11 as they come.
SAFE_EIGENVALUE = 1e-5
# Largest departure from orthogonality whose square, the error of a first-order correction, is still harmless.
LARGEST_CORRECTION = 1e-5


def polar(matrix: Tensor, *, rank_tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """The semi-orthogonal matrix nearest to ``matrix``, and the singular values.

    With the thin SVD ``matrix = U diag(s) V^T`` the factor is ``U V^T``. It is computed from the eigenvectors of the
    float64 Gram matrix of the shorter side, about twice as fast as an SVD; their loss of orthogonality for small
    singular values is measured and corrected. What is too close to rank deficiency for that goes through an SVD.

    Args:
        matrix: [..., m, n].
        rank_tolerance: singular directions below this share of the largest singular value are left out of the factor.
    Returns: the factor [..., m, n], and the singular values [..., r] in descending order, those left out included.
    Raises: ValueError if there are fewer than two dimensions.
    """
    if matrix.ndim < 2:
        raise ValueError(f"a matrix expected, got the shape {tuple(matrix.shape)}")
    if matrix.shape[-2] < matrix.shape[-1]:
        factor, values = polar(matrix.mT, rank_tolerance=rank_tolerance)
        return factor.mT, values
    shape = (*matrix.shape[:-2], matrix.shape[-1])
    if matrix.numel() == 0:
        return matrix.clone(), matrix.new_zeros(shape)
    tall = matrix.to(torch.float64).reshape(-1, *matrix.shape[-2:])
    factor, values, failed = _gram_polar(tall)
    failed |= values[:, -1] < rank_tolerance * values[:, 0]
    if failed.any():
        left, values[failed], right = torch.linalg.svd(tall[failed], full_matrices=False)
        kept = values[failed] >= rank_tolerance * values[failed][:, :1]
        factor[failed] = (left * kept.unsqueeze(-2)) @ right
    return factor.reshape(matrix.shape).to(matrix.dtype), values.reshape(shape).to(matrix.dtype)


def _gram_polar(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor [b, m, n], descending singular values [b, n], and which of the batch [b] must not be used.

    The columns of ``tall @ vectors`` should be orthogonal; those of small norm d_j are so only up to
    F_ij ~ eps d_max^2 / (d_i d_j). With C the columns scaled to length one, the polar factor is
    C (I - Y) vectors^T, Y_ij = F_ij d_i / (d_i + d_j), up to terms of second order in F.
    """
    eigenvalues, vectors = torch.linalg.eigh(tall.mT @ tall)
    largest = eigenvalues[:, -1:]
    failed = eigenvalues[:, 0] <= SMALLEST_EIGENVALUE * largest[:, 0]
    num_small = int((eigenvalues < SAFE_EIGENVALUE * largest).sum(dim=-1).amax())
    if failed.all():
        return torch.empty_like(tall), torch.empty_like(eigenvalues), failed
    if not num_small:
        norms = eigenvalues.sqrt()
        return tall @ ((vectors / norms.unsqueeze(-2)) @ vectors.mT), norms.flip(-1), failed
    columns = tall @ vectors
    norms = torch.linalg.vector_norm(columns, dim=-2)
    columns /= torch.where(norms > 0, norms, 1).unsqueeze(-2)
    overlap = columns.mT @ columns[..., :num_small]
    overlap.diagonal(dim1=-2, dim2=-1).zero_()
    failed |= torch.linalg.matrix_norm(overlap) > LARGEST_CORRECTION
    sums = norms.unsqueeze(-1) + norms[:, :num_small].unsqueeze(-2)
    share = overlap * norms.unsqueeze(-1) / torch.where(sums > 0, sums, 1)
    rotation = vectors.mT - share @ vectors.mT[:, :num_small]
    rotation[:, :num_small] -= (overlap - share)[:, num_small:].mT @ vectors.mT[:, num_small:]
    return columns @ rotation, norms.sort(dim=-1, descending=True).values, failed


def truncated_svd(
    matrix: Tensor, rank: int, *, svd: SvdSolver = "exact", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets.

    ``randomized`` looks for them in the range of the matrix applied to ``rank + 16`` random vectors, after four power
    iterations with orthonormalisation: faster when the rank is small, exact up to the decay of the spectrum.

    Args:
        matrix: [..., m, n].
        rank: triplets wanted; at most r are there.
        svd: how they are computed.
        seed: of the random vectors, which do not depend on the device.
    Returns: U [..., m, k], singular values [..., k] in descending order, V^T [..., k, n].
    Raises: ValueError if the rank is negative.
    Reference: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011, algorithm 4.4.
    """
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    wide = matrix.to(torch.float64)
    smaller = min(matrix.shape[-2:])
    if svd == "exact" or rank + OVERSAMPLING >= smaller:
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        probes = torch.randn(matrix.shape[-1], rank + OVERSAMPLING, dtype=torch.float64, generator=generator)
        span = torch.linalg.qr(wide @ probes.to(matrix.device)).Q
        for _ in range(POWER_ITERATIONS):
            span = torch.linalg.qr(wide @ torch.linalg.qr(wide.mT @ span).Q).Q
        left, values, right = torch.linalg.svd(span.mT @ wide, full_matrices=False)
        left = span @ left
    kept = (left[..., :rank], values[..., :rank], right[..., :rank, :])
    return kept[0].to(matrix.dtype), kept[1].to(matrix.dtype), kept[2].to(matrix.dtype)


def column_basis(matrix: Tensor, *, rank_tolerance: float = 1e-12) -> Tensor:
    """An orthonormal basis [m, k] of the span of the columns of ``matrix`` [m, n], k their numerical rank."""
    span, triangle = torch.linalg.qr(matrix.to(torch.float64))
    left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
    num_kept = int((values > rank_tolerance * values[:1]).sum())
    basis: Tensor = span @ left[:, :num_kept]
    return basis.to(matrix.dtype)


def solve_psd(system: Tensor, right: Tensor, *, ridge: float = 0.0, cutoff: float = 1e-10) -> Tensor:
    """Solve ``(system + ridge mean(diag system) I) x = right`` for a symmetric positive semi-definite system.

    With a ridge by Cholesky; without one, or where Cholesky fails, by the pseudo-inverse, so that directions the
    system says nothing about get zero. To get something else there, solve for the deviation from it.

    Args:
        system: [..., d, d], symmetric.
        right: [..., d, k].
        ridge: relative to the mean of the diagonal.
        cutoff: the pseudo-inverse ignores eigenvalues below ``cutoff`` times the largest.
    Returns: [..., d, k] in the dtype of ``right``.
    Raises: ValueError if the shapes do not fit or the ridge is negative.
    """
    if system.ndim < 2 or system.shape[-1] != system.shape[-2] or right.shape[:-1] != system.shape[:-1]:
        raise ValueError(
            f"a system [..., d, d] and right-hand sides [..., d, k] expected, got {system.shape} and {right.shape}"
        )
    if ridge < 0:
        raise ValueError(f"ridge must be at least 0, got {ridge}")
    if right.numel() == 0:
        return torch.zeros_like(right)
    matrices = system.to(torch.float64).reshape(-1, *system.shape[-2:])
    sides = right.to(torch.float64).reshape(-1, *right.shape[-2:])
    if ridge == 0:
        return _solve_pseudo(matrices, sides, cutoff).reshape(right.shape).to(right.dtype)
    matrices = matrices.clone()
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean(dim=-1, keepdim=True)
    factor, failure = torch.linalg.cholesky_ex(matrices)
    solution = torch.cholesky_solve(sides, factor)
    failed = (failure != 0) | ~solution.isfinite().all(dim=-1).all(dim=-1)
    if failed.any():
        solution[failed] = _solve_pseudo(matrices[failed], sides[failed], cutoff)
    return solution.reshape(right.shape).to(right.dtype)


def _solve_pseudo(matrices: Tensor, sides: Tensor, cutoff: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrices)
    kept = values > cutoff * values[..., -1:].clamp(min=0)
    inverse = torch.where(kept, values, 1).reciprocal() * kept
    solution: Tensor = vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ sides))
    return solution
