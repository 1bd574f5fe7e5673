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


class Lens(Protocol):
    """What is known of the rows; some can be read as they are, of others only an estimate that gets better.

    Attributes:
        rows: (k, d) float64, of length about 1.
        alpha: so many atoms may be taken by accident in a search.
    """

    rows: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """How many independent rows there are."""

    def look(self, basis: Tensor, steps: int = 1) -> None:
        """Know better, now that rows are known to be near the span of an orthonormal (d, q) basis."""

    def directions(self, basis: Tensor) -> Tensor:
        """(d, m) orthonormal, beside that span: near their space lies an atom that is in the rows and not found yet."""

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
class Search(Generic[AnyLens]):
    """A search, and how far it has come; what is done with what was taken depends on what is known.

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
        directions = self.lens.directions(self.basis)
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

    def explore(self) -> tuple[list[int], int]:
        """Take atoms until chance would bring as near ones `PATIENCE` times: one of those may be right all the same.

        Returns:
            What was taken up to the last step that chance does not explain: tokens, and the number of positions.
        """
        weak, sure = 0, (list(self.picks), self.length)
        while weak < PATIENCE and (told := self.step()) is not None:
            weak = 0 if told else weak + 1
            if told:
                sure = list(self.picks), self.length
        return sure

    def alone(self) -> tuple[Tensor, Tensor]:
        """(m, d) what of each token is beside all else that was taken, as directions; and its length in the atom's."""
        vectors = torch.cat([self.fixed, self.atoms.atoms(self.picks)])
        inverse = torch.linalg.pinv(vectors, rtol=1e-9).T[len(self.fixed) :]  # coefficients are rows @ inverse.T
        lengths = inverse.norm(dim=1)
        return inverse / lengths[:, None], lengths * self.atoms.atoms(self.picks).norm(dim=1)

    def keep(self, tokens: list[int], length: int | None = None) -> bool:
        """Go back to fewer tokens, and positions if their number is given; say whether that changes anything."""
        length = self.length if length is None else length
        if (len(tokens), length) == (len(self.picks), self.length):
            return False
        self.picks, self.length = tokens, length
        self.begin()
        self.lens.look(self.basis)
        return True

    @property
    def explained(self) -> float:
        """The share that the tokens account for, less what as many vectors would by chance: 0 to 1."""
        return self.lens.explained(self.basis) if self.picks else 0.0

    @property
    def is_ambiguous(self) -> bool:
        """Whether another token's atom lies in the span of those taken, or these are dependent."""
        dependent = orthonormal(self.fixed.T, 1e-9).shape[1] + len(self.picks) > self.basis.shape[1]
        self.deficits(self.basis[:, :0])  # brings the lengths beside the basis up to date
        inside = (self.squares <= SPANNED * self.atoms.squares) & (self.atoms.squares > 0)
        inside[self.picks] = False
        return dependent or bool(inside.any())


def orthonormal(columns: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis of a (d, m) matrix's columns, without those that rounding alone makes independent."""
    if not columns.numel():
        return columns[:, :0]
    u, values, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = u[:, values > tolerance * values[0]]
    return basis
