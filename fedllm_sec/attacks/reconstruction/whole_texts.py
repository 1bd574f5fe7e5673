"""Sentences of an encoder: candidates for each position by the first layer, then descents to texts that pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.blocks import Blocks
from fedllm_sec.attacks.reconstruction.descent import Descent
from fedllm_sec.attacks.reconstruction.second_layer import Check

PATIENCE = 64  # descents in a row that end where one has ended before
SAMPLES = 32  # texts that are compared with others of a word else
REUSED = 0.5  # at most, of the positions have all candidates, where others have those that are in no text yet
Text = tuple[int, ...]


class Whole(NamedTuple):
    """A text that passed.

    Attributes:
        states: (L, D) float32.
        distance: the largest of them from the space, relative.
    """

    states: Tensor
    distance: float


@dataclass
class WholeTexts:
    """A search by descents from random texts.

    Attributes:
        blocks: compute what the layers read.
        check: of what the second layer reads.
        candidates: the tokens that may be at each position.
        end: the token with which every text ends, and that is nowhere else; None: there is none.
        budget: tokens that may go through the first layer.
        tick: is called for each state that is found.
        generator: draws the texts to begin with.
        passed: the texts that are right.
        stopped: why the search ended before all was found, or nothing.
    """

    blocks: Blocks
    check: Check
    candidates: Sequence[Tensor]
    end: int | None
    budget: int
    tick: Callable[[], None]
    generator: torch.Generator
    passed: dict[Text, Whole] = field(default_factory=dict)
    stopped: str = ""

    def __post_init__(self) -> None:
        filled = next((i for i, each in enumerate(self.candidates) if not len(each)), len(self.candidates))
        ends = [place for place in range(filled) if self.end is None or self.end in self.candidates[place]]
        self.lengths = [place + 1 for place in ends if place > 1 or place == ends[-1]]  # one of nothing draws all to it

    def run(self) -> None:
        """Descend from random texts until everything is accounted for.

        What was found draws later searches to itself. So each goes at first through tokens that are in no text yet, but
        for a part of the positions, and then through all.
        """
        if not self.lengths:
            self.stopped = "no token of the bag can begin a text: is it another base model?"
            return
        check, again = self.finer(), 0
        whole = Descent(self.blocks, check, self.candidates, self.lengths, self.end, self.budget, self.generator)
        seen: set[Text] = set()
        while not self.is_done():
            if self.blocks.computed >= self.budget:
                self.stopped = f"the search was ended after {self.blocks.computed:,} tokens (budget={self.budget})"
                return
            if again == PATIENCE:
                self.stopped = f"{PATIENCE} searches in a row led nowhere new"
                return
            part = self.fresh()
            found = whole.run(replace(whole, candidates=part).run(self.start(part)))
            text = tuple(found.tolist())
            again = again + 1 if text in seen else 0
            seen.add(text)
            self.judge(text, check)

    def judge(self, text: Text, check: Check) -> None:
        """Keep a text if each of its states passes."""
        states = self.blocks.second(torch.tensor([text]))[0]
        if text not in self.passed and float(check.excess(states).max()) <= 1:
            self.passed[text] = Whole(states, float(check.distances(states).max()))
            for _ in text:
                self.tick()

    def is_done(self) -> bool:
        """Whether the texts account for all states; after several steps, in which states drift, for all tokens."""
        if self.check.drifted:
            return not self.left()
        return bool(self.passed) and self.check.accounted(self.states()) >= self.check.rank

    def states(self) -> Tensor:
        """(N, D) of all texts that passed."""
        return torch.cat([whole.states for whole in self.passed.values()])

    def left(self) -> set[int]:
        """Candidates that are in no text yet."""
        every = {int(token) for place in self.candidates for token in place}
        return every - {token for text in self.passed for token in text}

    def fresh(self) -> list[Tensor]:
        """For each position the candidates that are in no text yet; all where there are none, and at some others."""
        if not self.passed:
            return list(self.candidates)
        left = torch.tensor(sorted(self.left() | ({self.end} if self.end is not None else set())))
        share = REUSED * torch.rand((), generator=self.generator)
        reused = torch.rand(len(self.candidates), generator=self.generator) < share
        few = [place[torch.isin(place, left)] for place in self.candidates]
        return [a if bool(r) or not len(b) else b for a, b, r in zip(self.candidates, few, reused, strict=True)]

    def start(self, among: Sequence[Tensor]) -> Tensor:
        """A random text (L,) of some candidates for each position."""
        text = []
        for place in among[: self.lengths[self.drawn(len(self.lengths))]]:
            inner = [token for token in place.tolist() if token != self.end] or place.tolist()
            text.append(inner[self.drawn(len(inner))])
        if self.end is not None:
            text[-1] = self.end
        return torch.tensor(text)

    def drawn(self, most: int) -> int:
        """A number below."""
        return int(torch.randint(most, (), generator=self.generator))

    def finer(self) -> Check:
        """The check, made so fine that a text has no wrong word: it would show at its own position at least."""
        pairs = []
        for _ in range(SAMPLES):
            text = self.start(self.candidates)
            open_to = [place for place in range(len(text)) if len(self.candidates[place]) > 1]
            if open_to:
                place = open_to[self.drawn(len(open_to))]
                other = text.clone()
                others = self.candidates[place][self.candidates[place] != text[place]]
                other[place] = others[self.drawn(len(others))]
                pairs.append(self.blocks.second(torch.stack([text, other]))[:, place])
        return self.check.finer(*torch.stack(pairs).unbind(dim=1)) if pairs else self.check


def candidates(blocks: Blocks, check: Check, bag: Tensor, positions: int) -> list[Tensor]:
    """The tokens that may be at each position: their input to the first layer lies in the space of those read.

    Args:
        blocks: compute it.
        check: of what the first layer reads.
        bag: (t,) tokens.
        positions: that the model has.
    """
    if check.drifted and len(bag) > 1:  # then others are the measure: tokens beside one another, at the same positions
        some = blocks.first(bag[: SAMPLES + 1, None].expand(-1, min(positions, SAMPLES)))
        check = check.finer(some[:-1].flatten(0, 1), some[1:].flatten(0, 1))
    here = [check.excess(blocks.first(token.expand(1, positions))[0]) <= 1 for token in bag]
    return [bag[may] for may in torch.stack(here, dim=1)]
