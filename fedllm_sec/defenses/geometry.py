"""Defenses that see the Gram matrix only: one streamed pass to decide, then only the kept rows are read."""

import logging
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedllm_sec.core import Defense, Round
from fedllm_sec.registry import defense
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet

logger = logging.getLogger(__name__)

AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]


@defense("krum", paper="Blanchard et al. 2017, arXiv:1703.02757")
def krum(*, f: AtLeast0, m: AtLeast1 = 1) -> Defense:
    """Keep the m updates closest to their n - f - 2 nearest neighbours, and average them alike (m > 1: m-Krum).

    The score of client i is the sum of its squared distances to its n - f - 2 nearest others. The kept clients weigh
    alike, as in the paper: sample counts are claims. The paper's guarantee needs n >= 2f + 3.

    Raises:
        InputError: with fewer than f + 3 clients (no score is defined), or m > n - f (a byzantine row would be kept).
    """

    def select(updates: UpdateSet, round: Round) -> UpdateSet:
        n = len(updates)
        if n < f + 3:
            raise InputError(f"krum(f={f}, m={m}) needs n >= f + 3, got n={n} clients")
        if m > n - f:
            raise InputError(f"krum(f={f}, m={m}) can keep at most n - f = {n - f} of n={n} clients; lower m")
        if n < 2 * f + 3:
            logger.warning("krum(f=%d) with %d clients: the paper's guarantee needs n >= 2f + 3 = %d", f, n, 2 * f + 3)
        scores = krum_scores(squared_distances(updates.gram), f)
        kept = sorted(torch.argsort(scores, stable=True)[:m].tolist())
        round.record(
            "krum",
            {
                "defense": {"name": "krum", "f": f, "m": m},
                "guaranteed": n >= 2 * f + 3,
                "kept": [updates.clients[i] for i in kept],
                "scores": dict(zip(updates.clients, scores.tolist(), strict=True)),
            },
        )
        return updates.rows(kept).weighted_equally()

    return Defense(before=select)


def krum_scores(distances: Tensor, f: int) -> Tensor:
    """(n,) sums of each row's n - f - 2 smallest squared distances to other rows."""
    n = len(distances)
    others = distances.clone().fill_diagonal_(torch.inf)
    return others.sort(dim=1).values[:, : n - f - 2].sum(dim=1)


def squared_distances(gram: Tensor) -> Tensor:
    """(n, n) squared distances between rows, from their (n, n) inner products; never negative."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)
