"""Pursuit in rows that are known but for rounding: tokens are dropped that chance explains as well by themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm_sec.attacks.reconstruction.lenses import Exact
from fedllm_sec.attacks.reconstruction.order import order
from fedllm_sec.attacks.reconstruction.search import Pick, Search

NOTHING = 1e-10  # of the rows' energy
ROUNDS = 4  # of pruning and searching again


@dataclass
class Pursuit(Search[Exact]):
    """A search that takes whatever is near, and drops afterwards what does not stand beside the others."""

    def judge(self) -> list[Pick]:
        """How each token stands beside all the others: what the rows would miss without it."""
        if not self.picks:
            return []
        alone, lengths = self.alone()
        rows = self.lens.rows
        left = rows - (rows @ self.basis) @ self.basis.T
        noise = left @ left.T + torch.diag(self.lens.noise**2 + NOTHING)
        parts = rows @ alone.T  # (k, tokens)
        signal = (parts * torch.linalg.solve(noise, parts)).sum(dim=0)
        weights = parts.norm(dim=0) * lengths
        scores = signal / (1 + signal)  # of a row space that loses one direction: Sherman and Morrison
        return [Pick(*each) for each in zip(self.picks, scores.tolist(), weights.tolist(), strict=True)]

    def prune(self, judged: Sequence[Pick]) -> bool:
        """Drop what chance explains as well; say whether anything was."""
        limit = 1 - self.chance(self.lens.rank, self.basis.shape[1] - 1)  # many rows may tell little
        return self.keep([pick.token for pick in judged if pick.score > limit])

    def run(self) -> list[Pick]:
        """Search, drop what does not stand, and search again until nothing changes; the surest tokens first."""
        best: tuple[float, list[int], int] = (-1.0, [], self.length)
        for _ in range(ROUNDS):
            self.explore()
            judged = self.judge()
            while self.prune(judged):
                judged = self.judge()
            if self.explained <= best[0] + 1e-6:
                break
            best = self.explained, list(self.picks), self.length
            if self.explained > 1 - 1e-6:
                break
            ranked = sorted(judged, key=lambda pick: pick.score, reverse=True)
            self.keep([pick.token for pick in ranked[: max(1, 4 * len(ranked) // 5)]])
        self.picks = best[1]
        self.begin()
        self.lens.look(self.basis)
        return sorted(self.judge(), key=lambda pick: pick.score, reverse=True)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left but rounding."""
        return not self.lens.directions(self.basis).shape[1]

    def text(self) -> tuple[int, ...] | None:
        """The tokens of a single text in their order; None where they are of several, or positions are not added."""
        if not self.length or not self.picks:
            return None
        vectors = torch.cat([self.fixed, self.atoms.atoms(self.picks)])
        dual = torch.linalg.pinv(vectors, rtol=1e-9).T
        coefficients = dual @ self.lens.rows.T  # (atoms, k)
        noise = dual.norm(dim=1)[:, None] * self.lens.noise / self.atoms.width**0.5  # a row's is spread over its width
        first = len(self.atoms.constants)
        places = slice(first, first + self.length)
        found = order(coefficients[places.stop :], coefficients[places], noise[places.stop :], noise[places])
        return None if found is None else tuple(self.picks[place] for place in found)
