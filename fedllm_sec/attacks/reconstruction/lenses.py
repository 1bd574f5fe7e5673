"""What an update of the first layer tells of its gradient under SGD, and after a single step of Adam: all of it.

A row of the gradient of LoRA's A (or of a weight) is a combination of what the layer read. Shapes: k rows, d wide.
"""

from collections.abc import Sequence

import torch
from scipy.linalg import svd
from torch import Tensor

ROUNDING = 2.0**-24  # of a float32, relative
CLEAR = 3.0  # times the noise of a row: a singular value that is none


class Exact:
    """Rows that are combinations of inputs, but for rounding and weight decay.

    Weight decay adds -c times what was received to a module's rows, with one c for all of them. It is found by least
    squares beside what has been found so far, and so exactly in the end; nobody has to know the learning rate.

    Each module counts alike. Of one with many rows (a whole weight) only its row space is kept.

    Args:
        modules: (k, d) each, what training changed.
        received: (k, d) each, what it changed them from.
        decay: whether to look for weight decay.
        noise: of a row, relative; what the rounding of what was sent leaves is added to it.

    Attributes:
        rows: (k, d) float64, of length about 1.
        noise: (k,) the length of what is no signal in each; a module that moved little has more of it.
    """

    alpha = 1e-3

    def __init__(
        self, modules: Sequence[Tensor], received: Sequence[Tensor], *, decay: bool = False, noise: float = 1e-7
    ):
        self.given, self.anchors, self.decay = list(modules), list(received), decay
        pairs = list(zip(modules, received, strict=True))
        rounding = [ROUNDING * base.norm(dim=1) * len(base) ** 0.5 / length(module) for module, base in pairs]
        self.rows, each = joined(self.given), torch.cat(rounding)
        self.noise = noise + (each if len(each) == len(self.rows) else each.max().expand(len(self.rows)))

    def look(self, basis: Tensor, steps: int = 1) -> None:
        """Find the weight decay anew."""
        if self.decay:
            undone = [undecayed(*each, basis) for each in zip(self.given, self.anchors, strict=True)]
            self.rows = joined(undone)

    @property
    def rank(self) -> int:
        """How many independent rows there are."""
        return spanned(self.rows / self.noise[:, None], CLEAR).shape[1]

    def explained(self, basis: Tensor) -> float:
        """The share of the rows in the span of a (d, q) basis, less what as many vectors would bring by chance."""
        width = self.rows.shape[1]
        free = width - basis.shape[1]
        energy = self.rows.square().sum()
        left = float(1 - (self.rows @ basis).square().sum() / energy) if energy > 0 else 1.0
        return max(0.0, 1 - left * width / free) if free > 0 else 0.0

    def directions(self, basis: Tensor) -> Tensor:
        """(d, m) orthonormal: where more is left of the rows than noise would leave."""
        return spanned(beside(self.rows, basis) / self.noise[:, None], CLEAR)


def spanned(rows: Tensor, least: float) -> Tensor:
    """(d, m) orthonormal: the row space, without directions of singular values up to the least."""
    try:
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
    except RuntimeError:  # LAPACK's faster driver may not converge where singular values are alike
        _, found, basis = svd(rows.numpy(), full_matrices=False, lapack_driver="gesvd")
        values, right = torch.from_numpy(found), torch.from_numpy(basis)
    space: Tensor = right[values > least].T
    return space


def joined(modules: Sequence[Tensor]) -> Tensor:
    """The rows of all modules, each module scaled so that its rows have a length of 1 in the mean."""
    scaled = torch.cat([module * len(module) ** 0.5 / length(module) for module in modules])
    if len(scaled) <= scaled.shape[1] // 4:
        return scaled
    _, values, right = torch.linalg.svd(scaled, full_matrices=False)
    kept = values > values[0] * 1e-7
    space: Tensor = (values[:, None] * right)[kept] / len(scaled) ** 0.5
    return space


def length(module: Tensor) -> float:
    """The norm of a matrix; of one that is zero, because nothing but weight decay changed it, the least number."""
    return max(float(module.norm()), torch.finfo(torch.float32).tiny)


def undecayed(rows: Tensor, received: Tensor, basis: Tensor) -> Tensor:
    """Rows without the multiple of what was received that is in them beside a basis."""
    left, anchor = beside(rows, basis), beside(received, basis)
    energy = anchor.square().sum()
    return rows - (left * anchor).sum() / energy * received if energy > 0 else rows


def first_step(moves: Tensor, received: Tensor, rate: float, eps: float = 1e-8) -> Tensor:
    """The gradient behind the first step of Adam, (r, d), up to a scale of its rows.

    That step is -lr g / (|g| + eps): the sign alone, it is often said. But gradients of a fine-tuned model are small,
    and eps is not: |g| = eps x / (1 - x) with x = |move| / lr. What limits it is the rounding of the weights.
    """
    share = moves.abs() / rate
    least = ROUNDING * received.abs().clamp(min=1e-12) / rate + 2.0**-23
    return -moves.sign() * eps * share / (1 - share).clamp(min=least)


def within(rows: Tensor, basis: Tensor) -> Tensor:
    """The part of rows in the span of an orthonormal (d, q) basis."""
    return (rows @ basis) @ basis.T


def beside(rows: Tensor, basis: Tensor) -> Tensor:
    """The part of rows beside it."""
    return rows - within(rows, basis)
