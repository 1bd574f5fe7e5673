"""What several steps of Adam tell of a gradient: an estimate that gets better with every input that is found."""

from copy import copy

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.lenses import beside, spanned, within
from fedllm_sec.attacks.reconstruction.rays import BETAS, curve, one_sided, rays

SETTLED = 60  # steps of expectation and maximisation after which little changes
STEADY = 1e-5  # of a gradient: no closer is it on a straight path
LEAST = 0.3  # of a usual gradient: of smaller ones h seems to be known better than it is
OUTLYING = 3.0  # deviations, by the median: no coordinate of what is left says more
ROWS = 64  # more tell nothing new, and each takes time


class Adam:
    """Rows of a gradient of which Adam tells on which half-lines they lie with what is added to them in each step.

    Adam makes all coordinates alike, however large their gradients are, and so does this: g and h are in units of
    what is usual for a coordinate (`spread`), and so have the atoms to be.

    All g and all h are combinations of the same inputs. An expectation-maximisation takes them as Gaussian around what
    the inputs found so far explain (means mu_g, mu_h, deviations tau_g, tau_h). Along each half-line (`rays`) the
    posterior of (g, h) is then a Gaussian times |g| on one side of zero, whose moments are closed forms, and the move
    gives each half-line its weight. Each row has its scale and its eps (in that scale) for itself.

    The step is ours: we know of no publication. Where the data is not the same in every step h has another meaning, and
    what is left is that gradients with a clear sign are large.

    Args:
        moves: (k, d) what training changed, without weight decay.
        spread: (d,) how large a coordinate of the inputs usually is.
        total: lr * K, the most that a coordinate moves.
        steps: K, at least 2.
        noise: (k, d) deviation of the moves, for what was sent is rounded.
    """

    alpha = 0.5  # a search that is half in doubt anyway finds more if it is less strict

    def __init__(self, moves: Tensor, spread: Tensor, total: float, steps: int, noise: Tensor):
        kept = moves.abs().amax(dim=1).nonzero().flatten()
        kept = kept[torch.linspace(0, len(kept) - 1, min(ROWS, len(kept))).round().long()]
        self.curve = curve(steps, BETAS)
        self.seen, deviation = moves[kept] / -total, (noise[kept] / total).clamp(min=1e-5)
        self.unit = spread.median() / spread
        self.rays = rays(self.seen, deviation, steps)
        self.shift = self.rays.shift * self.unit
        near = torch.where(self.seen > 0, self.rays.ratio[0], self.rays.ratio[2]).abs()
        typical = near.median(dim=1, keepdim=True).values.clamp(min=1e-9)
        self.mean_g, self.mean_h = torch.zeros_like(self.seen), torch.zeros_like(self.seen)
        self.tau_g, self.tau_h = torch.ones_like(typical), 2 * typical
        self.eps = 0.3 * typical * float(self.curve.slope[len(self.curve.slope) // 2])
        self.rows, self.left_h, self.likelihood = torch.ones_like(self.seen), self.mean_h, 0.0
        self.look(self.seen.new_zeros(self.seen.shape[1], 0), steps=20)

    @property
    def rank(self) -> int:
        """k, or the width if that is less."""
        return min(self.rows.shape)

    def look(self, basis: Tensor, steps: int = 6) -> None:
        """Some steps of the expectation-maximisation."""
        for _ in range(max(steps, 6)):
            self.turn(basis)

    def turn(self, basis: Tensor) -> None:
        """Where (g, h) are, given the means; then the means, eps and the deviations, given where they are."""
        told = self.rays
        square_g, square_h = self.tau_g**2, self.tau_h**2 + (self.rows.abs().clamp(min=LEAST) * told.noise) ** 2
        wanted = self.mean_h - self.shift * self.eps
        weight = 1 / square_g + told.ratio**2 / square_h
        middle = told.side * (self.mean_g / square_g + told.ratio * wanted / square_h) / weight.sqrt()
        mass, mean, variance = one_sided(middle)
        missed = (told.ratio * self.mean_g - wanted) ** 2 / (told.ratio**2 * square_g + square_h)
        density = mass - told.steep - missed / 2 - square_h.log() / 2 - weight.log()
        density = density.where(told.possible, density.new_tensor(-torch.inf))
        self.likelihood = float((density.logsumexp(dim=0) - self.tau_g.log()).sum())
        share = density.softmax(dim=0)

        g, variance = told.side * mean / weight.sqrt(), variance / weight
        rows, square = (share * g).sum(dim=0), (share * (g**2 + variance)).sum(dim=0)
        scale = square.mean(dim=1, keepdim=True).sqrt()
        self.rows, spare = rows / scale, (square / scale**2 - (rows / scale) ** 2).clamp(min=0)
        g, variance, square_h, eps = g / scale, variance / scale**2, square_h / scale**2, self.eps / scale

        along = told.ratio * g
        self.mean_g = within(self.rows, basis)
        self.mean_h = within((share * (along + self.shift * eps)).sum(dim=0), basis)
        counts = share / square_h
        slope = (counts * self.shift * (self.mean_h - along)).sum(dim=(0, 2))
        self.eps = (slope / (counts * self.shift**2).sum(dim=(0, 2)))[:, None].clamp(min=0)
        h = along + self.shift * self.eps
        self.mean_h = within((share * h).sum(dim=0), basis)
        self.left_h = (counts * (h - self.mean_h)).sum(dim=0)
        self.spread_out(basis, spare, share * ((h - self.mean_h) ** 2 + told.ratio**2 * variance), share, square_h)

    def spread_out(self, basis: Tensor, spare: Tensor, missed: Tensor, share: Tensor, square_h: Tensor) -> None:
        """The deviations around the means; of h by the coordinates where it is not rounding that hides it."""
        width = self.rows.shape[1]
        freedom = width / (width - basis.shape[1] / 2)
        missed_g = freedom * (self.rows - self.mean_g).square() + spare
        self.tau_g = missed_g.mean(dim=1, keepdim=True).sqrt().clamp(min=1e-9)
        clear = (share * (self.tau_h**2 / square_h)).sum(dim=0).clamp(max=1)
        missed_h = freedom * (missed.sum(dim=0) * clear).sum(dim=1) / clear.sum(dim=1)
        self.tau_h = missed_h.sqrt().clamp(min=STEADY)[:, None]

    def directions(self, basis: Tensor) -> Tensor:
        """(d, 2 k) orthonormal: of the derivatives of the likelihood by the means, beside the basis.

        They are Rao's scores. That a vector lies near to the space of all of them, whatever its coefficients, is his
        test of whether it has any.
        """
        scores = torch.cat([(self.rows - self.mean_g) / self.tau_g**2, self.left_h])
        most = OUTLYING / 0.6745 * scores.abs().median(dim=1, keepdim=True).values
        left = beside(scores.clamp(-most, most), basis)
        return spanned(left / left.norm(dim=1, keepdim=True).clamp(min=1e-300), 1e-6)

    def loss(self, basis: Tensor) -> float:
        """By how much less likely the moves are with the span of a smaller basis."""
        other = copy(self)
        other.look(basis)
        return self.likelihood - other.likelihood

    def explained(self, basis: Tensor) -> float:
        """The share of the moves that follows from what the inputs explain; less what as many vectors would by chance.

        0 to 1. An estimate leans to what was found. Moves do not: each is predicted from mu_g and mu_h alone.
        """
        width = self.seen.shape[1]
        free = width - 2 * basis.shape[1]  # g and h of each row have as many coefficients each
        move, damped = self.curve.at(self.mean_h / self.mean_g.where(self.mean_g != 0, 1e-30))
        predicted = self.mean_g.sign() * (move - self.eps * self.unit * damped / self.mean_g.abs().clamp(min=1e-30))
        missed = float((self.seen - predicted.clamp(-1, 1)).square().sum() / self.seen.square().sum())
        return max(0.0, 1 - missed * width / free) if free > 0 else 0.0
