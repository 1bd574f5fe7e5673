"""What an update of the first layer tells of its gradient: all of it under SGD, an estimate under Adam.

A row of the gradient of LoRA's A (or of a weight) is a combination of what the layer read. Shapes: k rows, d wide.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 2.0**-24  # of a float32, relative
STEADY = 3e-4  # of a gradient: no closer is its change known from step to step, for the rounding of what moves


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
    """

    exact, alpha = True, 1e-3

    def __init__(
        self, modules: Sequence[Tensor], received: Sequence[Tensor], *, decay: bool = False, noise: float = 1e-7
    ):
        self.given, self.anchors, self.decay = list(modules), list(received), decay
        pairs = zip(modules, received, strict=True)
        rounding = max(float(ROUNDING * base.norm() / module.norm()) for module, base in pairs)
        self.floor = noise + rounding
        self.rows = joined(self.given)

    def look(self, basis: Tensor, steps: int = 1) -> None:
        """Find the weight decay anew."""
        if self.decay:
            undone = [undecayed(*each, basis) for each in zip(self.given, self.anchors, strict=True)]
            self.rows = joined(undone)

    @property
    def evidence(self) -> Tensor:
        """The rows."""
        return self.rows

    def residual(self, basis: Tensor) -> Tensor:
        """What is left of the rows."""
        return beside(self.rows, basis)


def joined(modules: Sequence[Tensor]) -> Tensor:
    """The rows of all modules, each module scaled so that its rows have a length of 1 in the mean."""
    scaled = torch.cat([module * len(module) ** 0.5 / module.norm() for module in modules])
    if len(scaled) <= scaled.shape[1] // 4:
        return scaled
    _, values, right = torch.linalg.svd(scaled, full_matrices=False)
    kept = values > values[0] * 1e-7
    space: Tensor = (values[:, None] * right)[kept] / len(scaled) ** 0.5
    return space


def undecayed(rows: Tensor, received: Tensor, basis: Tensor) -> Tensor:
    """Rows without the multiple of what was received that is in them beside a basis."""
    left, anchor = beside(rows, basis), beside(received, basis)
    energy = anchor.square().sum()
    return rows - (left * anchor).sum() / energy * received if energy > 0 else rows


class Adam:
    """Rows of a gradient of which Adam tells the sign, and by how much it changed from step to step.

    After K steps on the same data a coordinate has moved by lr * sum of m_t / (sqrt(v_t) + eps). Let g be its first
    gradient and h what is added to it in each step. Then the sum is sign(g) * (K * F(h / g) - K * eps / |g|) to first
    order in eps, where F is a known function of one number with F(0) = 1. So K - |sum| is a measurement of both:

        h = sign(g) e - c g,   c = -F^-1(|sum| / K),   e in the unit of eps.

    Adam makes all coordinates alike, however large their gradients are, and so does this: g and h are in units of
    what is usual for a coordinate (`spread`), and so have the atoms to be.

    All g and all h are combinations of the same inputs. An expectation-maximisation takes them as Gaussian around what
    the inputs found so far explain (means mu_g, mu_h, deviations tau_g, tau_h); that g has a known sign and that h is
    known given g makes the posterior of g a Gaussian times |g| on one side of zero, whose moments are closed forms.
    The step is ours: we know of no publication. Where the data is not the same in every step h has another meaning,
    and what is left is that gradients with a clear sign are large.

    Args:
        moves: (k, d) what training changed, without weight decay.
        spread: (d,) how large a coordinate of the inputs usually is.
        total: lr * K, the most that a coordinate moves.
        steps: K, at least 2.
        betas: Adam's.
    """

    exact, alpha = False, 0.5  # a search that is half in doubt anyway finds more if it is less strict
    floor = 1e-6

    def __init__(
        self, moves: Tensor, spread: Tensor, total: float, steps: int, betas: tuple[float, float] = (0.9, 0.999)
    ):
        seen = moves[moves.abs().amax(dim=1) > 0] / -total
        self.sign = torch.where(seen < 0, -1.0, 1.0).to(seen)
        self.unit = self.sign / spread * spread.median()
        self.slope = -drift(seen.abs(), steps, betas)  # c
        typical = self.slope.abs().median(dim=1, keepdim=True).values.clamp(min=1e-9)
        self.mean_g, self.mean_h = torch.zeros_like(seen), torch.zeros_like(seen)
        self.tau_g, self.tau_h = torch.ones_like(typical), typical
        self.offset = 0.3 * typical  # e
        self.rows = seen
        self.look(seen.new_zeros(seen.shape[1], 0), steps=20)
        self.first = self.rows / self.rows.norm(dim=1, keepdim=True)

    def look(self, basis: Tensor, steps: int = 6) -> None:
        """Some steps of the expectation-maximisation."""
        for _ in range(max(steps, 6)):
            self.expect()
            self.maximise(basis)

    def expect(self) -> None:
        """Posterior mean and variance of g, scaled so that its mean square is 1."""
        weight_g, weight_h = self.tau_g**-2, self.slope**2 / self.tau_h**2
        precision = weight_g + weight_h
        pulled = self.mean_g * weight_g - self.slope * (self.mean_h - self.unit * self.offset) / self.tau_h**2
        first, second = one_sided_moments(self.sign * pulled / precision.sqrt())
        g, square = self.sign * first / precision.sqrt(), second / precision
        scale = square.mean(dim=1, keepdim=True).sqrt()
        self.rows, self.variance = g / scale, (square - g**2).clamp(min=0) / scale**2
        self.offset = self.offset / scale

    def maximise(self, basis: Tensor) -> None:
        """Means, offset and deviations, given the posterior."""
        width = self.rows.shape[1]
        freedom = width / (width - basis.shape[1] / 2)
        self.mean_g = within(self.rows, basis)
        self.mean_h = within(self.unit * self.offset - self.slope * self.rows, basis)
        told = self.unit * (self.slope * self.rows + self.mean_h)
        self.offset = (told.sum(dim=1, keepdim=True) / self.unit.square().sum(dim=1, keepdim=True)).clamp(min=0)
        h = self.unit * self.offset - self.slope * self.rows
        self.mean_h = within(h, basis)
        self.tau_g = deviation(self.rows - self.mean_g, self.variance, freedom)
        self.tau_h = deviation(h - self.mean_h, self.slope**2 * self.variance, freedom).clamp(min=STEADY)

    @property
    def evidence(self) -> Tensor:
        """The first estimate."""
        first: Tensor = self.first
        return first

    def residual(self, basis: Tensor) -> Tensor:
        """What is left of the estimate."""
        return beside(self.rows, basis)


def first_step(moves: Tensor, received: Tensor, rate: float, eps: float = 1e-8) -> Tensor:
    """The gradient behind the first step of Adam, (r, d), up to a scale of its rows.

    That step is -lr g / (|g| + eps): the sign alone, it is often said. But gradients of a fine-tuned model are small,
    and eps is not: |g| = eps x / (1 - x) with x = |move| / lr. What limits it is the rounding of the weights.
    """
    share = moves.abs() / rate
    least = ROUNDING * received.abs().clamp(min=1e-12) / rate + 2.0**-23
    return -moves.sign() * eps * share / (1 - share).clamp(min=least)


def drift(share: Tensor, steps: int, betas: tuple[float, float]) -> Tensor:
    """F^-1: the h / g nearest to zero for which Adam moves by this share of lr * K in K steps."""
    half = torch.logspace(-8, 1, 4000, dtype=torch.float64)
    grid = torch.cat([-half.flip(0), half.new_zeros(1), half])
    moved = mean_move(grid, steps, betas)
    middle = len(half)
    rising = moved.diff() > 0
    low = middle - int(rising[:middle].flip(0).long().cumprod(0).sum())
    high = middle + int(rising[middle:].long().cumprod(0).sum())
    known, values = moved[low : high + 1], grid[low : high + 1]
    place = torch.searchsorted(known, share.contiguous()).clamp(1, len(known) - 1)
    left, right = known[place - 1], known[place]
    part = ((share - left) / (right - left)).clamp(0, 1)
    ratio: Tensor = values[place - 1] + part * (values[place] - values[place - 1])
    return ratio


def mean_move(ratio: Tensor, steps: int, betas: tuple[float, float]) -> Tensor:
    """F: the mean over steps of Adam's m / sqrt(v) where the gradients are 1, 1 + ratio, 1 + 2 ratio, ..."""
    m, v, total = (torch.zeros_like(ratio) for _ in range(3))
    for step in range(1, steps + 1):
        gradient = 1 + (step - 1) * ratio
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        total = total + m / (1 - betas[0] ** step) / (v / (1 - betas[1] ** step)).sqrt()
    return total / steps


def one_sided_moments(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square under the density z exp(-(z - t)² / 2) on z > 0."""
    t = t.clamp(-6, 30)
    bell, below = torch.exp(-t * t / 2) / (2 * torch.pi) ** 0.5, torch.special.ndtr(t)
    mass = t * below + bell
    return ((1 + t * t) * below + t * bell) / mass, ((t**3 + 3 * t) * below + (t * t + 2) * bell) / mass


def deviation(error: Tensor, variance: Tensor, freedom: float) -> Tensor:
    """The deviation of each row around its mean."""
    square = freedom * error.square().mean(dim=1, keepdim=True) + variance.mean(dim=1, keepdim=True)
    return square.sqrt().clamp(min=1e-9)


def within(rows: Tensor, basis: Tensor) -> Tensor:
    """The part of rows in the span of an orthonormal (d, q) basis."""
    return (rows @ basis) @ basis.T


def beside(rows: Tensor, basis: Tensor) -> Tensor:
    """The part of rows beside it."""
    return rows - within(rows, basis)
