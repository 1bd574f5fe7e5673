"""Rows that are LoRA products, known by their factors: their Gram matrix without forming one product.

A client's row of a pair is D_i = s (B_i A_i - B_g A_g). Written with x = s (B_i - B_g) and y = A_i - A_g it is
x (A_g + y) + s B_g y: no difference of products is taken. (Factors of a client's choice can still cancel in their
product; see `Stack.gram` and `Balanced`.) Inner products of such rows come from
the small matrices X Xᵀ and Y Yᵀ of all clients' factors side by side: <x_1 y_1, x_2 y_2> = sum (x_1ᵀ x_2) o (y_1 y_2ᵀ).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedllm_sec.updates.device import Budget, Scratch
from fedllm_sec.updates.errors import NotFiniteError
from fedllm_sec.updates.layout import Pair
from fedllm_sec.updates.linalg import mixed_gram, qr, svd

CANCELS = 1e-8  # of the square of what factors allow: a product shorter than this is found from balanced factors
LEAST = 1e-9  # a product so short is that of an adapter that did not move
UNKNOWN = 1e-3  # a product of which rounding may be so large a part is not known at all
GRAMS = 10  # matrices of the size of all factors' inner products that live at once


class Factors(Protocol):
    """Where the two factors of a row's pairs come from; x y is the row itself, or its part beside an anchor."""

    @property
    def client(self) -> str:
        """Whose row it is."""

    @property
    def anchor(self) -> "Factors | None":
        """The global adapter: the row is then x (A_g + y) + B_g y, and x y alone without one."""

    def rank(self, pair: Pair) -> int:
        """k: how many columns x has."""

    def advise(self, pair: Pair) -> None:
        """Say that the factors of a pair will be read soon."""

    def left(self, pair: Pair, start: int, stop: int) -> Tensor:
        """(stop - start, k) float64: some rows of x, the scaling included."""

    def right(self, pair: Pair) -> Tensor:
        """(k, d_in) float64: y."""

    def whole(self, pair: Pair) -> Tensor:
        """(k, d_in) float64: A_g + y, or y alone without an anchor; not from their sum."""


class Room(NamedTuple):
    """Where the factors of one pair after another are put side by side."""

    left: Scratch
    right: Scratch


@dataclass(frozen=True)
class Products:
    """Rows as linear combinations, (m, n), of n rows whose factors can be read."""

    pairs: tuple[Pair, ...]
    sources: tuple[Factors, ...]
    matrix: Tensor

    @classmethod
    def of(cls, pairs: Sequence[Pair], sources: Sequence[Factors]) -> "Products":
        """The rows themselves."""
        return cls(tuple(pairs), tuple(sources), torch.eye(len(sources), dtype=torch.float64))

    def mix(self, matrix: Tensor) -> "Products":
        """Rows become linear combinations of rows."""
        return replace(self, matrix=matrix.double() @ self.matrix)

    def rows(self, index: Sequence[int]) -> "Products":
        """Some of the rows."""
        return replace(self, matrix=self.matrix[list(index)])

    def concat(self, other: "Products") -> "Products":
        """The rows of both."""
        return Products(self.pairs, self.sources + other.sources, block_diagonal(self.matrix, other.matrix))

    def add(self, other: "Products") -> "Products":
        """Row by row, or the other's only row to all."""
        theirs = other.matrix.expand(len(self.matrix), -1)
        return Products(self.pairs, self.sources + other.sources, torch.cat([self.matrix, theirs], dim=1))

    def needed(self) -> "Products":
        """The same rows, without the sources of which they hold nothing."""
        used = self.matrix.any(dim=0).nonzero().flatten().tolist()
        return Products(self.pairs, tuple(self.sources[i] for i in used), self.matrix[:, used])

    def gram(self, budget: Budget) -> Tensor:
        """(m, m) float64 inner products of the rows over all pairs; one pass over their factors if memory allows.

        With so many clients that the inner products of all their factors do not fit, groups of clients are taken two
        by two.
        """
        total = torch.zeros(len(self.matrix), len(self.matrix), dtype=torch.float64)
        room = Room(Scratch(), Scratch())
        for pair, following in zip(self.pairs, [*self.pairs[1:], None], strict=True):
            if following is not None:
                self.advise(following)
            total += self.pair_gram(pair, budget, room)
        return total

    def advise(self, pair: Pair) -> None:
        """Let the system read the factors of a pair meanwhile; what comes of it is only speed."""
        for source in self.sources:
            source.advise(pair)

    def pair_gram(self, pair: Pair, budget: Budget, room: Room | None = None) -> Tensor:
        """(m, m) float64 inner products of the rows of one pair."""
        needed, room = self.needed(), room or Room(Scratch(), Scratch())
        n = len(needed.sources)
        found = torch.zeros(n, n, dtype=torch.float64)
        if not n:
            return torch.zeros(len(self.matrix), len(self.matrix), dtype=torch.float64)
        for index in needed.groups(pair, budget):
            sources = [needed.sources[i] for i in index]
            part, doubtful = Stack.read(pair, sources, room).gram(budget.device)
            if doubtful:
                clear = [Balanced.of(s, pair) if i in doubtful else s for i, s in enumerate(sources)]
                part, _ = Stack.read(pair, clear, room).gram(budget.device)
            found[torch.tensor(index)[:, None], torch.tensor(index)] = part
        return mixed_gram((found + found.T) / 2, needed.matrix)

    def groups(self, pair: Pair, budget: Budget) -> list[list[int]]:
        """Which sources to take together, so that every two of them meet: all, or groups two by two."""
        n, rank = len(self.sources), max((source.rank(pair) for source in self.sources), default=1)

        def cost(rows: int) -> int:
            return 8 * (2 * rows * rank * (pair.d_out + pair.d_in) + GRAMS * ((rows + 1) * rank) ** 2)

        if cost(n) <= budget.memory or n <= 2:
            return [list(range(n))]
        size = max((g for g in range(1, n) if cost(2 * g) <= budget.memory), default=1)
        parts = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
        return [[*one, *other] for i, one in enumerate(parts) for other in parts[:i]] or parts


class Stack(NamedTuple):
    """The factors of one pair of several rows, side by side, and those of their anchors behind them.

    Attributes:
        left: (d_out, N + anchors) float64.
        right: (N + anchors, d_in) float64.
        owner: (N,) which row a place belongs to.
        partner: (N,) its place in the row's anchor; one past the end where there is none.
    """

    left: Tensor
    right: Tensor
    owner: Tensor
    partner: Tensor

    @classmethod
    def read(cls, pair: Pair, sources: Sequence[Factors], room: Room) -> "Stack":
        """Read the factors of some rows, and of each of their anchors once, side by side."""
        anchors = list({id(s.anchor): s.anchor for s in sources if s.anchor is not None}.values())
        everything = [*sources, *anchors]
        ranks = [source.rank(pair) for source in everything]
        begins = dict(zip(map(id, everything), accumulate([0, *ranks]), strict=False))
        owner = torch.cat([torch.full((rank,), i) for i, rank in enumerate(ranks[: len(sources)])])
        nothing = sum(ranks)
        partner = torch.cat(
            [
                torch.full((rank,), nothing) if s.anchor is None else torch.arange(rank) + begins[id(s.anchor)]
                for s, rank in zip(sources, ranks, strict=False)
            ]
        )
        left, right = room.left.take(pair.d_out, nothing), room.right.take(nothing, pair.d_in)
        for source, stop, rank in zip(everything, accumulate(ranks), ranks, strict=True):
            place = slice(stop - rank, stop)
            left[:, place], right[place] = source.left(pair, 0, pair.d_out), source.right(pair)
        return cls(left, right, owner, partner)

    def inner(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inner products of all columns of `left`, and of all rows of `right`; each with a row and column of zeros."""
        left, right = self.left.to(device), self.right.to(device)
        return padded(left.T @ left), padded(right @ right.T)

    def gram(self, device: torch.device, inner: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, set[int]]:
        """(n, n) inner products of the rows x (A + y) + B y, from those of all columns x, B and all rows y, A.

        And the rows whose factors cancel so far in their product that this says little of it. A client that sends
        (cB, A / c), or other factors that are long for what they amount to, would otherwise seem as short as it likes.
        """
        p, q = inner or self.inner(device)
        own, partner = torch.arange(len(self.owner), device=device), self.partner.to(device)
        anchored = q[own] + q[partner]  # (A + y) yᵀ
        products = p[own][:, own] * (anchored[:, own] + anchored[:, partner])
        across = p[own][:, partner] * anchored[:, own]
        products += across + across.T + p[partner][:, partner] * q[own][:, own]
        rows = int(self.owner.max()) + 1
        owner = self.owner.to(device)
        by_row = torch.zeros(rows, len(own), dtype=p.dtype, device=device).index_add_(0, owner, products)
        gram = torch.zeros(rows, rows, dtype=p.dtype, device=device).index_add_(1, owner, by_row)
        doubtful = gram.diagonal() < CANCELS * self.allowed(p, q).square()
        return gram.cpu(), set(doubtful.nonzero().flatten().tolist())

    def allowed(self, p: Tensor, q: Tensor) -> Tensor:
        """(n,) the length of each row that the lengths of its factors allow; `p` and `q` as `inner` gives them."""
        own, partner, owner = torch.arange(len(self.owner)), self.partner.to(p.device), self.owner.to(p.device)
        squares = torch.stack([p.diagonal()[own], q.diagonal()[own], q.diagonal()[partner], p.diagonal()[partner]])
        sums = torch.zeros(4, int(self.owner.max()) + 1, dtype=p.dtype, device=p.device)
        x, y, a, b = sums.index_add_(1, owner, squares).sqrt()
        lengths: Tensor = x * (a + y) + b * y
        return lengths


@dataclass(frozen=True, eq=False)
class Balanced:
    """A row's product of one pair in factors that do not cancel: orthonormal rows, and columns as long as it is."""

    client: str
    left_factor: Tensor
    right_factor: Tensor
    anchor: None = None

    @classmethod
    def of(cls, source: Factors, pair: Pair) -> "Balanced":
        """Two QRs and a small SVD of a row's own factors.

        Raises:
            NotFiniteError: if the factors cancel so far that float64 does not know their product.
        """
        return cls.from_factors(source.client, pair, *whole_factors(source, pair))

    @classmethod
    def from_factors(cls, client: str, pair: Pair, left: Tensor, right: Tensor) -> "Balanced":
        """The same from (d_out, k) and (k, d_in)."""
        q_left, r_left = qr(left)
        q_right, r_right = qr(right.T)
        core = r_left @ r_right.T
        rounding = 1e-16 * float((r_left.abs() @ r_right.abs().T).norm())
        scale = float(core.norm())
        if rounding > UNKNOWN * scale and rounding > UNKNOWN * LEAST:
            reason = f"the factors of {pair.name!r} cancel so far that their product is not known"
            raise NotFiniteError(client, pair.name, reason)
        u, s, vt = svd(core)
        return cls(client, q_left @ (u * s), vt @ q_right.T)

    def advise(self, pair: Pair) -> None:
        """They are at hand."""

    def rank(self, pair: Pair) -> int:
        """How many columns there are."""
        return self.left_factor.shape[1]

    def left(self, pair: Pair, start: int, stop: int) -> Tensor:
        """(stop - start, k)."""
        return self.left_factor[start:stop]

    def right(self, pair: Pair) -> Tensor:
        """(k, d_in)."""
        return self.right_factor

    whole = right


def whole_factors(source: Factors, pair: Pair) -> tuple[Tensor, Tensor]:
    """All factors of one row's product, its anchor's included: [x, B_g] and [A_g + y; y]."""
    left, whole = source.left(pair, 0, pair.d_out), source.whole(pair)
    if source.anchor is None:
        return left, whole
    y = whole - source.anchor.right(pair)
    return torch.cat([left, source.anchor.left(pair, 0, pair.d_out)], dim=1), torch.cat([whole, y])


def cancels(left: Tensor, right: Tensor) -> bool:
    """Whether a product is far shorter than its factors, column by row, allow."""
    energy = ((left.T @ left) * (right @ right.T)).sum()
    allowed = left.norm(dim=0) @ right.norm(dim=1)
    return bool(energy < CANCELS * allowed.square())


def block_diagonal(one: Tensor, other: Tensor) -> Tensor:
    """Both matrices along the diagonal of one."""
    whole = one.new_zeros(one.shape[0] + other.shape[0], one.shape[1] + other.shape[1])
    whole[: one.shape[0], : one.shape[1]] = one
    whole[one.shape[0] :, one.shape[1] :] = other
    return whole


def padded(matrix: Tensor) -> Tensor:
    """The same with a row and a column of zeros behind."""
    return torch.nn.functional.pad(matrix, (0, 1, 0, 1))
