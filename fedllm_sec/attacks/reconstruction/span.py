"""The span of the columns of a head's gradient, and which classes have a vector of their own in it.

Shapes: C classes, h features (with the bias one more), n examples, S the rank.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog

from fedllm_sec.attacks.reconstruction.last_layer import Head
from fedllm_sec.victim import Victim

REVEALED = 0.5 * 0.5**0.5  # half of the margin that a class reaches at least if it is there (see `margin`)
SLACK = 0.1  # at most, of the constraints, for rounding
Matrix = NDArray[np.float64]


class Space(NamedTuple):
    """The span of the columns of a head's gradient.

    Attributes:
        basis: (C, S) orthonormal.
        full: whether S is all that the head's shape allows, so that more than S examples may be behind it.
        noise: the first singular value that is left out by the last one that is kept, 0 to 1: how far the span may be
            turned; 1 if it is full, because then nothing tells.
        slack: by how much an entry of a vector of the span may be off for the rounding of what the client sent.
        floor: that rounding, or noise, as a singular value.
    """

    basis: Matrix
    full: bool
    noise: float
    slack: float
    floor: float


def span_of(head: Head, examples: int, victim: Victim) -> Space:
    """The n strongest directions of the columns, without those that are rounding.

    A weight that was sent in float32 is off by up to half a unit in its last place, which is divided by the learning
    rate here; a matrix of such errors has a largest singular value of about sqrt(C) + sqrt(h) of them. Spread over the
    entries of the S directions, each of which is divided by its own singular value, that is the slack. Noise that a
    client added shows in the sums over classes, which would be zero without it, and is treated alike.
    """
    left, values, _ = torch.linalg.svd(head.whole, full_matrices=False)
    classes, features = head.whole.shape
    unit, spread = torch.finfo(torch.float32).eps, math.sqrt(classes) + math.sqrt(features)
    rounding = unit / 2 * float(head.received.abs().max()) * math.sqrt(victim.steps) / head.scale
    noise_of_sums = float(head.whole.sum(dim=0).norm()) / math.sqrt(classes * features)
    floor = max(spread * rounding, spread * noise_of_sums, 4 * unit * float(values[0]))
    rank = max(1, min(int((values > floor).sum()), examples))
    full = rank >= min(classes - 1, features)
    dropped = float(values[rank]) if rank < len(values) else 0.0
    kept = float(values[rank - 1])
    noise = 1.0 if full else min(1.0, dropped / kept)
    slack = min(SLACK, min(dropped, floor) / kept * math.sqrt(rank) / spread)
    return Space(left[:, :rank].numpy(), full, noise, slack, floor)


def margin(space: Space, c: int) -> float:
    """How negative entry c of a vector of the span can be while no other is: max -(P r)_c with |r_k| <= 1.

    A class that is there reaches at least 1 / sqrt(2), for its g_i of length one does: its negative entry is as large
    as the others together, and so at least that. One that is not reaches 0. Constraints are slack by the rounding.
    """
    others = np.delete(space.basis, c, axis=0)
    bound = np.full(len(others), space.slack)
    solved = linprog(space.basis[c], A_ub=-others, b_ub=bound, bounds=(-1, 1), method="highs")
    return -float(solved.fun) if solved.status == 0 else 0.0
