"""The order of a single text, at any rank, where positions are added to words: each position counts as its token does.

LayerNorm(w + p + t) = scale * (c(w) + c(p) + c(t)) + bias (`dictionary`): the atoms of a token and of its position have
the same coefficient in a row. Where all atoms are known, the rows tell the coefficients of all of them, as many as
there are rows. Of a single text a position's are those of its token, and a token's are the sum of its positions'. So
they are of several texts of which the others are beginnings of one: those cannot be told from it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SAME = 3.0  # times their noise: so little apart two vectors of coefficients may be the same
CLEARLY = 3.0  # times as far apart all others have to be
SEVERAL = 16  # positions, at most, among which those of tokens that come more than once are looked for
FITTING = 4  # sets of positions, at most, that a token's coefficients may be the sum of

Text = tuple[int, ...]


class Counted(NamedTuple):
    """Coefficients, (m, k), and the deviations of their noise."""

    values: Tensor
    noise: Tensor

    def without_nothing(self) -> "Counted":
        """Up to the last one that is more than noise: behind it nothing was read."""
        told = (self.values.abs() > SAME * self.noise).any(dim=1).nonzero().flatten().tolist()
        end = told[-1] + 1 if told else 0
        return Counted(self.values[:end], self.noise[:end])


def order(tokens: Tensor, positions: Tensor, token_noise: Tensor, position_noise: Tensor) -> Text | None:
    """Which token is at each position, by its place in the list; None where it is not a single text, or not told.

    Args:
        tokens: (n, k) coefficients of each token.
        positions: (L, k) coefficients of each position.
        token_noise: (n, k) their deviations.
        position_noise: (L, k) the same.
    """
    words, places = Counted(tokens, token_noise), Counted(positions, position_noise).without_nothing()
    found = alone(words, places)
    left = [p for p in range(len(places.values)) if p not in found]
    repeated = [t for t in range(len(tokens)) if t not in found.values()]
    if repeated and tokens.shape[1] == 1:
        return None  # a sum of single numbers is like many another one
    shared = several(words, places, repeated, left)
    if shared is None:
        return None
    found |= shared
    return tuple(found[p] for p in range(len(places.values)))


def apart(one: Counted, other: Counted) -> Tensor:
    """(m, n) how far rows are from one another, in units of their noise; the largest over the coefficients."""
    noise = (one.noise.square()[:, None] + other.noise.square()[None]).sqrt()
    return ((one.values[:, None] - other.values[None]).abs() / noise).amax(dim=2)


def alone(words: Counted, places: Counted) -> dict[int, int]:
    """The positions that have the coefficients of one token, and of no other, as that token has theirs alone."""
    far = apart(places, words)
    found = {}
    for p, t in (far < SAME).nonzero().tolist():
        rivals = torch.cat([far[p, :t], far[p, t + 1 :], far[:p, t], far[p + 1 :, t]])
        if bool((rivals > CLEARLY * SAME).all()):
            found[p] = t
    return found


def several(words: Counted, places: Counted, repeated: Sequence[int], left: Sequence[int]) -> dict[int, int] | None:
    """The positions of tokens that are there more than once; None where they cannot be told, or are not unique."""
    if not repeated:
        return None if left else {}
    if len(left) > SEVERAL:
        return None
    token, *others = repeated
    bits = torch.arange(1, 2 ** len(left))[:, None] >> torch.arange(len(left)) & 1  # all sets of positions
    chosen, place = bits.to(places.values), list(left)
    sums = Counted(chosen @ places.values[place], (chosen @ places.noise[place].square()).sqrt())
    here = Counted(words.values[token][None], words.noise[token][None])
    found = None
    fitting = (apart(sums, here)[:, 0] < SAME).nonzero().flatten().tolist()
    if len(fitting) > FITTING:
        return None  # noise hides which
    for which in fitting:
        some = {p for p, is_in in zip(left, bits[which].tolist(), strict=True) if is_in}
        rest = several(words, places, others, [p for p in left if p not in some])
        if rest is not None and found is not None:
            return None
        found = found if rest is None else dict.fromkeys(sorted(some), token) | rest
    return found
