"""What a round is, what an attack is, what a defense is, and how they meet (the papers' Algorithm 1).

A method is a function that returns a record of functions, one for each stage of the papers; which fields it fills is
what it does. There are no flags beside the record, so nothing can drift from it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedllm_sec.updates.device import TILE
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import write_json
from fedllm_sec.updates.layout import Span
from fedllm_sec.updates.update_set import UpdateSet, check_same_layout

NOBODY = ("nobody",)  # the only row's name when a defense trusts no client: zero, and nothing is left to decide


@dataclass(frozen=True)
class Round:
    """What the server knows while it aggregates.

    Attributes:
        index: the round's number, from 1.
        dir: the round's folder; a defense keeps its memory and its decision in a folder of its own name there. None
            where nothing is to be kept.
        seed: the run's seed.
        previous: the last round's folder, for defenses with a memory.
        reference: the global adapter that the clients received, one row in the space of the updates.
        trusted: an update that the server trained itself on data it trusts, one row.
        place: of the defense in its chain; a defense that is there twice draws twice.
    """

    index: int = 1
    dir: Path | None = None
    seed: int = 0
    previous: Path | None = None
    reference: UpdateSet | None = None
    trusted: UpdateSet | None = None
    place: int = 0

    def generator(self, *names: object) -> torch.Generator:
        """A CPU generator of its own for every (run seed, round, names): named randomness, never a shared stream."""
        return torch.Generator().manual_seed(self.seed_for(*names))

    def seed_for(self, *names: object) -> int:
        """The 63-bit seed behind `generator`, for libraries that want a number."""
        return derived_seed(self.seed, self.index, *([self.place] if self.place else []), *names)

    def folder(self, defense: str) -> Path | None:
        """Where a defense keeps things: `<dir>/<defense>`; its second time in a chain is `_2`."""
        if self.dir is None:
            return None
        names = chain([defense], (f"{defense}_{i}" for i in count(2)))
        folder = next(self.dir / name for name in names if not (self.dir / name / "decision.json").exists())
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, defense: str, decision: Mapping[str, Any]) -> None:
        """Keep what a defense decided, as `decision.json` in its folder; with that it is done there."""
        if folder := self.folder(defense):
            write_json(folder / "decision.json", decision)


@dataclass(frozen=True)
class Threat:
    """What the adversary holds and sees; no defense is ever given one.

    Attributes:
        round: when this is.
        malicious: rows (indices into the round's clients) that the adversary owns.
        visible: rows that it sees: its own, unless it was granted more.
        reference: the global adapter that the clients received, one row.
    """

    round: Round
    malicious: tuple[int, ...]
    visible: tuple[int, ...]
    reference: UpdateSet

    def __post_init__(self) -> None:
        if hidden := set(self.malicious) - set(self.visible):
            raise InputError(f"the adversary owns clients that it does not see: {sorted(hidden)}")

    @property
    def own(self) -> list[int]:
        """Where the adversary's rows lie among the visible ones."""
        return [self.visible.index(i) for i in self.malicious]


Stage = Callable[[UpdateSet, Round], UpdateSet]


class Attack(NamedTuple):
    """The papers' three families; None means that the attack does nothing there."""

    poison_data: Callable[[Any, Threat], Any] | None = None  # a malicious client's data set -> what it trains on
    reconstruct_data: Callable[[UpdateSet, Threat], Any] | None = None  # the visible rows -> what they reveal
    poison_model: Callable[[UpdateSet, Threat], UpdateSet] | None = None  # the visible rows -> its own rows
    labels_only: bool = False  # poison_data changes nothing but labels, so that a training without them is untouched


class Defense(NamedTuple):
    """The papers' three stages on the server, and a client's own; None means that the defense does nothing there."""

    before: Stage | None = None  # n rows -> m rows
    on: Stage | None = None  # m rows -> one row, instead of FedAvg
    after: Stage | None = None  # one row -> one row
    client: object | None = None  # what a client's trainer does; see `defenses.client_side`

    @property
    def acts_on_server(self) -> bool:
        """Whether it does anything with updates that have been sent."""
        return any((self.before, self.on, self.after))


def aggregate(updates: UpdateSet, round: Round, defenses: Sequence[Defense] = ()) -> UpdateSet:
    """Algorithm 1 of FedSecurity (arXiv:2306.04959): defend before, on and after aggregation.

    Args:
        updates: (n, d), client minus global.
        round: what the server knows.
        defenses: their `before` stages chain, at most one has an `on`, their `after` stages chain.

    Returns:
        One row, the update of the global adapter; lazily: nothing of size d is computed before it is saved.

    Raises:
        InputError: if two defenses want to aggregate, one of them acts only while a client trains, or one cannot work
            with this many clients.
    """
    if not all(defense.acts_on_server for defense in defenses):
        raise InputError(
            "a client-side defense acts while a client trains; it can do nothing with updates already sent"
        )
    placed = [(defense, replace(round, place=place)) for place, defense in enumerate(defenses)]
    aggregators = [(defense.on, at) for defense, at in placed if defense.on]
    if len(aggregators) > 1:
        raise InputError(f"{len(aggregators)} of the defenses aggregate; a chain can hold one such (and any others)")
    for defense, at in placed:
        if defense.before and updates.clients != NOBODY:
            updates = defense.before(updates, at)
    if not aggregators or updates.clients == NOBODY:
        result = updates.mean()
    else:
        on, at = aggregators[0]
        result = on(updates, at)
    for defense, at in placed:
        if defense.after:
            result = defense.after(result, at)
    return result


def poison(visible: UpdateSet, attack: Attack, threat: Threat) -> UpdateSet:
    """The rows that the adversary submits in place of its own, with their names and counts.

    Args:
        visible: the rows of `threat.visible`, in that order: all that it is shown.
        attack: with a `poison_model`.
        threat: what it holds.
    """
    assert attack.poison_model is not None
    if len(visible) != len(threat.visible):
        raise ValueError(f"{len(visible)} rows, but {len(threat.visible)} are visible")
    poisoned = attack.poison_model(visible, threat)
    check_same_layout(visible, poisoned)
    if len(poisoned) != len(threat.malicious):
        raise ValueError(f"the attack gave {len(poisoned)} rows for {len(threat.malicious)} malicious clients")
    own = visible.rows(threat.own)
    return replace(poisoned, clients=own.clients, num_samples=own.num_samples)


def derived_seed(*names: object) -> int:
    """A 63-bit seed from a sequence of names; the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def tiled_noise(
    span: Span, generator: Callable[[str, int], torch.Generator], draw: Callable[[int, torch.Generator], Tensor]
) -> Tensor:
    """Noise for the columns of a span that does not depend on how columns are cut into blocks.

    Each tile of `TILE` elements of a tensor has a generator of its own; a span takes what it covers.

    Args:
        span: which columns.
        generator: gives the generator of a (tensor, tile).
        draw: gives that many values, 1-D, from a generator.

    Returns:
        (c,) values, in the dtype that `draw` gives.
    """
    first, last = span.start // TILE, (span.stop - 1) // TILE
    tiles = [draw(TILE, generator(span.tensor, tile)) for tile in range(first, last + 1)]
    return torch.cat(tiles)[span.start - first * TILE : span.stop - first * TILE]
