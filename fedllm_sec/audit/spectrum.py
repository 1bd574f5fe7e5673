"""What products look like, from the inner products of their factors: singular values and tails, none of them formed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm_sec.updates.products import Stack

KEPT = 4  # singular directions of which the entries' fourth moment is taken
TINY = 1e-14  # of the largest eigenvalue: what is smaller is rounding


class Spectrum(NamedTuple):
    """Of one module, for k adapters: each (k,) float64.

    Attributes:
        top1: the share of the squared norm in the largest singular value.
        rank: the effective rank, exp(entropy of the shares) (Roy and Vetterli 2007).
        kurtosis: E[d^4] / E[d^2]^2 over the entries of the best approximation of rank 4.
        gauge: log10 of ||B|| / ||A||, as sent, without the scaling.
        moved: by how much (log10) A became shorter than the global adapter's and B longer, or the other way round, the
            smaller of both; 0 where both became longer, and without a global adapter.
        aligned: the cosine of A with the global adapter's A; NaN without one.
        slack: the length that the lengths of the factors' movement allow, over that of the product; 1 at rest.
    """

    top1: Tensor
    rank: Tensor
    kurtosis: Tensor
    gauge: Tensor
    moved: Tensor
    aligned: Tensor
    slack: Tensor


def spectrum(stack: Stack, inner: tuple[Tensor, Tensor], rows: Sequence[int], scalings: Tensor) -> Spectrum:
    """Measure the products of some rows of a stack.

    Args:
        stack: the factors, side by side; all rows are of one rank.
        inner: as `Stack.inner` gives them.
        rows: which.
        scalings: of each row of the stack, which its left factors contain.
    """
    p, q = (matrix.cpu() for matrix in inner)
    rank = len(stack.owner) // (int(stack.owner.max()) + 1)
    own = torch.arange(len(stack.owner)).view(-1, rank)[list(rows)]
    partner = stack.partner.view(-1, rank)[list(rows)]
    anchored = bool((partner < len(p) - 1).any())
    left, right = column_products(p, own, partner, anchored), row_products(q, own, partner, anchored)
    roots = Roots.of(left)
    squares, directions = torch.linalg.eigh(roots.root @ right @ roots.root)
    squares = squares.clamp(min=0)
    total = squares.sum(dim=1)
    shares = squares / total.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1)
    live = total > 0
    nothing = torch.full_like(total, torch.nan)
    whole_b = trace(p, own, own) + 2 * trace(p, own, partner) + trace(p, partner, partner)
    whole_a = trace(q, own, own) + 2 * trace(q, own, partner) + trace(q, partner, partner)
    start = trace(q, partner, partner)
    allowed = stack.allowed(p, q)[list(rows)]
    length = total.sqrt()
    return Spectrum(
        torch.where(live, shares[:, -1], nothing),
        torch.where(live, entropy.exp(), nothing),
        torch.where(live, kurtosis(stack, own, partner, anchored, roots, directions), nothing),
        0.5 * log10(whole_b / scalings[list(rows)].square(), whole_a),
        opposite(0.5 * log10(whole_a, start), 0.5 * log10(whole_b, trace(p, partner, partner))),
        torch.where(start > 0, (start + trace(q, own, partner)) / (start * whole_a).sqrt(), nothing),
        torch.where(allowed > 0, allowed / length, torch.ones_like(length)),
    )


class Roots(NamedTuple):
    """The symmetric square roots of some (k, c, c) matrices, and their inverses where they have one."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, matrices: Tensor) -> "Roots":
        """By their eigenvectors; what is rounding is taken to be zero."""
        values, vectors = torch.linalg.eigh(matrices)
        cut = TINY * values[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
        roots = values.clamp(min=0).sqrt()
        inverses = torch.where(values > cut, values.clamp(min=0).rsqrt(), 0.0)
        return cls((vectors * roots[:, None]) @ vectors.mT, (vectors * inverses[:, None]) @ vectors.mT)


def column_products(p: Tensor, own: Tensor, partner: Tensor, anchored: bool) -> Tensor:
    """(k, c, c) inner products of each row's left factor [x, B_g], or x alone."""
    columns = torch.cat([own, partner], dim=1) if anchored else own
    return p[columns[:, :, None], columns[:, None, :]]


def row_products(q: Tensor, own: Tensor, partner: Tensor, anchored: bool) -> Tensor:
    """(k, c, c) inner products of each row's right factor [A_g + y; y], or A alone."""
    between = [[q[one[:, :, None], other[:, None, :]] for other in (own, partner)] for one in (own, partner)]
    (oo, op), (po, pp) = between
    if not anchored:
        return oo
    whole = torch.cat([torch.cat([oo + op + po + pp, oo + po], dim=2), torch.cat([oo + op, oo], dim=2)], dim=1)
    return (whole + whole.mT) / 2


def trace(matrix: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """(k,) sums of the inner products of each row's vectors with their counterparts."""
    return matrix[one, other].sum(dim=1)


def log10(above: Tensor, below: Tensor) -> Tensor:
    """log10 of a ratio; where one is zero, NaN."""
    fine = (above > 0) & (below > 0)
    ratio = torch.where(fine, above, 1.0) / torch.where(fine, below, 1.0)
    return torch.where(fine, ratio.log10(), torch.nan)


def opposite(a: Tensor, b: Tensor) -> Tensor:
    """The smaller of two changes in opposite directions, with the sign of the first; a B that was zero has grown."""
    b = torch.where(b.isnan(), torch.inf, b)
    smaller = torch.minimum(a.abs(), b.abs()) * a.sign()
    return torch.where(a * b < 0, smaller, torch.zeros_like(smaller))


def kurtosis(stack: Stack, own: Tensor, partner: Tensor, anchored: bool, roots: Roots, directions: Tensor) -> Tensor:
    """(k,) the kurtosis of the entries of U S Vᵀ, of the largest singular values.

    sum_ij (sum_a u_ia v_ja)^4 is the inner product of two small matrices: those of all products u_a u_b and v_a v_b.
    """
    count = min(KEPT, directions.shape[-1])
    first, second = torch.triu_indices(count, count)
    weights = torch.where(first == second, 1.0, 2.0**0.5).double()[:, None]
    found = torch.zeros(len(own), dtype=torch.float64)
    tops = directions[:, :, -count:]
    to_left, to_right = (roots.inverse @ tops).mT, (roots.root @ tops).mT
    for k in range(len(own)):
        u, v = top_vectors(stack, own[k], partner[k], anchored, to_left[k], to_right[k])
        squared = v.square().sum()
        pairs_u, pairs_v = u[first] * u[second] * weights, v[first] * v[second] * weights
        fourth = ((pairs_u @ pairs_u.T) * (pairs_v @ pairs_v.T)).sum()
        found[k] = u.shape[1] * v.shape[1] * fourth / squared.square().clamp(min=torch.finfo(torch.float64).tiny)
    return found


def top_vectors(
    stack: Stack, own: Tensor, partner: Tensor, anchored: bool, to_left: Tensor, to_right: Tensor
) -> tuple[Tensor, Tensor]:
    """(c, d_out) left singular vectors of one row's product, and (c, d_in) right ones times their singular values.

    Its left factor is [x, B_g] and its right one [A_g + y; y]; neither is put together.
    """
    x, y = stack.left[:, own[0] : own[-1] + 1], stack.right[own[0] : own[-1] + 1]
    if not anchored:
        return to_left @ x.T, to_right @ y
    b, a = stack.left[:, partner[0] : partner[-1] + 1], stack.right[partner[0] : partner[-1] + 1]
    rank = len(own)
    whole, rest = to_right[:, :rank], to_right[:, rank:]
    return to_left[:, :rank] @ x.T + to_left[:, rank:] @ b.T, whole @ a + (whole + rest) @ y
