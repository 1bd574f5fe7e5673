"""From any text to one whose hidden states lie nearer to a space: discrete Gauss-Newton steps, then one edit at a time.

In an encoder each state depends on the whole text. So a text is judged as a whole, by the mean distance of its states
from the space, and searched for as one: all single exchanges of a token are computed, and with them, to first order,
any number of exchanges at once: what of the states is beside the space is taken to be a sum of what the exchanges do
to it. The squared length of a sum is a quadratic form in the choices of a token for each position, whose minima are
looked for from many starts without another forward pass; then the best are computed. Where that leads nowhere a token
is left out or put in, which moves all behind it.

The step is ours. DAGER (arXiv:2405.15586, section 4.3) tries all combinations of the tokens of each position, greedily
from the left for long texts.

Shapes: L positions, M exchanges, S starts, K numbers that stand for a state's part beside the space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.blocks import Blocks
from fedllm_sec.attacks.reconstruction.second_layer import Check

SKETCH = 96  # K: random combinations of the coordinates, which keep lengths to a tenth
STARTS = 128  # S, from the text itself to random ones
BEST = 8  # minima of the quadratic form, and of single exchanges, that are computed
MOST = 2**12  # M; of more a part of the positions is drawn
NUMBERS = 2**25  # M L K, at most
FILLS = 4  # texts of each length that is longer by more than a token
SWEEPS = 20  # at most, until no choice changes
GAIN = 1e-7  # of the mean distance: less is rounding


class Table(NamedTuple):
    """The exchanges of single tokens of a text (L,).

    Attributes:
        places: positions with a choice.
        choices: how many tokens each of them has.
        texts: (1 + M, L), the text itself first, then by position.
        values: (1 + M,) mean distances.
        beside: (1 + M, L K) what of their states is beside the space.
    """

    places: list[int]
    choices: list[int]
    texts: Tensor
    values: Tensor
    beside: Tensor


@dataclass
class Descent:
    """A search among texts of given candidates.

    Attributes:
        blocks: compute states.
        check: tells how far they are from the space.
        candidates: the tokens that may be at each position.
        lengths: that texts may have.
        end: the token with which every text ends, and that is nowhere else; None: there is none.
        budget: tokens that may go through the first layer.
        generator: draws starts.
    """

    blocks: Blocks
    check: Check
    candidates: Sequence[Tensor]
    lengths: Sequence[int]
    end: int | None
    budget: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        width = sum(len(space.basis) for space in self.check.spaces)
        sketch = torch.randn(width, SKETCH, generator=self.generator, dtype=torch.float64)
        self.sketch = sketch / SKETCH**0.5

    def run(self, text: Tensor) -> Tensor:
        """A text (L,) that passes the check, or else one that no step makes better, or how far it came."""
        text = self.cut(text)
        value = float(self.values(text[None]))
        while self.blocks.computed < self.budget and not self.passes(text):
            for step in (self.exchanged, self.edited):
                better = self.cut(step(text))
                at = float(self.values(better[None]))
                if at < value - GAIN:
                    break
            else:
                break
            text, value = better, at
        return text

    def passes(self, text: Tensor) -> bool:
        """Whether each state was computed in training: another such text may be nearer still."""
        return float(self.check.excess(self.blocks.second(text[None])[0]).max()) <= 1

    def cut(self, text: Tensor) -> Tensor:
        """A text up to its first end."""
        ends = (text == self.end).nonzero().flatten().tolist() if self.end is not None else []
        return text[: ends[0] + 1] if ends else text

    def values(self, texts: Tensor) -> Tensor:
        """(n,) float64, the mean distance of the states of texts (n, L)."""
        return self.check.distances(self.blocks.second(texts).flatten(0, 1)).view(texts.shape).mean(dim=1)

    def exchanged(self, text: Tensor) -> Tensor:
        """The best text of the same length that was found."""
        table = self.table(text)
        jumps = self.jumps(text, table)
        texts, values = torch.cat([table.texts, jumps]), torch.cat([table.values, self.values(jumps)])
        return texts[int(values.argmin())]

    def table(self, text: Tensor) -> Table:
        """All exchanges; of very many those at some positions."""
        open_to = range(len(text) - (self.end is not None))
        places = [place for place in open_to if len(self.candidates[place]) > 1]
        most = min(MOST, NUMBERS // (SKETCH * len(text)))
        kept: list[int] = []
        for drawn in torch.randperm(len(places), generator=self.generator).tolist():
            more = [*kept, places[drawn]]
            if not kept or sum(len(self.candidates[place]) for place in more) <= most:
                kept = more
        kept.sort()
        choices = [len(self.candidates[place]) for place in kept]
        texts = text.repeat(1 + sum(choices), 1)
        for place, start, count in zip(kept, accumulate([1, *choices]), choices, strict=False):
            texts[start : start + count, place] = self.candidates[place]
        values, beside = [], []
        for part in torch.split(texts, self.blocks.batch(len(text))):
            states = self.blocks.second(part).flatten(0, 1)
            values.append(self.check.distances(states).view(part.shape).mean(dim=1))
            beside.append((self.check.beside(states) @ self.sketch).float().view(len(part), -1))
        return Table(kept, choices, texts, torch.cat(values), torch.cat(beside))

    def jumps(self, text: Tensor, table: Table) -> Tensor:
        """(n, L) texts of many exchanges at once, for which their sum is least."""
        if not table.places:
            return text[None]
        effects = table.beside[1:] - table.beside[0]
        gram, linear = effects @ effects.T, 2 * effects @ table.beside[0]
        offsets = [0, *accumulate(table.choices)]
        now = [self.place_of(text, place) for place in table.places]
        chosen = least(gram, linear, offsets, torch.tensor(now), self.generator)
        texts = text.repeat(len(chosen), 1)
        texts[:, table.places] = table.texts[1:][chosen, torch.tensor(table.places)]
        return texts

    def place_of(self, text: Tensor, place: int) -> int:
        """Where a text's token is among the candidates of its position; the first if it is none."""
        return int((self.candidates[place] == text[place]).int().argmax())

    def edited(self, text: Tensor) -> Tensor:
        """The best text of another length that was found; the same where there is none."""
        best, least = text, float("inf")
        for texts in self.edits(text):
            values = self.values(texts)
            if float(values.min()) < least:
                best, least = texts[int(values.argmin())], float(values.min())
        return best

    def edits(self, text: Tensor) -> Iterator[Tensor]:
        """(n, L') of other lengths: a token less, a token more, or filled up at random."""
        body = text if self.end is None else text[:-1]
        tail = text[len(body) :]
        for length in self.lengths:
            size = length - len(tail)
            if size == len(body) - 1:
                yield torch.stack([torch.cat([body[:place], body[place + 1 :], tail]) for place in range(len(body))])
            elif size == len(body) + 1:
                put = [(place, token) for place in range(size) for token in self.candidates[place]]
                yield torch.stack([torch.cat([body[:place], token[None], body[place:], tail]) for place, token in put])
            elif size > len(body):
                more = [self.drawn(self.candidates[place], FILLS) for place in range(len(body), size)]
                yield torch.cat([body.repeat(FILLS, 1), torch.stack(more, dim=1), tail.repeat(FILLS, 1)], dim=1)

    def drawn(self, tokens: Tensor, count: int) -> Tensor:
        """(count,) of some tokens (t,)."""
        return tokens[torch.randint(len(tokens), (count,), generator=self.generator)]


def least(gram: Tensor, linear: Tensor, offsets: Sequence[int], now: Tensor, generator: torch.Generator) -> Tensor:
    """Choices of one exchange for each position, for which x' gram x + linear x is least, by coordinate descent.

    Args:
        gram: (M, M).
        linear: (M,).
        offsets: where each position's exchanges begin, and M.
        now: (P,) for each position the exchange that changes nothing, counted from its offset.
        generator: draws starts.

    Returns:
        (n, P) indices of exchanges, the best n = `BEST` at most.
    """
    begins, sizes = offsets[:-1], [stop - start for start, stop in pairwise(offsets)]
    drawn = torch.stack([torch.randint(size, (STARTS,), generator=generator) for size in sizes], dim=1)
    far = torch.linspace(0, 1, STARTS)[:, None]  # from what is there to anything
    anew = torch.rand(drawn.shape, generator=generator) < far
    chosen = torch.where(anew, drawn, now) + torch.tensor(begins)
    for _ in range(SWEEPS):
        before = chosen.clone()
        for place in torch.randperm(len(sizes), generator=generator).tolist():
            block = slice(offsets[place], offsets[place + 1])
            with_others = gram[:, block][chosen].sum(dim=1) - gram[:, block][chosen[:, place]]
            cost = linear[block] + gram.diagonal()[block] + 2 * with_others
            chosen[:, place] = cost.argmin(dim=1) + offsets[place]
        if torch.equal(before, chosen):
            break
    chosen = torch.unique(chosen, dim=0)
    values = linear[chosen].sum(dim=1) + gram[chosen[:, :, None], chosen[:, None]].sum(dim=(1, 2))
    best: Tensor = chosen[values.argsort()[:BEST]]
    return best
