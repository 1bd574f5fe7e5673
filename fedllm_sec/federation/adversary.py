"""The adversary of an arm: when it acts, whom it owns, what it is shown, and what it does at each stage of a round."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedllm_sec.config import Config
from fedllm_sec.core import Attack, Local, Round, Threat, poison
from fedllm_sec.federation.run_folder import ArmFolder, Sent, client_name, save_updates
from fedllm_sec.randomness import derived_seed
from fedllm_sec.settings import ArmSettings, FederationSettings, OwnTraining, TrainingSettings
from fedllm_sec.updates.admit import RefusedError, admit, open_updates, scan
from fedllm_sec.updates.claims import largest_claim
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import write_json
from fedllm_sec.updates.update_set import UpdateSet

Simulate = Callable[[UpdateSet], AbstractContextManager[UpdateSet]]  # all rows -> what the server would make of them


@dataclass(frozen=True)
class Poisoning:
    """What malicious clients do while they train.

    Attributes:
        clients: who they are.
        change: from one's examples to what it trains on.
        local: what one's trainer does besides; None: nothing.
        own: how they train, where not as all others.
    """

    clients: frozenset[int] = frozenset()
    change: Callable[[int, Any], Any] = lambda client, examples: examples
    local: Callable[[int], Local | None] = lambda client: None
    own: OwnTraining = field(default_factory=OwnTraining)

    def training(self, client: int, settings: TrainingSettings) -> TrainingSettings:
        """How a client trains."""
        return self.own.applied(settings) if client in self.clients else settings


@dataclass(frozen=True)
class Adversary:
    """Who acts for an arm's attack.

    Attributes:
        folder: of the arm.
        arm: its settings.
        attack: None where nobody attacks.
        config: the experiment's.
    """

    folder: ArmFolder
    arm: ArmSettings
    attack: Attack | None
    config: Config

    @property
    def settings(self) -> FederationSettings:
        """The federation's."""
        return self.config.federation

    def malicious(self, index: int, present: Sequence[int]) -> tuple[int, ...]:
        """Its clients among those that answer in a round; none where there is no attack, or it does not act then.

        One that only looks needs no client: it is the server's.
        """
        if self.attack is None or only_looks(self.attack) or index not in self.arm.attack_rounds:
            return ()
        drawn = malicious_clients(self.arm, self.settings.clients, self.config.seed, index)
        return tuple(client for client in drawn if client in present)

    @property
    def last_round(self) -> int:
        """The last round of the run in which it acts; 0: there is none."""
        rounds = range(self.settings.rounds, 0, -1)
        return next((index for index in rounds if self.attack and index in self.arm.attack_rounds), 0)

    def first_training(self, round: Round, present: Sequence[int]) -> Poisoning:
        """What its clients do while all clients train: they are honest where they train again, last."""
        malicious = self.malicious(round.index, present)
        if not malicious or self.attack is None or self.attack.train_last:
            return Poisoning()
        return self.poisoning(round, present, malicious, self.attack.train)

    def last_training(self, round: Round, present: Sequence[int]) -> Poisoning | None:
        """What its clients do in a second training, once it has seen what others sent; None where there is none."""
        malicious = self.malicious(round.index, present)
        if not malicious or self.attack is None or self.attack.train_last is None:
            return None
        train_last = self.attack.train_last
        sent = self.folder.sent(round.index, present)
        shown = {client: view for view in self.views(round, malicious, sent) for client in view[1].malicious}

        def train(threat: Threat) -> Local:
            assert threat.me is not None
            seen, known = shown[threat.me]
            return train_last(seen, replace(known, me=threat.me))

        return self.poisoning(round, present, tuple(shown), train)

    def poisoning(
        self,
        round: Round,
        present: Sequence[int],
        malicious: tuple[int, ...],
        train: Callable[[Threat], Local] | None,
    ) -> Poisoning:
        """What some clients do while they train."""
        assert self.attack is not None
        poison_data = self.attack.poison_data
        reference = open_updates([self.folder.global_model(round.index - 1)])

        def threat(client: int) -> Threat:
            own = (client,) if self.arm.visible == "own" else malicious
            visible = visible_clients(self.arm, own, tuple(present))
            return self.threat(round, own, visible, len(present), reference, me=client)

        def change(client: int, examples: Any) -> Any:
            return poison_data(examples, threat(client)) if poison_data else examples

        def local(client: int) -> Local | None:
            return train(threat(client)) if train else None

        return Poisoning(
            frozenset(malicious) if poison_data or train else frozenset(), change, local, self.arm.own_training
        )

    def threat(
        self,
        round: Round,
        malicious: tuple[int, ...],
        visible: tuple[int, ...],
        clients: int,
        reference: UpdateSet,
        **more: Any,
    ) -> Threat:
        """What it holds and sees."""

        def received(index: int, space: str = "factors") -> UpdateSet:
            return self.opened(self.folder.global_model(index - 1), space)

        def noted(attack: str, facts: Mapping[str, Any]) -> None:
            write_json(self.folder.round(round.index) / f"adversary_{attack}.json", facts)

        when, known = round.as_the_adversary_knows_it(), self.arm.visible
        return Threat(when, malicious, visible, reference, known, clients, received=received, noted=noted, **more)

    def rewritten(
        self, round: Round, sent: Mapping[int, Sent], simulate: Callable[[Mapping[int, Sent]], Simulate]
    ) -> dict[int, Sent]:
        """Write what its clients submit in place of what they trained, and return where."""
        malicious = self.malicious(round.index, tuple(sent))
        if not malicious or self.attack is None or self.attack.poison_model is None:
            return {}
        result: dict[int, Sent] = {}
        for seen, threat in self.views(round, malicious, sent):
            server = simulate(sent) if threat.knowledge == "aggregator" else None
            targets = [self.folder.poisoned(round.index, client) for client in threat.malicious]
            poisoned = poison(seen, self.attack, replace(threat, server=server))
            like = self.folder.global_model(round.index - 1)
            base = threat.reference if poisoned.layout.pairs else self.opened(like, "factors")
            save_updates(poisoned, base, like, targets)
            result |= {
                client: sent[client]._replace(address=path)
                for client, path in zip(threat.malicious, targets, strict=True)
            }
        return result

    def views(
        self, round: Round, malicious: tuple[int, ...], sent: Mapping[int, Sent]
    ) -> Iterator[tuple[UpdateSet, Threat]]:
        """The rows that it may see and nothing else, in the server's space and with the server's weights.

        Where each malicious client acts by itself, a view for each. A client whose own update is not fit for the gate
        (its training diverged) is left as it is: the gate refuses it.
        """
        if self.arm.visible == "own" and len(malicious) > 1:
            for client in malicious:
                yield from self.views(round, (client,), sent)
            return
        visible = visible_clients(self.arm, malicious, tuple(sent))
        reference = self.folder.global_model(round.index - 1)
        try:
            seen = self.shown(visible, sent, reference, self.settings.space)
        except RefusedError:
            return
        passed = tuple(client for client in visible if client_name(client) in seen.clients)
        own = tuple(client for client in malicious if client in passed)
        if not own:
            return
        factors = self.shown(passed, sent, reference, "factors") if self.settings.space == "product" else None
        base = self.opened(reference, self.settings.space)
        yield seen, self.threat(round, own, passed, len(sent), base, factors=factors)

    def shown(self, visible: Sequence[int], sent: Mapping[int, Sent], reference: Path, space: str) -> UpdateSet:
        """What some clients sent, of those who pass the gate."""
        claims = [each.num_samples for each in sent.values()]
        admission = admit(
            [sent[client].address for client in visible],
            names=[client_name(client) for client in visible],
            reference=reference,
            num_samples=[sent[client].num_samples for client in visible],
            max_samples=largest_claim(claims, self.settings.sample_cap, "federation.sample_cap"),
            space=space,
            memory=self.settings.memory,
            device=self.settings.device,
        )
        updates, _ = scan(admission)
        return updates.weighted_equally() if self.settings.weights == "equal" else updates

    def opened(self, path: Path, space: str) -> UpdateSet:
        """A global model's weights, one row."""
        return open_updates([path], space=space, memory=self.settings.memory, device=self.settings.device)


def only_looks(attack: Attack | None) -> bool:
    """Whether all that an attack does is to reconstruct data: then it is the server's, and nobody is malicious."""
    if attack is None or attack.reconstruct_data is None:
        return False
    return not (attack.poison_data or attack.poison_model or attack.train or attack.train_last)


def visible_clients(arm: ArmSettings, malicious: tuple[int, ...], present: tuple[int, ...]) -> tuple[int, ...]:
    """The clients whose updates the adversary sees."""
    return malicious if arm.visible in ("own", "colluders") else present


def malicious_clients(arm: ArmSettings, clients: int, seed: int, index: int) -> tuple[int, ...]:
    """Which clients the adversary owns in a round: those named, or so many drawn by the run's seed."""
    if isinstance(arm.malicious, tuple):
        if unknown := [client for client in arm.malicious if not 0 <= client < clients]:
            raise InputError(f"malicious client {unknown[0]} does not exist: clients are 0 to {clients - 1}")
        return tuple(sorted(set(arm.malicious)))
    if not 0 <= arm.malicious <= clients:
        raise InputError(f"malicious={arm.malicious}, but there are {clients} clients")
    generator = torch.Generator().manual_seed(derived_seed(seed, "malicious", index if arm.redraw else "run"))
    return tuple(sorted(torch.randperm(clients, generator=generator)[: arm.malicious].tolist()))
