"""Tokens from B, where A tells nothing and positions are added to words: each pair of both is checked.

dB = s Gᵀ X Aᵀ has rows that are combinations of A x, of so many vectors as different inputs were read. Where these are
fewer than the rank, A x lies in the rows' space for the inputs that were read, and for no others (DAGER's check, Petrov
et al. 2024, arXiv:2405.15586, seen through A). The atoms of `dictionary` are of no use here: an input is the sum of a
token's and a position's, and only the sum lies there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.dictionary import BLOCK, Checkpoint, normed
from fedllm_sec.attacks.reconstruction.families import Family
from fedllm_sec.attacks.reconstruction.second_layer import Check

FEW = 0.01  # of the tokens, by which the others' distances are judged


class Pair(NamedTuple):
    """A token at a position, whose input passed.

    Attributes:
        token: its id.
        position: from 0.
        distance: of its A x from the rows' space, relative.
        input: (d,) float32.
    """

    token: int
    position: int
    distance: float
    input: Tensor


class Read(NamedTuple):
    """What the check lets pass.

    Attributes:
        pairs: the nearest first.
        chance: how many of them are expected to have passed by chance.
        accounted: the share of the space's directions that are theirs.
    """

    pairs: list[Pair]
    chance: float
    accounted: float

    @property
    def trusted(self) -> float:
        """The share that is expected to be right, times the share of the space that is accounted for."""
        return self.accounted * max(0.0, 1 - self.chance / len(self.pairs)) if self.pairs else 0.0


def pairs(check: Check, checkpoint: Checkpoint, family: Family, memory: int) -> Read:
    """The pairs that pass: no more than can all have been read.

    Positions are walked up to the first at which no token passes, or where what passed accounts for the whole space and
    none is expected to be there by chance.
    """
    inputs, positions = input_of(checkpoint, family)
    found: list[Pair] = []
    chance = 0.0
    for position in range(positions):
        here, of_chance = at(position, check, inputs, checkpoint.rows(family.words), memory)
        found, chance = found + here, chance + of_chance
        if not here or (chance < FEW and len(found) >= check.rank == accounted(check, found)):
            break
    nearest = sorted(found, key=lambda pair: pair.distance)[: check.rank]
    return Read(nearest, max(chance, len(found) - check.rank), accounted(check, nearest) / max(check.rank, 1))


def accounted(check: Check, found: list[Pair]) -> int:
    """How many directions of the space are those of pairs."""
    return check.accounted(torch.stack([pair.input for pair in found])) if found else 0


def at(
    position: int, check: Check, inputs: Callable[[int, int, int], Tensor], size: int, memory: int
) -> tuple[list[Pair], float]:
    """The tokens that pass at one position, and how many do by chance; one walk.

    A vector of chance is within x of the space with a probability that goes as x to the power of the directions that
    no token uses. By how far the nearest `FEW` of all tokens are away, that says how many come as near as the limit.
    """
    step = max(1, min(BLOCK, memory) // (4 * len(inputs(0, 1, position)[0])))
    found, every = [], []
    for start in range(0, size, step):
        block = inputs(start, min(start + step, size), position)
        every.append(check.excess(block))
        passed = (every[-1] <= 1).nonzero().flatten().tolist()
        if passed:
            distances = check.distances(block[passed]).tolist()
            found += [Pair(start + i, position, far, block[i]) for i, far in zip(passed, distances, strict=True)]
    few = max(1, round(FEW * size))
    near = float(torch.cat(every).kthvalue(min(few + len(found), size)).values)
    free = sum(len(space.basis) - space.rank for space in check.spaces)
    return found, few * max(near, 1.0) ** -free


def input_of(checkpoint: Checkpoint, family: Family) -> tuple[Callable[[int, int, int], Tensor], int]:
    """What gives the (b, d) inputs of the tokens from one id up to another at a position; and how many positions."""
    assert family.positions is not None
    weight = checkpoint.read(f"{family.norm}.weight")
    bias = checkpoint.read(f"{family.norm}.bias")
    table = checkpoint.read(family.positions)[family.skipped :]
    segment = checkpoint.read(family.types, 0, 1)[0] if family.types else torch.zeros(len(weight))

    def inputs(start: int, stop: int, position: int) -> Tensor:
        summed = checkpoint.read(family.words, start, stop) + table[position] + segment
        return normed(summed, weight, bias, family, checkpoint.config)

    return inputs, len(table)
