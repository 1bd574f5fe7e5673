"""One pass over adapters of one layout: their values, what each module's product looks like, and how they compare.

Everything is read off the inner products of all adapters' factors, one module at a time: lengths, angles and singular
values of products that are never formed, with the scaling, and minus the global adapter where one is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm_sec.audit.census import Watched
from fedllm_sec.audit.spectrum import Spectrum, spectrum
from fedllm_sec.updates.device import Budget, Scratch
from fedllm_sec.updates.errors import NotFiniteError
from fedllm_sec.updates.factors import AdapterFactors, Anchor
from fedllm_sec.updates.layout import Layout, Pair
from fedllm_sec.updates.linalg import one_thread
from fedllm_sec.updates.memory import give_back
from fedllm_sec.updates.products import Balanced, Factors, Products, Room, Stack
from fedllm_sec.updates.rows import from_sources
from fedllm_sec.updates.sources import SafetensorsFile
from fedllm_sec.updates.update_set import gram_of_blocks

MEASURES = ("norm", "top1", "rank", "kurtosis", "gauge", "moved", "aligned", "slack")
TRIMMED = 4  # modules, after which freed memory is given back
REST = "(saved whole)"  # the module of everything that is no product


class Beside(NamedTuple):
    """An adapter that is laid beside others."""

    name: str
    source: Watched
    scalings: Mapping[str, float]  # of each module's product


@dataclass(frozen=True)
class Measured:
    """What a pass found.

    Attributes:
        names: of the adapters, n.
        modules: m.
        gram: (n, n) float64, of whole updates.
        measures: each (n, m) float64; NaN where a module has no such thing.
        agreement: (n,) share of coordinates of the factors in which an adapter moved as most others did; NaN without
            a global adapter.
        unknown: adapters with a module whose factors cancel so far that their product is not known, by module.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    gram: NDArray[np.float64]
    measures: Mapping[str, NDArray[np.float64]]
    agreement: NDArray[np.float64]
    unknown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class OwnScaling(AdapterFactors):
    """An adapter's factors under the scaling of its own configuration."""

    scalings: Mapping[str, float] = field(default_factory=dict)

    def left(self, pair: Pair, start: int, stop: int) -> Tensor:
        """(stop - start, r): rows of s B, or of s (B - B_g)."""
        return super().left(pair._replace(scaling=self.scalings[pair.name]), start, stop)


def pairs_in(layout: Layout, modules: Mapping[str, tuple[str, str]], scalings: Mapping[str, float]) -> list[Pair]:
    """The LoRA pairs of a layout; those of convolutions are matrices of (out, in * height * width).

    Args:
        layout: of the file.
        modules: the names of A and B by module.
        scalings: by module.
    """
    shapes = dict(layout.shapes)
    pairs = []
    for module, (a, b) in sorted(modules.items()):
        rank, d_in, d_out = shapes[a][0], prod(shapes[a][1:]), shapes[b][0]
        if prod(shapes[b][1:]) == rank and rank * d_in * d_out > 0:
            pairs.append(Pair(module, a, b, d_out, d_in, rank, scalings[module]))
    return pairs


@dataclass
class Pass:
    """The work of one pass, and what it has found so far."""

    adapters: Sequence[Beside]
    pairs: Sequence[Pair]
    reference: SafetensorsFile | None
    budget: Budget
    gram: Tensor = field(init=False)
    measures: dict[str, Tensor] = field(init=False)
    agreeing: Tensor = field(init=False)
    unknown: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.adapters)
        self.gram = torch.zeros(n, n, dtype=torch.float64)
        blank = torch.full((n, len(self.pairs)), torch.nan, dtype=torch.float64)
        self.measures = {name: blank.clone() for name in MEASURES}
        self.agreeing = torch.zeros(2, n, dtype=torch.float64)
        anchor = Anchor(AdapterFactors("the global adapter", self.reference, self.budget)) if self.reference else None
        self.sources: list[Factors] = [
            OwnScaling(each.name, each.source, self.budget, anchor, each.scalings) for each in self.adapters
        ]
        self.room = Room(Scratch(), Scratch())

    def run(self) -> None:
        """Go through all modules."""
        products = Products.of(self.pairs, self.sources)
        for column, pair in enumerate(self.pairs):
            if column + 1 < len(self.pairs):
                products.advise(self.pairs[column + 1])
            self.gram += self.of_pair(column, pair, products.groups(pair, self.budget))
            if column % TRIMMED == TRIMMED - 1:  # what is given back has to be asked for again, which takes time
                give_back()

    def of_pair(self, column: int, pair: Pair, groups: Sequence[Sequence[int]]) -> Tensor:
        """(n, n) inner products of one module's updates; groups of adapters meet two by two where memory is short."""
        n = len(self.adapters)
        found, done = torch.zeros(n, n, dtype=torch.float64), set[int]()
        for index in groups:
            stack, inner, part = self.stacked(pair, [self.sources[i] for i in index])
            place = torch.tensor(list(index))
            found[place[:, None], place] = part
            new = [k for k, i in enumerate(index) if i not in done]
            with one_thread():  # thousands of small matrices
                self.note(column, [index[k] for k in new], spectrum(stack, inner, new, self.scalings(pair, index)))
            if self.reference and len(groups) == 1:
                self.count_signs(stack)
            done.update(index)
        self.measures["norm"][:, column] = found.diagonal().clamp(min=0).sqrt()
        return (found + found.T) / 2

    def scalings(self, pair: Pair, index: Sequence[int]) -> Tensor:
        """What the products of some adapters are multiplied by."""
        return torch.tensor([self.adapters[i].scalings[pair.name] for i in index], dtype=torch.float64)

    def stacked(self, pair: Pair, sources: list[Factors]) -> tuple[Stack, tuple[Tensor, Tensor], Tensor]:
        """The factors side by side, their inner products, and those of the products; once more where factors cancel."""
        stack = Stack.read(pair, sources, self.room)
        inner = stack.inner(self.budget.device)
        part, doubtful = stack.gram(self.budget.device, inner)
        if doubtful:
            clear = [self.balanced(source, pair) if i in doubtful else source for i, source in enumerate(sources)]
            part, _ = Stack.read(pair, clear, Room(Scratch(), Scratch())).gram(self.budget.device)
        return stack, inner, part

    def balanced(self, source: Factors, pair: Pair) -> Factors:
        """Factors that do not cancel; zeros where the product is not known, which is noted."""
        try:
            return Balanced.of(source, pair)
        except NotFiniteError:
            self.unknown.setdefault(source.client, pair.name)
            empty = torch.zeros(pair.d_out, 1, dtype=torch.float64), torch.zeros(1, pair.d_in, dtype=torch.float64)
            return Balanced(source.client, *empty)

    def note(self, column: int, rows: Sequence[int], found: Spectrum) -> None:
        """Keep what the products of a module look like."""
        for name, values in found._asdict().items():
            self.measures[name][list(rows), column] = values

    def count_signs(self, stack: Stack) -> None:
        """In how many coordinates of the factors each adapter moved as the majority of the others did."""
        rank = len(stack.owner) // len(self.adapters)
        for factor in (stack.left.T, stack.right):
            rows = [factor[k * rank : (k + 1) * rank] for k in range(len(self.adapters))]
            signs = torch.stack([row.sign().to(torch.int8) for row in rows])  # a byte each: the factors take eight
            total = signs.sum(dim=0, dtype=torch.int16)
            for k, row in enumerate(signs):
                agreeing = (total - row).sign_() * row  # 1, -1, or 0 where one has none
                counted = int(agreeing.count_nonzero())
                self.agreeing[0, k] += (int(agreeing.sum(dtype=torch.int64)) + counted) / 2
                self.agreeing[1, k] += counted


def measure(
    adapters: Sequence[Beside],
    pairs: Sequence[Pair],
    reference: SafetensorsFile | None,
    budget: Budget,
) -> Measured:
    """Read adapters of one layout once, and say what they are.

    Args:
        adapters: n of them.
        pairs: their LoRA pairs.
        reference: the global adapter, of the same layout, with finite values.
        budget: for the factors of one module of all adapters; where they need more, they are read several times.
    """
    work = Pass(adapters, pairs, reference, budget)
    work.run()
    rest = rest_of(adapters, pairs)
    modules, measures = [pair.name for pair in pairs], work.measures
    if rest.shapes:
        sources, names = [each.source for each in adapters], [each.name for each in adapters]
        ones = torch.ones(len(adapters), dtype=torch.float64)
        gram = gram_of_blocks(from_sources(sources, names, ones, budget, reference, rest))
        work.gram += gram
        modules.append(REST)
        blank = torch.full((len(adapters), 1), torch.nan, dtype=torch.float64)
        more = {name: gram.diagonal()[:, None].clamp(min=0).sqrt() if name == "norm" else blank for name in measures}
        measures = {name: torch.cat([values, more[name]], dim=1) for name, values in measures.items()}
    agreement = torch.where(work.agreeing[1] > 0, work.agreeing[0] / work.agreeing[1], torch.nan)
    return Measured(
        tuple(each.name for each in adapters),
        tuple(modules),
        work.gram.numpy(),
        {name: values.numpy() for name, values in measures.items()},
        agreement.numpy(),
        work.unknown,
    )


def rest_of(adapters: Sequence[Beside], pairs: Sequence[Pair]) -> Layout:
    """The tensors that belong to no pair."""
    factors = {name for pair in pairs for name in (pair.a, pair.b)}
    shapes = adapters[0].source.layout.shapes
    return Layout(tuple((name, shape) for name, shape in shapes if name not in factors))
