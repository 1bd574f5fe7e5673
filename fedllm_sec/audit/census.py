"""What the values of a tensor are, counted while they are read for something else."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedllm_sec.updates.factors import LARGEST_FACTOR
from fedllm_sec.updates.layout import Layout, Span
from fedllm_sec.updates.sources import SafetensorsFile, all_finite

FEW = 256  # distinct values: what eight bits can tell apart
ENOUGH = 1024  # values, before few distinct ones mean anything
LOOKED_AT = 2**12  # values that are looked at for distinct ones
NORMAL = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float64, torch.float32, torch.bfloat16)}


@dataclass
class Census:
    """The values of one tensor of one adapter.

    Attributes:
        count: how many have been read.
        bad: NaN, infinite, or too large for products.
        denormal: of those that are not zero, too small for a normal number of the type; of float16, whose range is
            narrow, none are counted.
        lowest: of the finite values.
        highest: likewise.
        is_bfloat16: whether all fit into bfloat16.
        is_float16: whether all fit into float16.
        distinct: how many distinct values there are among the first ones that were read.
        sha256: of the bytes, when all have been read.
    """

    count: int = 0
    bad: int = 0
    denormal: int = 0
    lowest: float = float("inf")
    highest: float = float("-inf")
    is_bfloat16: bool = True
    is_float16: bool = True
    distinct: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, values: Tensor) -> bool:
        """Count a run of values, in their stored type; say whether all are numbers."""
        first = self.count == 0
        self.count += values.numel()
        self.digest.update(memoryview(values.view(torch.uint8).numpy().data))
        if not values.numel():
            return True
        low, high = (float(each) for each in torch.aminmax(values))
        fine = low >= -LARGEST_FACTOR and high <= LARGEST_FACTOR  # false for NaN too
        if not fine:
            kept = values[values.abs() <= LARGEST_FACTOR]
            self.bad += values.numel() - kept.numel()
            if not kept.numel():
                return False
            values = kept
            low, high = (float(each) for each in torch.aminmax(values))
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        self.look(values, first=first)
        return fine

    def look(self, values: Tensor, *, first: bool) -> None:
        """Denormals, and formats in which they all fit."""
        if values.dtype in NORMAL:
            small = values[values.abs() < NORMAL[values.dtype]]
            self.denormal += int(small.count_nonzero()) if small.numel() else 0
        if values.dtype in (torch.float32, torch.float64):
            self.is_bfloat16 = self.is_bfloat16 and rounds_to(values, torch.bfloat16)
            self.is_float16 = self.is_float16 and rounds_to(values, torch.float16)
        else:
            self.is_bfloat16 = self.is_float16 = False  # they are what the type is
        if first:
            self.distinct = int(torch.unique(values[:LOOKED_AT]).numel())

    @property
    def sha256(self) -> str:
        """Of the bytes read so far."""
        return self.digest.hexdigest()

    @property
    def is_zero(self) -> bool:
        """Whether all values are zero."""
        return self.count > 0 and not self.bad and self.lowest == self.highest == 0

    @property
    def is_constant(self) -> bool:
        """Whether all values are the same, and not zero."""
        return self.count > 1 and not self.bad and self.lowest == self.highest != 0

    @property
    def coarseness(self) -> str | None:
        """The coarser format whose numbers all these are; None where they are as fine as their type."""
        if self.count < ENOUGH or self.lowest == self.highest:
            return None
        if self.distinct <= FEW:
            return f"{self.distinct} distinct values"
        return "bfloat16" if self.is_bfloat16 else "float16" if self.is_float16 else None


def rounds_to(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a narrower type holds the same values; a first few tell of nearly all that it does not."""
    few = values[:64]
    return torch.equal(few.to(dtype).to(values.dtype), few) and torch.equal(values.to(dtype).to(values.dtype), values)


class Watched:
    """An adapter file that counts what is read of it, and gives zeros in place of what is no number.

    So one value that is no number spoils its own adapter, and no comparison of the others.
    """

    on_disk = True

    def __init__(self, file: SafetensorsFile):
        self.file = file
        self.layout: Layout = file.layout
        self.dtypes = file.dtypes
        self.census: dict[str, Census] = {}

    def advise(self, span: Span) -> None:
        """Have the system read a run of columns meanwhile."""
        self.file.advise(span)

    def load(self, span: Span, into: Tensor | None = None) -> Tensor:
        """A run of columns, counted if it is what follows."""
        values = self.file.load(span, into)
        census = self.census.setdefault(span.tensor, Census())
        fine = census.add(values) if census.count == span.start else all_finite(values, LARGEST_FACTOR)
        return (
            values if fine else torch.where(values.abs() <= LARGEST_FACTOR, values, torch.zeros((), dtype=values.dtype))
        )
