"""The order of a single text, at any rank, where positions are added to words: each position counts as its token does.

LayerNorm(w + p + t) = scale * (c(w) + c(p) + c(t)) + bias (`dictionary`): the atoms of a token and of its position have
the same coefficient in a row. Where all atoms are known, the rows tell the coefficients of all of them, as many as
there are rows. Of a single text a position's are those of its token, and a token's are the sum of its positions'.
"""

from itertools import combinations

import torch
from torch import Tensor

ALIKE = 0.05  # of the larger one of two vectors of coefficients: so little apart they may be the same
CLEARLY = 3.0  # times as far apart all others have to be
SEVERAL = 16  # positions, at most, among which those of tokens that come more than once are looked for

Text = tuple[int, ...]


def order(tokens: Tensor, positions: Tensor) -> Text | None:
    """Which token is at each position, by its place in the list; None where it is not a single text, or not told.

    Args:
        tokens: (n, k) coefficients of each token.
        positions: (L, k) coefficients of each position.
    """
    places = alone(tokens, positions)
    left = [p for p in range(len(positions)) if p not in places]
    repeated = [t for t in range(len(tokens)) if t not in places.values()]
    shared = several(tokens, positions, repeated, left)
    if shared is None:
        return None
    places |= shared
    return tuple(places[p] for p in range(len(positions)))


def alone(tokens: Tensor, positions: Tensor) -> dict[int, int]:
    """The positions that have the coefficients of one token, and of no other, as that token has theirs alone."""
    apart = torch.cdist(positions, tokens) / torch.maximum(positions.norm(dim=1)[:, None], tokens.norm(dim=1))
    found = {}
    for p, t in (apart < ALIKE).nonzero().tolist():
        rivals = torch.cat([apart[p, :t], apart[p, t + 1 :], apart[:p, t], apart[p + 1 :, t]])
        if bool((rivals > CLEARLY * apart[p, t]).all()):
            found[p] = t
    return found


def several(tokens: Tensor, positions: Tensor, repeated: list[int], left: list[int]) -> dict[int, int] | None:
    """The positions of tokens that are there more than once; None where they cannot be told, or are not unique."""
    if not repeated:
        return None if left else {}
    if len(left) > SEVERAL:
        return None
    token, *others = repeated
    found = None
    for count in range(1, len(left) - len(others) + 1):
        for some in combinations(left, count):
            total = positions[list(some)].sum(dim=0)
            size = torch.maximum(total.norm(), tokens[token].norm())
            if float((total - tokens[token]).norm()) < ALIKE * float(size):
                rest = several(tokens, positions, others, [p for p in left if p not in some])
                if rest is not None and found is not None:
                    return None
                found = found if rest is None else dict.fromkeys(some, token) | rest
    return found
