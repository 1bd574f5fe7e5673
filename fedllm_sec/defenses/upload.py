"""What a client does to its update before it sends it: noise on it, or its largest coordinates only.

Both work on the blocks of an update, whose rows are treated each by itself; nothing of the size of a model is held.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedllm_sec.core import Defense, Round
from fedllm_sec.defenses.common import Positive
from fedllm_sec.randomness import tiled_noise
from fedllm_sec.registry import defense
from fedllm_sec.updates.layout import Span
from fedllm_sec.updates.update_set import UpdateSet

Unit = Literal["update", "tensor", "weights"]
Part = Annotated[float, Field(gt=0, le=1)]
DIGIT = 16  # bits of a number that one pass settles
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}  # for a float's bits: of positive ones as ordered


@defense("update_noise", paper="McMahan et al. 2018, arXiv:1710.06963; Sun et al. 2019, arXiv:1911.07963")
def update_noise(*, scale: Positive = 1.0, unit: Unit = "update") -> Defense:
    """A client adds Gaussian noise to each coordinate of its update before it sends it.

    The papers clip first and add noise that does not depend on the data, on the server: then it gives differential
    privacy. By default the noise is as large as this update's own coordinates are: it hides as much in every round, and
    is no guarantee. For one, clip to a fixed length and take `unit: weights`.
    """
    return Defense(client=UpdateNoise(scale, unit))


@defense("top_k", paper="Aji and Heafield 2017, arXiv:1704.05021")
def top_k(*, share: Part = 0.01) -> Defense:
    """A client sends the share of its update's coordinates that are the largest, and zeros in place of the rest.

    The paper keeps what was not sent for a later round, and estimates the threshold from a sample; here what is dropped
    is lost, and the threshold is exact.
    """
    return Defense(client=TopK(share))


@dataclass(frozen=True)
class UpdateNoise:
    """Gaussian noise on every coordinate.

    Attributes:
        scale: the standard deviation, in units of
        unit: `update`: the root mean square of all coordinates of the row; `tensor`: that of the coordinates of the
            same tensor; `weights`: 1, so that it is in the units of the weights.
    """

    scale: float
    unit: Unit = "update"

    def sent(self, updates: UpdateSet, round: Round) -> UpdateSet:
        """Rows with noise; each row's depends on its client's name and on the round, not on how columns are cut.

        Args:
            updates: (n, d), each row for itself. A root mean square takes a pass over them.
            round: whose seed should be the client's own: whoever knows it can take the noise out.

        Returns:
            n rows, lazily; sums in float64, in the dtype of the rows.
        """
        deviation = self.deviations(updates)

        def draw(count: int, generator: torch.Generator) -> Tensor:
            return torch.randn(count, generator=generator, dtype=torch.float64)

        def noise(span: Span, client: str) -> Tensor:
            return tiled_noise(span, lambda *tile: round.generator("update_noise", client, *tile), draw)

        def add(block: Tensor, span: Span) -> Tensor:
            drawn = torch.stack([noise(span, client) for client in updates.clients]).to(block.device)
            return (block.double() + deviation[span.tensor].to(block.device)[:, None] * drawn).to(block.dtype)

        return updates.map(add)

    def deviations(self, updates: UpdateSet) -> dict[str, Tensor]:
        """(n,) float64 standard deviations of the noise on each tensor."""
        sizes = updates.layout.sizes
        if self.unit == "weights":
            return {name: torch.full((len(updates),), self.scale, dtype=torch.float64) for name in sizes}
        squares = {name: torch.zeros(len(updates), dtype=torch.float64) for name in sizes}
        for span, block in updates.blocks():
            squares[span.tensor] += block.double().square().sum(dim=1).cpu()
        if self.unit == "tensor":
            return {name: self.scale * (squares[name] / max(size, 1)).sqrt() for name, size in sizes.items()}
        whole = self.scale * (sum(squares.values(), torch.zeros(len(updates))) / updates.layout.columns).sqrt()
        return dict.fromkeys(sizes, whole)


@dataclass(frozen=True)
class TopK:
    """The coordinates of largest magnitude, over the whole row.

    Attributes:
        share: k / d; k is rounded, and at least 1. All that are as large as the k-th largest are sent, so that with
            ties they are more than k.
    """

    share: float

    def sent(self, updates: UpdateSet, round: Round) -> UpdateSet:
        """Rows with zeros where a coordinate is smaller than the row's k-th largest.

        Args:
            updates: (n, d), each row for itself; two passes over them (four where they are float64).
            round: is not asked.

        Returns:
            n rows, lazily.
        """
        least = thresholds(updates, max(1, int(self.share * updates.layout.columns + 0.5)))

        def keep(block: Tensor, span: Span) -> Tensor:
            return torch.where(block.abs() >= least.to(block.device)[:, None], block, 0.0)

        return updates.map(keep)


def thresholds(updates: UpdateSet, k: int) -> Tensor:
    """(n,) the k-th largest magnitude of each row, exactly, in the dtype of the rows.

    Bits of positive floats, read as integers, are in the order of the floats. Each pass counts how often each value of
    the next 16 bits occurs among the numbers that agree in those already settled (a radix selection).

    Args:
        updates: (n, d).
        k: from 1 to d.
    """
    kind = INTEGERS[updates.dtype]
    device, n = updates.budget.device, len(updates)
    settled, wanted = torch.zeros(n, dtype=kind, device=device), torch.full((n,), k, device=device)
    for shift in reversed(range(0, updates.dtype.itemsize * 8, DIGIT)):
        counts = torch.zeros(n, 2**DIGIT, dtype=torch.int64, device=device)
        for _, block in updates.blocks():
            bits = block.abs().view(kind) >> shift
            for row, (number, prefix) in enumerate(zip(bits, settled, strict=True)):
                among = number[number >> DIGIT == prefix] & (2**DIGIT - 1)
                counts[row] += torch.bincount(among, minlength=2**DIGIT)
        at_least = counts.flip(1).cumsum(1)  # in the order of the largest digits
        place = (at_least < wanted[:, None]).sum(dim=1, keepdim=True)
        wanted = wanted - (at_least - counts.flip(1)).gather(1, place)[:, 0]
        settled = (settled << DIGIT) + (2**DIGIT - 1 - place[:, 0]).to(kind)
    return settled.view(updates.dtype)
