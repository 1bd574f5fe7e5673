"""The space of hidden states that the second layer read in training, and how near to it another state lies.

Every row by which training changed A, or a weight, of the second layer's readers is a combination of the hidden states
that they read. Where there are more rows than states, the rows span the states' space: a state that was computed in
training lies in it, another one does not (DAGER, Petrov et al. 2024, arXiv:2405.15586, section 4).

DAGER cuts singular values and distances at fixed numbers. Here both follow from the noise of a row, which is known: a
weight that was sent in float32 is off by up to half a unit in its last place. Rows are scaled so that each has noise of
length 1, spread evenly: a matrix of noise alone has singular values up to (sqrt(k) + sqrt(d)) / sqrt(d) (Marchenko and
Pastur 1967). A state h = sum of c_j * (right singular vector j) is the combination c_j / s_j of rows, and so the noise
moves it out of the space by the length of (c_j / s_j)_j: on real updates within a tenth of what is measured.

Shapes: k rows, d the width, m the rank, N states.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.families import Family
from fedllm_sec.attacks.reconstruction.gradients import shares
from fedllm_sec.attacks.reconstruction.lenses import first_step
from fedllm_sec.attacks.reconstruction.reading import Module, Sent, from_a, from_b, from_weights, unit
from fedllm_sec.updates.errors import InputError
from fedllm_sec.victim import Victim

EDGE = 1.2  # of the largest singular value of noise: so near to it a direction is noise as well
FACTOR = 3.0  # of the length by which noise moves a state out of the space; `pursuit` has the same
STATE = 5e-7  # of a hidden state: what differs between two ways to compute it in float32 (measured)
RARE = 0.05  # of texts: so many may be nearer to another one than is reckoned with
GRADIENT = 4e-7  # of a row: the same of a gradient, whose errors are not spread evenly (measured by singular values)


@dataclass(frozen=True)
class Space:
    """A space of hidden states, as the rows tell it.

    Attributes:
        basis: (d, m) float64 orthonormal.
        values: (m,) float64, how strongly the rows tell each of its directions, in units of the noise of a row.
        rows: k.
        noise: of a row: 1 as expected, or less.
        error: of a state, relative: by so much the one that was read differs from ours.
        through: (d, D) float64 or None: what is told of are not the D numbers of a state but its products with these.
        drifted: whether states changed while they were trained, so that noise alone does not say how near one must be.
    """

    basis: Tensor
    values: Tensor
    rows: int
    noise: float
    error: float = STATE
    drifted: bool = False
    through: Tensor | None = None

    @property
    def rank(self) -> int:
        """m, the number of independent states."""
        return len(self.values)

    @property
    def is_telling(self) -> bool:
        """Whether it is the space of all states, and leaves room for others."""
        return 0 < self.rank < min(self.rows, len(self.basis))

    def seen(self, states: Tensor) -> Tensor:
        """(N, d) float64 of length 1: what the rows can tell of (N, D) states."""
        seen = states.double() if self.through is None else states.double() @ self.through.T
        unit: Tensor = seen / seen.norm(dim=1, keepdim=True)
        return unit

    def distances(self, states: Tensor) -> Tensor:
        """(N,) float64, of (N, D) states from the space, relative to their length."""
        squares: Tensor = 1 - (self.seen(states) @ self.basis).square().sum(dim=1)
        lengths: Tensor = squares.clamp(min=0.0).sqrt()
        return lengths

    def limits(self, states: Tensor) -> Tensor:
        """(N,) float64: at which relative distance a state may have been read all the same, for the noise."""
        if self.drifted:
            return torch.full((len(states),), math.inf, dtype=torch.float64)
        needed = (self.seen(states) @ self.basis / self.values).norm(dim=1)  # of rows, to make the state of them
        moved = self.noise * needed * math.sqrt(1 - self.rank / len(self.basis))
        noise: Tensor = (moved**2 + self.error**2).sqrt()
        return FACTOR * noise

    def beside(self, states: Tensor) -> Tensor:
        """(N, d) float64: what of each state, relative to its length, is not in the space."""
        seen = self.seen(states)
        return seen - (seen @ self.basis) @ self.basis.T


@dataclass(frozen=True)
class Check:
    """All that tells whether a state was computed in training: a single space, or one for each B.

    Attributes:
        spaces: at least one.
        finest: no state may be farther from them, relative: so near another one may be that was not computed.
    """

    spaces: tuple[Space, ...]
    finest: float = 1.0

    @property
    def is_telling(self) -> bool:
        """Whether each of the spaces is."""
        return all(space.is_telling for space in self.spaces)

    @property
    def drifted(self) -> bool:
        """Whether states changed while they were trained."""
        return any(space.drifted for space in self.spaces)

    @property
    def rank(self) -> int:
        """How many independent states they tell of; of B the least, for one may be blind for some."""
        return min(space.rank for space in self.spaces)

    def distances(self, states: Tensor) -> Tensor:
        """(N,) float64, the largest of those from the spaces."""
        return torch.stack([space.distances(states) for space in self.spaces]).amax(dim=0)

    def excess(self, states: Tensor) -> Tensor:
        """(N,) float64, the largest distance in units of its limit: above 1 the state was not computed in training."""
        limits = [space.limits(states).clamp(max=self.finest) for space in self.spaces]
        return torch.stack([self.spaces[i].distances(states) / limit for i, limit in enumerate(limits)]).amax(dim=0)

    def beside(self, states: Tensor) -> Tensor:
        """(N, sum of d) float64: what of each state is beside the spaces; its length is 0 for one that was read."""
        return torch.cat([space.beside(states) for space in self.spaces], dim=1)

    def accounted(self, states: Tensor) -> int:
        """How many directions of the space are those of (N, D) states: each brings a new one, or no more than noise."""
        return min(independent(space, states, self.finest) for space in self.spaces)

    def finer(self, states: Tensor, others: Tensor) -> "Check":
        """The same, which takes no state for another: half of what lies between them is allowed at most.

        Args:
            states: (N, D) of some texts.
            others: (N, D) of the same texts with another word in each.
        """
        between = torch.stack([(space.beside(states) - space.beside(others)).norm(dim=1) for space in self.spaces])
        apart = between.amax(dim=0)
        if not self.drifted:  # two that were both computed need no telling apart: they are equally near
            apart = apart[(self.excess(states) > 1) | (self.excess(others) > 1)]
        return replace(self, finest=float(apart.quantile(RARE)) / 2) if len(apart) else self


def independent(space: Space, states: Tensor, most: float) -> int:
    """How many of (N, D) states are none that the others make up, within what noise allows; the surest come first."""
    inside, limits = space.seen(states) @ space.basis, space.limits(states).clamp(max=most)
    taken = inside.new_zeros(0, space.rank)
    for place in limits.argsort().tolist():
        beside = inside[place] - (inside[place] @ taken.T) @ taken
        beside = beside - (beside @ taken.T) @ taken
        if float(beside.norm()) > float(limits[place]):
            taken = torch.cat([taken, (beside / beside.norm())[None]])
    return len(taken)


def next_layer(family: Family) -> Family:
    """The same family, of which the second layer's readers are looked at."""
    return replace(family, readers=re.sub(r"\\\.0\\\.", r"\\.1\\.", family.readers, count=1))


def check(
    sent: Sent, family: Family, width: int, method: str, *, tolerance: float = 0.0, drifts: bool = False
) -> Check | None:
    """What an update tells of the states that a layer's readers read; None where no reader was trained, or changed.

    Args:
        sent: the update; of SGD, or of a single step of Adam.
        family: whose readers are looked at.
        width: D, of a state.
        method: for errors.
        tolerance: of a row and of a state, relative, beside what rounding of float32 makes of them.
        drifts: whether what the layer reads changed while it was trained.

    Raises:
        InputError: if these are readers of states of another width.
    """
    assert sent.threat.victim is not None
    victim = sent.threat.victim
    modules = from_a(sent, family, method) + from_weights(sent, family, width, method)
    if wrong := [module for module in modules if module.change.shape[1] != width]:
        raise InputError(
            f"{method}: {wrong[0].name} reads states of {wrong[0].change.shape[1]} numbers, and the base model "
            f"{victim.base} has {width}: give the base that was trained (Victim.base)"
        )
    if modules:
        spaces = [space([whitened(module, victim, tolerance) for module in modules])]
    else:
        parts = [(whitened(module, victim, tolerance), a) for module, a in from_b(sent, family, method)]
        spaces = [replace(space([rows]), through=a) for rows, a in parts]
    error = math.hypot(STATE, tolerance)
    return Check(tuple(replace(each, error=error, drifted=drifts) for each in spaces)) if spaces else None


def whitened(module: Module, victim: Victim, tolerance: float) -> Tensor:
    """(k, d) float64: combinations of states, each scaled so that its noise has a length of 1."""
    change, received = module.change, module.received
    rounding = unit(received + change).square().mean(dim=1) * victim.steps / 12  # of each step, even within a unit
    if victim.optimizer == "sgd":
        rows = change + (1 - shares(victim).kept) * received
    else:
        kept = 1 - victim.learning_rate * victim.weight_decay if victim.optimizer == "adamw" else 1.0
        rows = first_step(change + (1 - kept) * received, received, victim.learning_rate)
        rounding = rounding * steepness(rows) / victim.learning_rate**2
    arithmetic = (GRADIENT**2 + tolerance**2) * rows.square().mean(dim=1)
    noise = (rounding + arithmetic) * rows.shape[1]
    return rows[noise > 0] / noise[noise > 0, None].sqrt()


def steepness(gradient: Tensor, eps: float = 1e-8) -> Tensor:
    """(k,) mean square of how much a gradient changes with Adam's first step, g / (|g| + eps)."""
    return ((gradient.abs() + eps) ** 2 / eps).square().mean(dim=1)


def space(parts: Sequence[Tensor]) -> Space:
    """The space of rows with noise of length 1, (k, d) float64 in parts; memory for three d x d matrices at most.

    In several local steps the states drift, and the space has directions of all of them, as far as noise does not hide
    how they changed.
    """
    rows, width = sum(map(len, parts)), parts[0].shape[1]
    whole = parts[0].new_zeros(0, width)
    for part in parts:
        for piece in torch.split(part, width):
            whole = torch.cat([whole, piece])
            if len(whole) > width:
                whole = torch.linalg.qr(whole, mode="r").R
    _, values, right = torch.linalg.svd(whole, full_matrices=False)
    rank, noise = rank_and_noise(values, rows, width)
    return Space(right[:rank].T.contiguous(), values[:rank], rows, noise)


def edge(rows: int, width: int) -> float:
    """Up to where singular values of k rows may be those of noise of length 1."""
    return EDGE * (math.sqrt(rows) + math.sqrt(width)) / math.sqrt(width)


def rank_and_noise(values: Tensor, rows: int, width: int) -> tuple[int, float]:
    """How many singular values are no noise, and its length in a row: 1 is expected, but what is left may tell of less.

    Args:
        values: (min(k, d),) descending.
        rows: k.
        width: d.
    """
    noise, rank = 1.0, -1
    while True:
        found = int((values > edge(rows, width) * noise).sum())
        if found in (rank, min(rows, width)):
            return found, noise
        rank = found
        left = float(values[rank:].square().sum()) * width / ((rows - rank) * (width - rank))
        noise = min(noise, math.sqrt(left))
