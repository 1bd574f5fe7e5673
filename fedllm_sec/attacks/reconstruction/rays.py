"""Where Adam's move of a coordinate allows its gradient to be: on one of four half-lines.

After K steps on the same data a coordinate has moved by lr * sum of m_t / (sqrt(v_t) + eps). Let g be its first
gradient and h what is added to it in each step (so nearly straight is the path of a gradient while steps are small: in
a real language model its second differences were 10^-4 of it, where h was 10^-2). To first order in eps the sum is

    S = sign(g) * K * (F(h / g) - (eps / |g|) * G(h / g)),   F(x) = mean of m / sqrt(v),   G(x) = mean of m / v,

for gradients 1, 1 + x, 1 + 2 x, ... F rises from x = -infinity to its peak above 1 (at 0.12 for K = 5, at 1.5 for
K = 100) and falls beyond it. So for either sign of g there is one x on either side of the peak at most that explains S.
For each, the point (g, h) lies on a half-line: h = x g + eps * sign(g) * G(x) / F'(x). Shapes: k rows, d wide.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
FINEST, WIDEST, POINTS = -6, 5, 5501  # of |x|: from 10^-6 to 10^5, and how many points on each side of zero


class Curve(NamedTuple):
    """F and G over x, (p,) float64 each.

    Attributes:
        ratio: x, rising.
        move: F(x).
        damped: G(x).
        slope: F'(x).
        peak: place of the largest F.
    """

    ratio: Tensor
    move: Tensor
    damped: Tensor
    slope: Tensor
    peak: int

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """F and G of any x, by interpolation."""
        place = torch.searchsorted(self.ratio, ratio.contiguous()).clamp(1, len(self.ratio) - 1)
        left, right = self.ratio[place - 1], self.ratio[place]
        part = ((ratio - left) / (right - left)).clamp(0, 1)
        return mixed(self.move, place, part), mixed(self.damped, place, part)


def mixed(values: Tensor, place: Tensor, part: Tensor) -> Tensor:
    """Between the value before a place and the one there."""
    mix: Tensor = values[place - 1] + part * (values[place] - values[place - 1])
    return mix


def path(ratio: Tensor, steps: int, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """F and G: means over steps of Adam's m / sqrt(v) and m / v where the gradients are 1, 1 + x, 1 + 2 x, ..."""
    m, v, move, damped = (torch.zeros_like(ratio) for _ in range(4))
    for step in range(1, steps + 1):
        gradient = 1 + (step - 1) * ratio
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        mean, square = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        move, damped = move + mean / square.sqrt(), damped + mean / square
    return move / steps, damped / steps


@lru_cache(maxsize=8)
def curve(steps: int, betas: tuple[float, float] = BETAS) -> Curve:
    """The curve of K steps."""
    half = torch.logspace(FINEST, WIDEST, POINTS, dtype=torch.float64)
    ratio = torch.cat([-half.flip(0), half.new_zeros(1), half])
    move, damped = path(ratio, steps, betas)
    (slope,) = torch.gradient(move, spacing=(ratio,))
    return Curve(ratio, move, damped, slope, int(move.argmax()))


@dataclass(frozen=True)
class Rays:
    """The half-lines of each coordinate: h = ratio * g + eps * shift, on one side of g = 0.

    Attributes:
        side: (4, 1, 1), the sign of g.
        ratio: (4, k, d).
        shift: (4, k, d).
        noise: (4, k, d), how uncertain h is for the rounding of what was sent, for each unit of |g|.
        steep: (4, k, d), log |F'|: the flatter F is, the more points a move speaks for.
        possible: (4, k, d), whether there is such a half-line.
    """

    side: Tensor
    ratio: Tensor
    shift: Tensor
    noise: Tensor
    steep: Tensor
    possible: Tensor


def rays(moved: Tensor, noise: Tensor, steps: int) -> Rays:
    """The half-lines of moves.

    Args:
        moved: (k, d), S / K: -1 to 1, or a little more.
        noise: (k, d), its deviation.
        steps: K, at least 2.
    """
    told, peak = curve(steps), curve(steps).peak
    bend = abs(float(told.slope[peak + 1] - told.slope[peak - 1]) / float(told.ratio[peak + 1] - told.ratio[peak - 1]))
    flattest = (2 * bend * noise).sqrt()  # nearer to the peak noise is all there is
    parts = []
    for side in (1.0, -1.0):
        for rises in (True, False):
            here = slice(0, peak + 1) if rises else slice(peak, None)
            known, x, damped, slope = (
                values[here] if rises else values[here].flip(0)
                for values in (told.move, told.ratio, told.damped, told.slope)
            )
            wanted = (side * moved).contiguous()
            place = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
            part = ((wanted - known[place - 1]) / (known[place] - known[place - 1])).clamp(0, 1)
            slopes = mixed(slope, place, part)
            slopes = torch.where(slopes.abs() < flattest, flattest if rises else -flattest, slopes)
            possible = (wanted >= known[0]) & (rises | (wanted <= known[-1]))  # above the peak: at it, and once
            parts.append((mixed(x, place, part), side * mixed(damped, place, part) / slopes, slopes, possible))
    ratio, shift, slopes, possible = (torch.stack(each) for each in zip(*parts, strict=True))
    none = ~possible.any(dim=0)  # so small a move is that of a gradient that eps hides: g is nothing beside h
    possible[0] |= none & (moved >= 0)
    possible[2] |= none & (moved < 0)
    sides = moved.new_tensor([1.0, 1.0, -1.0, -1.0])[:, None, None]
    return Rays(sides, ratio, shift, noise / slopes.abs(), slopes.abs().log(), possible)


def one_sided(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the mass, mean and variance of the density z exp(-(z - t)² / 2) / sqrt(2 pi) on z > 0."""
    low, high = t.clamp(-30, 0), t.clamp(0, 1e3)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(-low / math.sqrt(2))  # both without exp(-t² / 2) / sqrt(2 pi)
    bell = torch.exp(-high * high / 2) / math.sqrt(2 * math.pi)
    below = [power_moments(low, mills, torch.ones_like(t)), power_moments(high, torch.special.ndtr(high), bell)]
    log_bell = -low * low / 2 - math.log(math.sqrt(2 * math.pi))
    mass = torch.where(t <= 0, below[0][0].log() + log_bell, below[1][0].log())
    mean, square = (torch.where(t <= 0, below[0][i] / below[0][0], below[1][i] / below[1][0]) for i in (1, 2))
    variance = (square - mean**2).clamp(min=0)
    far, near = t < -30, t > 1e3
    away = t.clamp(max=-30)
    tail = (-6 / away**2).log1p() - 2 * (-away).log()  # two terms of the asymptotic series, here and below
    mass = torch.where(far, -away * away / 2 + tail - math.log(math.sqrt(2 * math.pi)), mass)
    mass = torch.where(near, t.clamp(min=1e3).log(), mass)
    mean = torch.where(far, -2 / away * (1 - 6 / away**2), torch.where(near, t, mean))
    return mass, mean, torch.where(far, 2 / away**2 * (1 - 18 / away**2), torch.where(near, 1.0, variance))


def power_moments(t: Tensor, below: Tensor, bell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of z, z² and z³ times a normal density around t over z > 0, from its integral and its value at zero."""
    square = t * t
    return t * below + bell, (1 + square) * below + t * bell, (square + 3) * t * below + (square + 2) * bell
