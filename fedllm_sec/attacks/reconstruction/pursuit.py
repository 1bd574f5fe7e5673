"""Which atoms of a dictionary a few rows are made of: rank-aware pursuit, with a test of every choice.

Rank-aware order-recursive matching pursuit (Davies and Eldar 2012, arXiv:1004.4529): k rows of length d are
combinations of n atoms out of V. In every step the atom is taken that lies nearest to the space of what is left of the
rows, all measured beside the span of the atoms taken before. Where k >= n the first step is the check of a span (MUSIC;
DAGER, Petrov et al. 2024, arXiv:2405.15586); where k < n, down to k = 1, the sparsest explanation is looked for. It is
unique if n < (d + k) / 2, whatever the rows are.

Every choice is tested: what is left, an m-dimensional space in D dimensions, lies so near to *some* vector by chance
alone with a probability that the Beta distribution tells: deficits, 1 - score, are Beta((D - m) / 2, m / 2). An atom
is kept if chance would bring fewer than `alpha` of V atoms as near.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from scipy.stats import beta
from torch import Tensor

from fedllm_sec.attacks.reconstruction.dictionary import Dictionary

PATIENCE = 32  # atoms in a row that chance explains as well: then there is nothing more to be found
WINDOW = 16  # positions behind the last one known that a text may reach
SPANNED = 1e-4  # of an atom's squared length: so little left of it is rounding
SPAN = 1e-5  # a deficit that is none: the atom lies in what is left, and so do others that do
NOTHING = 1e-10  # of the rows' energy
ROUNDS = 4  # of pruning and searching again


class Lens(Protocol):
    """What is known of the rows; some can be read as they are, of others only an estimate that gets better.

    Attributes:
        rows: (k, d) float64, of length about 1.
        floor: the length of what rounding alone makes of a row.
        alpha: so many atoms may be taken by accident in a search.
    """

    rows: Tensor
    floor: float
    alpha: float

    @property
    def rank(self) -> int:
        """How many independent rows there are."""

    def look(self, basis: Tensor, steps: int = 1) -> None:
        """Know better, now that rows are known to be near the span of an orthonormal (d, q) basis."""

    def residual(self, basis: Tensor) -> Tensor:
        """(m, d) beside that span, in whose row space an atom lies that is in the rows, but was not found."""

    def explained(self, basis: Tensor) -> float:
        """The share of what was sent that the span accounts for, less what as many vectors would by chance: 0 to 1."""


AnyLens = TypeVar("AnyLens", bound=Lens)


class Pick(NamedTuple):
    """An atom that was taken.

    Attributes:
        token: its id.
        score: how near it is to the space of what the rows would be without the other atoms; 1: in it.
        weight: the length of its part in the rows.
    """

    token: int
    score: float
    weight: float


@dataclass
class Pursuit(Generic[AnyLens]):
    """A search in rows that are known, and how far it has come; in those that are not: `likeliest`.

    Attributes:
        lens: what is known of the rows.
        atoms: the dictionary.
        length: positions that are taken to be used: so long is the longest text.
        picks: tokens taken.
        basis: (d, q) float64 orthonormal, of all that is taken.
        squares: (V,) float64 squared lengths of the atoms beside that basis.
        pending: columns of the basis that `squares` do not know of yet.
    """

    together: ClassVar[int] = 64  # atoms that are taken at once, if they lie in what is left
    most: ClassVar[float] = 1.0  # of the width: of so many atoms anything can be made

    lens: AnyLens
    atoms: Dictionary
    length: int = 0
    picks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Take what is always there, and the tokens picked."""
        vectors = torch.cat([self.fixed, self.atoms.atoms(self.picks)])
        self.basis = orthonormal(vectors.T, 1e-9)
        self.squares = self.atoms.squares.clone()
        self.pending = self.basis

    @property
    def fixed(self) -> Tensor:
        """What the norm and the positions bring, whatever the tokens are."""
        return torch.cat([self.atoms.constants, self.atoms.positions[: self.length]])

    def directions(self) -> Tensor:
        """(d, m) orthonormal: where there is something left of the rows, more than rounding would leave."""
        _, values, right = torch.linalg.svd(self.lens.residual(self.basis), full_matrices=False)
        told: Tensor = right[values > 3 * self.lens.floor].T
        return told

    def deficits(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """1 - score of every token, and of the positions in the window; one walk over the dictionary."""
        products = self.atoms.times(torch.cat([directions, self.pending], dim=1)).double()
        width = directions.shape[1]
        self.squares -= products[:, width:].square().sum(dim=1)
        self.pending = self.pending[:, :0]
        near, whole = products[:, :width].square().sum(dim=1), self.atoms.squares
        tokens = torch.where(self.squares > SPANNED * whole, 1 - near / self.squares, 1.0)
        tokens[self.picks] = 1.0
        table = self.atoms.positions[self.length : self.length + WINDOW]
        beside = table - (table @ self.basis) @ self.basis.T
        squares = beside.square().sum(dim=1)
        closeness = (beside @ directions).square().sum(dim=1) / squares.clamp(min=1e-300)
        positions = torch.where(squares > SPANNED * table.square().sum(dim=1), 1 - closeness, 1.0)
        return tokens, positions

    def chance(self, directions: int, taken: int) -> float:
        """The largest deficit that is no accident."""
        beside = self.atoms.width - taken
        candidates = self.atoms.size + WINDOW * bool(len(self.atoms.positions))
        if beside <= directions:
            return 0.0
        return float(beta.ppf(self.lens.alpha / candidates, (beside - directions) / 2, directions / 2))

    def step(self) -> bool | None:
        """Take the nearest atom; say whether that is more than chance, None where there is nothing left to explain."""
        directions = self.directions()
        taken = self.basis.shape[1]
        if not directions.shape[1] or taken + directions.shape[1] >= self.most * self.atoms.width:
            return None
        tokens, positions = self.deficits(directions)
        if len(spanned := (tokens < SPAN).nonzero().flatten()[: self.together].tolist()) > 1:
            self.picks += spanned
            self.take(self.atoms.atoms(spanned))
            self.lens.look(self.basis)
            return True
        token, least = int(tokens.argmin()), float(tokens.min())
        if len(positions) and float(positions.min()) < least:
            least = float(positions.min())
            self.reach(self.length + int(positions.argmin()) + 1)
        else:
            self.picks.append(token)
            self.take(self.atoms.atom(token)[None])
        self.lens.look(self.basis)
        return least < self.chance(directions.shape[1], taken)

    def reach(self, length: int) -> None:
        """Texts are longer than was known: a text that has a position has all before it."""
        self.take(self.atoms.positions[self.length : length])
        self.length = length

    def take(self, vectors: Tensor) -> None:
        """Add some to the basis."""
        beside = vectors.T - self.basis @ (self.basis.T @ vectors.T)
        new = orthonormal(beside - self.basis @ (self.basis.T @ beside), 1e-9)
        self.basis = torch.cat([self.basis, new], dim=1)
        self.pending = torch.cat([self.pending, new], dim=1)

    def explore(self) -> int:
        """Take atoms until chance would bring as near ones `PATIENCE` times; say how many such there are at the end.

        One that chance explains as well may be the right one all the same: the next ones tell.
        """
        weak = 0
        while weak < PATIENCE and (told := self.step()) is not None:
            weak = 0 if told else weak + 1
        return weak

    def alone(self) -> tuple[Tensor, Tensor]:
        """(m, d) what of each token is beside all else that was taken, as directions; and its length in the atom's."""
        vectors = torch.cat([self.fixed, self.atoms.atoms(self.picks)])
        inverse = torch.linalg.pinv(vectors, rtol=1e-9).T[len(self.fixed) :]  # coefficients are rows @ inverse.T
        lengths = inverse.norm(dim=1)
        return inverse / lengths[:, None], lengths * self.atoms.atoms(self.picks).norm(dim=1)

    def judge(self) -> list[Pick]:
        """How each token stands beside all the others: what the rows would miss without it."""
        if not self.picks:
            return []
        alone, lengths = self.alone()
        rows = self.lens.rows
        left = rows - (rows @ self.basis) @ self.basis.T
        noise = left @ left.T + torch.eye(len(left), dtype=left.dtype) * (self.lens.floor**2 + NOTHING)
        parts = rows @ alone.T  # (k, tokens)
        signal = (parts * torch.linalg.solve(noise, parts)).sum(dim=0)
        weights = parts.norm(dim=0) * lengths
        scores = signal / (1 + signal)  # of a row space that loses one direction: Sherman and Morrison
        return [Pick(*each) for each in zip(self.picks, scores.tolist(), weights.tolist(), strict=True)]

    def prune(self, judged: Sequence[Pick]) -> bool:
        """Drop what chance explains as well; say whether anything was."""
        rank = int((torch.linalg.svdvals(self.lens.rows) > 3 * self.lens.floor).sum())  # many rows may tell little
        limit = 1 - self.chance(rank, self.basis.shape[1] - 1)
        return self.keep([pick.token for pick in judged if pick.score > limit])

    def keep(self, tokens: list[int]) -> bool:
        """Go back to fewer tokens; say whether that changes anything."""
        if len(tokens) == len(self.picks):
            return False
        self.picks = tokens
        self.begin()
        self.lens.look(self.basis)
        return True

    def run(self) -> list[Pick]:
        """Search, drop what does not stand, and search again until nothing changes; the surest tokens first."""
        best: tuple[float, list[int], int] = (-1.0, [], self.length)
        for _ in range(ROUNDS):
            self.explore()
            judged = self.judge()
            while self.prune(judged):
                judged = self.judge()
            if self.explained <= best[0] + 1e-6:
                break
            best = self.explained, list(self.picks), self.length
            if self.explained > 1 - 1e-6:
                break
            ranked = sorted(judged, key=lambda pick: pick.score, reverse=True)
            self.keep([pick.token for pick in ranked[: max(1, 4 * len(ranked) // 5)]])
        self.picks = best[1]
        self.begin()
        self.lens.look(self.basis)
        return sorted(self.judge(), key=lambda pick: pick.score, reverse=True)

    @property
    def explained(self) -> float:
        """The share that the tokens account for, less what as many vectors would by chance: 0 to 1."""
        return self.lens.explained(self.basis) if self.picks else 0.0


def orthonormal(columns: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis of a (d, m) matrix's columns, without those that rounding alone makes independent."""
    if not columns.numel():
        return columns[:, :0]
    u, values, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = u[:, values > tolerance * values[0]]
    return basis
