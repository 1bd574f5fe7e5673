"""Which optimizer made an update, from its values alone: who is not told how a client trained can often see it."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet

Optimizer = Literal["sgd", "adam", "adamw"]
FLAT = 2.0  # a fourth moment over the squared second: 1 if all move alike, 3 for normal ones, more for gradients
SAMPLED = 2**22  # coordinates that are looked at
NEAR = 5e-3  # of a round number
MANY = 5  # steps that are taken for granted where more than one was made and nobody says how many


class Guess(NamedTuple):
    """How a client trained, told or guessed.

    Attributes:
        optimizer: the local one.
        learning_rate: of it; of SGD it does not matter.
        steps: of it.
        told: whether nothing was guessed.
    """

    optimizer: Optimizer
    learning_rate: float
    steps: int
    told: bool

    def __str__(self) -> str:
        how = f"{self.steps} step{'s' * (self.steps > 1)} of {self.optimizer}"
        if self.optimizer != "sgd":
            how += f" at a learning rate of {self.learning_rate:.3g}"
        return f"taken for {how}" + ("" if self.told else " (guessed from the update's values)")


def guesses(updates: UpdateSet, optimizer: str | None, rate: float | None, steps: int | None) -> list[Guess]:
    """Fill in what is not told; where values leave it open, one guess for each way, to be tried.

    Adam moves all coordinates with a clear gradient alike, by learning rate times steps: the commonest move tells that
    product. Whether it was one step or several the values do not say plainly; how well each explains them does.

    Raises:
        InputError: for an unknown optimizer, or a number that is not above zero.
    """
    if optimizer not in (None, "sgd", "adam", "adamw"):
        raise InputError(f"optimizer={optimizer!r}: clients train with sgd, adam or adamw")
    for name, value in (("learning_rate", rate), ("steps", steps)):
        if value is not None and not value > 0:
            raise InputError(f"{name}={value}: must be above zero")
    moves = sample(updates)
    known: Optimizer = optimizer or ("adamw" if is_flat(moves) else "sgd")  # type: ignore[assignment]
    told = optimizer is not None
    if known == "sgd" or not len(moves):
        return [Guess(known, rate or 1.0, steps or 1, told)]
    total = commonest(moves)
    possible = [steps] if steps else [max(1, round(total / rate))] if rate else [1, MANY]
    told = told and rate is not None and steps is not None
    return [Guess(known, rate or likely_rate(moves, total, number), number, told) for number in possible]


def likely_rate(moves: Tensor, total: float, steps: int) -> float:
    """The learning rate, of which people choose round ones: one of two digits, where that is near enough.

    In one step nothing moves by more than the rate, and what has a large gradient by hardly less.
    """
    found = float(moves.max()) if steps == 1 else total / steps
    rounded = float(f"{found:.1e}")
    return rounded if abs(rounded / found - 1) < NEAR and (steps > 1 or rounded >= found) else found


def sample(updates: UpdateSet) -> Tensor:
    """How far the coordinates of the first row moved, those that did: 1-D float64, at most `SAMPLED` of each part."""
    parts, seen = [], 0
    for _, block in updates.rows([0]).blocks():
        values = block[0].abs().double().cpu()
        parts.append(values[values > 0])
        seen += len(parts[-1])
        if seen > SAMPLED:
            break
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def is_flat(moves: Tensor) -> bool:
    """Whether coordinates move alike, as no plain gradient does."""
    if not len(moves):
        return False
    square = moves.square()
    return float(square.square().mean() / square.mean().square()) < FLAT


def commonest(moves: Tensor) -> float:
    """The mode of how far coordinates moved, by halving the shortest interval that holds half of what is left."""
    values = moves.sort().values
    while len(values) > 2:
        half = (len(values) + 1) // 2
        widths = values[half - 1 :] - values[: len(values) - half + 1]
        start = int(widths.argmin())
        values = values[start : start + half]
    return float(values.mean()) if len(values) else 1.0
