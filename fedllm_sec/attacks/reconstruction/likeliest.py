"""Pursuit in rows of which only an estimate is known: a choice is tested by how much likelier it makes the moves."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.stats import chi2
from torch import Tensor

from fedllm_sec.attacks.reconstruction.adam import SETTLED, Adam
from fedllm_sec.attacks.reconstruction.search import Pick, Search


@dataclass
class Likeliest(Search[Adam]):
    """A search that takes atoms one by one, and in the end drops those without which the moves are as likely."""

    together: ClassVar[int] = 1
    most: ClassVar[float] = 0.5  # g and h of a row have as many coefficients each as there are atoms
    rounds: ClassVar[int] = 4

    @property
    def needed(self) -> float:
        """By how much likelier the moves have to be with an atom: chance brings no such among all (Wilks 1938).

        The more coefficients there are already, the more one of chance brings, as in a quotient of variances.
        """
        free = self.atoms.width / max(self.atoms.width - 2 * self.basis.shape[1], 1)
        return 0.5 * free * float(chi2.isf(self.lens.alpha / self.atoms.size, 2 * self.lens.rank))

    def step(self) -> bool | None:
        """Take the nearest atom; say whether it is more than chance, by its nearness and by what it brought."""
        before = self.lens.likelihood
        told = super().step()
        return told and self.lens.likelihood - before > self.needed

    def keep(self, tokens: list[int], length: int | None = None) -> bool:
        """Go back to fewer, and let the estimate follow; say whether that changes anything."""
        changed = super().keep(tokens, length)
        if changed:
            self.lens.look(self.basis, steps=SETTLED // 2)
        return changed

    def run(self) -> list[Pick]:
        """Search, drop what is of no use beside the others, and search again until nothing changes."""
        seen: list[set[int]] = []
        judged: list[Pick] = []
        while len(seen) < self.rounds and set(self.picks) not in seen:
            seen.append(set(self.picks))
            self.keep(*self.explore())  # an estimate leans to whatever was taken
            self.lens.look(self.basis, steps=SETTLED)
            judged = self.judge()
            while self.prune(judged):
                judged = self.judge()
        return sorted(judged, key=lambda pick: pick.score, reverse=True)

    def judge(self) -> list[Pick]:
        """How much less likely the moves are without each token, as a share of that and of what is needed."""
        if not self.picks:
            return []
        alone, lengths = self.alone()
        weights = (self.lens.rows @ alone.T).norm(dim=0) * lengths
        losses = [max(0.0, self.lens.loss(without(self.basis, each))) for each in alone]
        scores = [loss / (loss + self.needed) for loss in losses]
        return [Pick(*each) for each in zip(self.picks, scores, weights.tolist(), strict=True)]

    def prune(self, judged: list[Pick]) -> bool:
        """Drop the weaker half of what is not needed; say whether anything was."""
        weak = sorted((pick for pick in judged if pick.score < 0.5), key=lambda pick: pick.score)
        dropped = {pick.token for pick in weak[: (len(weak) + 1) // 2]}
        return self.keep([token for token in self.picks if token not in dropped])


def without(basis: Tensor, direction: Tensor) -> Tensor:
    """(d, q - 1) orthonormal: the span of a (d, q) basis beside a direction (d,) in it."""
    mirror = basis.T @ direction
    mirror[0] += torch.where(mirror[0] < 0, -1.0, 1.0) * mirror.norm()
    return (basis - 2 / mirror.square().sum() * torch.outer(basis @ mirror, mirror))[:, 1:]
