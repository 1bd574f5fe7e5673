"""The columns of an update: named tensors laid side by side, and how they are cut into blocks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple


class Span(NamedTuple):
    """A run of columns within one tensor: its flat elements `start` to `stop`."""

    tensor: str
    start: int
    stop: int


class Pair(NamedTuple):
    """A tensor of the product space: `scaling` * B A, with B (d_out, rank) and A (rank, d_in)."""

    name: str
    a: str
    b: str
    d_out: int
    d_in: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of an update, by name; a 0-d tensor is one column.

    Two updates can be added, compared or averaged if and only if their layouts are equal. In the product space of
    LoRA some of the tensors are products of factor pairs; in the space of factors there are no `pairs`.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    pairs: tuple[Pair, ...] = ()

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], pairs: Sequence[Pair] = ()) -> "Layout":
        """Build a layout, tensors in order of their names."""
        return cls(tuple((name, tuple(shapes[name])) for name in sorted(shapes)), tuple(sorted(pairs)))

    @property
    def plain(self) -> "Layout":
        """The part that are not products."""
        products = {pair.name for pair in self.pairs}
        return Layout(tuple(entry for entry in self.shapes if entry[0] not in products))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each tensor, in order."""
        return {name: prod(shape) for name, shape in self.shapes}

    @property
    def columns(self) -> int:
        """The number of coordinates, d."""
        return sum(self.sizes.values())

    def spans(self, columns: int) -> Iterator[Span]:
        """Cut every tensor into runs of at most `columns` elements."""
        for name, size in self.sizes.items():
            for start in range(0, size, columns):
                yield Span(name, start, min(start + columns, size))

    def difference(self, other: "Layout") -> str | None:
        """Say in words where `other` departs from this layout, or None if it does not."""
        ours, theirs = dict(self.shapes), dict(other.shapes)
        if missing := sorted(ours.keys() - theirs.keys()):
            return f"tensor {missing[0]!r} is missing" + and_more(missing)
        if extra := sorted(theirs.keys() - ours.keys()):
            over = "" if ".lora_" in extra[0] else ": PEFT would load it over the base's weight of that name"
            return f"tensor {extra[0]!r} does not belong there" + and_more(extra) + over
        for name, shape in ours.items():
            if theirs[name] != shape:
                return f"tensor {name!r} has shape {list(theirs[name])}, expected {list(shape)}{rank_note(name)}"
        if self.pairs != other.pairs:
            return "one is in the space of LoRA products and the other is not, or they are scaled otherwise"
        return None


def and_more(names: list[str]) -> str:
    """' (and 3 more)' for a list of four."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def rank_note(name: str) -> str:
    """A hint for the commonest cause of unlike shapes."""
    return " (another LoRA rank?)" if "lora_" in name else ""
