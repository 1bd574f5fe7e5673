"""How far two samples of points are apart: the Frechet distance of the Gaussians that have their moments.

Shapes: n points of d coordinates, k of them kept; float64 throughout.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """A normal distribution: mean (k,) and covariance (k, k), both float64."""

    mean: Tensor
    covariance: Tensor


def principal_components(x: Tensor, count: int) -> Tensor:
    """The directions in which points vary most.

    Args:
        x: (n, d) float64.
        count: how many; at most n - 1 (but one) and d are given.

    Returns:
        (d, k) float64, orthonormal, the first component first.
    """
    centred = x - x.mean(dim=0)
    k = min(count, max(len(x) - 1, 1), x.shape[1])
    if len(x) > x.shape[1]:
        return leading(centred.T @ centred, k)
    # The smaller matrix of inner products has the same spectrum; QR keeps the order, and mends lengths.
    orthonormal: Tensor = torch.linalg.qr(centred.T @ leading(centred @ centred.T, k)).Q
    return orthonormal


def leading(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, the largest first, as columns."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -count:].flip(1)


def gaussian(x: Tensor) -> Gaussian:
    """The mean and the covariance (1 / (n - 1)) of points (n, k); that of a single one is zero."""
    mean = x.mean(dim=0)
    return Gaussian(mean, (x - mean).T @ (x - mean) / max(len(x) - 1, 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians; NaN where one is not finite.

    |m - m'|² + tr(C + C' - 2 (C^½ C' C^½)^½), Dowson & Landau 1982. With C = F Fᵀ and C' = F' F'ᵀ the trace of the root
    is the sum of the singular values of Fᵀ F', which asks for no root of a product that rounding makes indefinite.
    """
    if not all(part.isfinite().all() for part in (*one, *other)):
        return float("nan")
    shared = torch.linalg.svdvals(factor(one.covariance).T @ factor(other.covariance)).sum()
    spread = one.covariance.trace() + other.covariance.trace() - 2 * shared
    return max(float((one.mean - other.mean).square().sum() + spread), 0.0)


def factor(covariance: Tensor) -> Tensor:
    """F (k, k) with F Fᵀ = covariance, for one that may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    scaled: Tensor = vectors * values.clamp(min=0).sqrt()
    return scaled
