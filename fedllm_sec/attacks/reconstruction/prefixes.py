"""Sentences of a causal model, grown token by token: the last state of a prefix tells whether its next token is right.

In a causal model a state depends on the tokens up to its own only, so what has been found stays right whatever follows.
The last token of a text is read by nobody: what is found are the texts without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.blocks import Blocks
from fedllm_sec.attacks.reconstruction.second_layer import STATE, Check

ECHOES = 8  # times that a token at the beginning of a text may follow itself there
SAMPLES = 32  # texts that are compared with others of a word else, for each length
SAME = 10 * STATE  # of a state's length: no difference but that of rounding
Text = tuple[int, ...]


class Passed(NamedTuple):
    """A prefix whose last state passed the check.

    Attributes:
        state: (D,) float32.
        distance: of it from the space, relative.
        echoes: how many states in a row were the same, up to this one: then it tells nothing of the last token.
    """

    state: Tensor
    distance: float
    echoes: int = 0


@dataclass
class Prefixes:
    """A search, breadth first.

    Attributes:
        blocks: compute states.
        check: tells which of them are right.
        bag: (t,) the tokens that there are.
        budget: tokens that may go through the first layer.
        longest: tokens that the model can read.
        tick: is called for each state that is found.
        generator: draws the texts by which the check is made finer.
        passed: all prefixes that are right.
        stopped: why the search ended before its end, or nothing.
    """

    blocks: Blocks
    check: Check
    bag: Tensor
    budget: int
    longest: int
    tick: Callable[[], None]
    generator: torch.Generator
    passed: dict[Text, Passed] = field(default_factory=dict)
    stopped: str = ""

    def run(self) -> None:
        """Grow until no prefix can be extended.

        A token that follows itself at the beginning of a text changes nothing where positions are not added: what is
        attended to is the same. Whether it does is told by what comes after, so that it is tried some times.
        """
        level = self.longer([()])
        while level and not self.stopped:
            if len(level[0]) == self.longest:
                self.stopped = f"the model reads no more than {self.longest} tokens"
            else:
                level = self.longer(level)

    def longer(self, prefixes: list[Text]) -> list[Text]:
        """Those of one token more that are right, of some of one length."""
        found = []
        for row, column, state, distance in self.right(prefixes):
            prefix = prefixes[row]
            before, text = self.passed.get(prefix), (*prefix, int(self.bag[column]))
            same = before is not None and bool((before.state - state).norm() < SAME * state.norm())
            echoes = before.echoes + 1 if before is not None and same else 0
            if echoes <= ECHOES:
                self.passed[text] = Passed(state, distance, echoes)
                found.append(text)
            if not echoes:
                self.tick()
        return found

    def finer(self, prefixes: list[Text]) -> Check:
        """The check, made so fine that it tells the texts of one token more from others.

        Those have another last token. Where states drifted, and how near a right one must be is not known from the
        noise, they have another word elsewhere, which changes the state far less.
        """
        length, count = len(prefixes[0]), len(self.bag)
        if count < 2:
            return self.check
        of, last, by = (self.drawn(most) for most in (len(prefixes), count, count - 1))
        where = self.drawn(length) if self.check.drifted and length else torch.full((SAMPLES,), length)
        texts = torch.cat([torch.tensor(prefixes, dtype=torch.long)[of], self.bag[last, None]], dim=1)
        others, rows = texts.clone(), torch.arange(SAMPLES)
        others[rows, where] = another(self.bag, texts[rows, where], by)
        return self.check.finer(self.blocks.second(texts)[:, -1], self.blocks.second(others)[:, -1])

    def drawn(self, most: int) -> Tensor:
        """Numbers below."""
        return torch.randint(most, (SAMPLES,), generator=self.generator)

    def right(self, prefixes: list[Text]) -> Iterator[tuple[int, int, Tensor, float]]:
        """Which prefix can be followed by which token, the state that comes of it, and its distance from the space."""
        check = self.finer(prefixes)
        for rows, columns, states in self.states(prefixes):
            for place in (check.excess(states) <= 1).nonzero().flatten().tolist():
                distance = float(check.distances(states[place : place + 1]))
                yield int(rows[place]), int(columns[place]), states[place], distance
            if self.blocks.computed > self.budget:
                self.stopped = f"the search was ended after {self.blocks.computed:,} tokens (budget={self.budget})"
            elif len(self.told()) > 2 * self.check.rank:
                self.passed = {}
                self.stopped = "far more prefixes pass the check than there are states: none of them is to be trusted"
            if self.stopped:
                return

    def states(self, prefixes: list[Text]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each token of the bag behind each prefix, some at a time."""
        if prefixes == [()]:
            yield torch.zeros(len(self.bag)), torch.arange(len(self.bag)), self.blocks.second(self.bag[:, None])[:, 0]
        else:
            yield from self.blocks.extended(torch.tensor(prefixes), self.bag)

    def told(self) -> dict[Text, Passed]:
        """The prefixes of which the last token is told."""
        return {text: passed for text, passed in self.passed.items() if not passed.echoes}

    def along(self, text: Text) -> Iterator[Passed]:
        """What passed of each beginning of a text, itself the last."""
        return (self.passed[text[: length + 1]] for length in range(len(text)))

    def texts(self) -> list[Text]:
        """Those that are not the beginning of another one, the longest first."""
        told = self.told()
        begun = {text[:length] for text in told for length in range(1, len(text))}
        return sorted((text for text in told if text not in begun), key=lambda text: (-len(text), text))


def another(bag: Tensor, tokens: Tensor, by: Tensor) -> Tensor:
    """(m,) one of the other tokens of a sorted bag (t,) for each of some (m,): the first, the second, ... behind it."""
    return bag[(torch.searchsorted(bag, tokens) + 1 + by) % len(bag)]
