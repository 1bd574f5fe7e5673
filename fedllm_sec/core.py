"""What a round is, what an attack is, what a defense is, and how they meet (the papers' Algorithm 1).

A method is a function that returns a record of functions, one for each stage of the papers; which fields it fills is
what it does. There are no flags beside the record, so nothing can drift from it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fedllm_sec.randomness import derived_seed
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import write_json
from fedllm_sec.updates.update_set import UpdateSet, check_same_layout
from fedllm_sec.victim import Victim

Knowledge = Literal["own", "colluders", "all", "aggregator"]  # what an adversary sees: each what those before it do
KNOWLEDGE: tuple[Knowledge, ...] = get_args(Knowledge)
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

    def as_the_adversary_knows_it(self) -> "Round":
        """Its number alone: none of the folders, and a seed from which the server's draws cannot be found."""
        return Round(self.index, seed=derived_seed(self.seed, "adversary"))

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

    Where it knows only its `own`, every malicious client acts by itself: it is the only one in `malicious`.

    Attributes:
        round: when this is; with a seed of the adversary's own, and none of the server's folders.
        malicious: rows (indices into the round's clients) that the adversary owns.
        visible: rows that it sees: its own, unless it was granted more.
        reference: the global adapter that the clients received, one row of weights, in the space of the visible rows.
        knowledge: what it was granted.
        clients: how many answer in the round, which everybody knows; 0: those that are visible.
        me: which of `malicious` this is about, where an attack is asked for one client (`poison_data`, `train`).
        factors: the visible rows as they were sent, where they are shown in another space; see `as_sent`.
        received: gives what the clients of a round received, one row of weights; of an earlier round too. Its second
            argument is the space, that of what is sent unless it is `product`.
        server: what the server would make of all rows of the round (with `aggregator`): a context in which the result
            can be read.
        noted: keeps what an attack found out, for whoever reads the run.
        victim: how clients train, for an attack that looks at what their updates reveal.
    """

    round: Round
    malicious: tuple[int, ...]
    visible: tuple[int, ...]
    reference: UpdateSet
    knowledge: Knowledge = "own"
    clients: int = 0
    me: int | None = None
    factors: UpdateSet | None = None
    received: Callable[..., UpdateSet] | None = None
    server: Callable[[UpdateSet], AbstractContextManager[UpdateSet]] | None = None
    noted: Callable[[str, Mapping[str, Any]], None] | None = None
    victim: Victim | None = None

    def __post_init__(self) -> None:
        if hidden := set(self.malicious) - set(self.visible):
            raise InputError(f"the adversary owns clients that it does not see: {sorted(hidden)}")

    @property
    def own(self) -> list[int]:
        """Where the adversary's rows lie among the visible ones."""
        return [self.visible.index(i) for i in self.malicious]

    @property
    def benign(self) -> list[int]:
        """Where the rows lie from which the adversary can tell what honest clients send.

        Those of others, where it sees them. Its own else: they trained honestly before they are rewritten.
        """
        others = [place for place, row in enumerate(self.visible) if row not in self.malicious]
        return others or self.own

    @property
    def size(self) -> int:
        """n, the number of clients that answer in the round."""
        return self.clients or len(self.visible)

    def note(self, attack: str, facts: Mapping[str, Any]) -> None:
        """Keep what an attack found out; it is nothing that a server sees."""
        if self.noted is not None:
            self.noted(attack, facts)

    def generator(self, *names: object) -> torch.Generator:
        """A generator of the adversary's own: nobody else draws from the same stream."""
        return self.round.generator(*names)

    def as_sent(self, visible: UpdateSet) -> UpdateSet:
        """The visible rows in the space of what is sent: LoRA's factors, not their products."""
        return visible if self.factors is None else self.factors

    def last_change(self) -> UpdateSet | None:
        """What the last round did to the global model, one row in the space of what is sent; None in the first."""
        if self.received is None or self.round.index < 2:
            return None
        return self.received(self.round.index).add(self.received(self.round.index - 1).mix(-torch.ones(1, 1)))


SEES: dict[Knowledge, str] = {
    "own": "each malicious client's own update",
    "colluders": "the updates of all malicious clients (visible=colluders)",
    "all": "the updates of all clients (visible=all)",
    "aggregator": "all updates, and what the server makes of them (visible=aggregator)",
}
Stage = Callable[[UpdateSet, Round], UpdateSet]


class Local:
    """What a malicious client's training does besides descending its loss; a trainer calls these at their time.

    Parameters are those that are trained, by their names in the layout of an update; each is changed in place.
    """

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Before the first step: they hold what the client received."""

    def before_step(self, parameters: Mapping[str, Tensor]) -> None:
        """Their `grad` is what the optimizer is about to be given; it is None where a loss does not reach."""

    def after_step(self, parameters: Mapping[str, Tensor]) -> None:
        """The optimizer has changed them."""

    def end(self, parameters: Mapping[str, Tensor]) -> None:
        """After the last step: they are what the client sends."""


class Attack(NamedTuple):
    """The papers' three families, and what an adversary does while it trains; None: the attack does nothing there.

    Attributes:
        poison_data: a malicious client's data set -> what it trains on.
        reconstruct_data: the visible rows -> what they reveal.
        poison_model: the visible rows -> its own rows.
        train: how a malicious client trains.
        train_last: the same once it has seen the visible rows, for which its own clients trained honestly; then
            they train again, on poisoned data if there is a `poison_data`.
        goal: test examples -> those that it wants misjudged, under the labels that it wants: how often it has its way
            is its success.
        needs: what it has to be granted.
        labels_only: poison_data changes nothing but labels, so that a training without them is untouched.
    """

    poison_data: Callable[[Any, Threat], Any] | None = None
    reconstruct_data: Callable[[UpdateSet, Threat], Any] | None = None
    poison_model: Callable[[UpdateSet, Threat], UpdateSet] | None = None
    train: Callable[[Threat], Local] | None = None
    train_last: Callable[[UpdateSet, Threat], Local] | None = None
    goal: Callable[[Any], Any] | None = None
    needs: Knowledge = "own"
    labels_only: bool = False


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
    check_granted(attack, threat.knowledge)
    poisoned = attack.poison_model(visible, threat)
    check_same_layout(poisoned, visible if poisoned.layout.pairs == visible.layout.pairs else threat.as_sent(visible))
    if len(poisoned) != len(threat.malicious):
        raise ValueError(f"the attack gave {len(poisoned)} rows for {len(threat.malicious)} malicious clients")
    own = visible.rows(threat.own)
    return replace(poisoned, clients=own.clients, num_samples=own.num_samples)


def check_granted(attack: Attack, knowledge: Knowledge) -> None:
    """Raise InputError for an attack that asks for more than the adversary was granted."""
    if KNOWLEDGE.index(attack.needs) > KNOWLEDGE.index(knowledge):
        raise InputError(f"this attack sees {SEES[attack.needs]}, and was granted visible={knowledge}: grant it more")


def knowledge_named(text: str) -> Knowledge:
    """One of the four kinds of knowledge, by its name.

    Raises:
        InputError: if there is none of that name.
    """
    for known in KNOWLEDGE:
        if known == text:
            return known
    raise InputError(f"visible={text!r}: an adversary sees {', '.join(KNOWLEDGE)}")
