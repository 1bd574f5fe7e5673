"""The server's step of a round: admit, let the adversary rewrite its rows, defend, aggregate, save."""

import logging
import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedllm_sec.config import ArmSettings, Config, FederationSettings
from fedllm_sec.core import Attack, Round, Threat, aggregate, poison
from fedllm_sec.federation.buffers import aggregate_buffers
from fedllm_sec.federation.methods import Methods, malicious_clients
from fedllm_sec.federation.run_folder import (
    POISONED,
    SERVER,
    ArmFolder,
    Sent,
    client_name,
    fill_folder,
    save_updates,
)
from fedllm_sec.updates.admit import (
    Admission,
    Refusal,
    RefusedError,
    admit,
    open_updates,
    scan,
)
from fedllm_sec.updates.claims import largest_claim
from fedllm_sec.updates.errors import InputError, NotFiniteError
from fedllm_sec.updates.files import atomic_folder
from fedllm_sec.updates.update_set import UpdateSet

logger = logging.getLogger(__name__)


class TooFewError(Exception):
    """Those who passed the gate are too few for a defense; `refusals` lists the others."""

    def __init__(self, refusals: Sequence[Refusal], reason: str):
        self.refusals = tuple(refusals)
        super().__init__(f"{len(self.refusals)} clients were refused, and with the others: {reason}")


@dataclass(frozen=True)
class Server:
    """What makes the next global model of what an arm's clients sent."""

    folder: ArmFolder
    arm: ArmSettings
    methods: Methods
    config: Config

    @property
    def settings(self) -> FederationSettings:
        """The federation's."""
        return self.config.federation

    def step(self, round: Round, present: Sequence[int]) -> tuple[Refusal, ...]:
        """From what the clients of a round sent to the next global model; return who was refused.

        Where none pass the gate, or too few for a defense, the round is skipped: the model stays as it is.

        Raises:
            RefusedError: if an update does not pass the gate and the policy is `stop`.
        """
        there = set(self.folder.round(round.index).iterdir())
        try:
            return self.attempt(round, present)
        except RefusedError as error:
            if self.settings.on_refused == "stop":
                raise
            refusals, reason = error.refusals, "no client passed the gate"
        except TooFewError as error:
            refusals, reason = error.refusals, str(error)
        self.forget(round, there)
        self.skip(round, reason)
        return refusals

    def skip(self, round: Round, reason: str) -> None:
        """Leave the model as it is, and say so; memories and moments go on from the round before."""
        logger.warning("round %d is skipped: %s", round.index, reason)
        with atomic_folder(self.folder.global_model(round.index)) as partial:
            shutil.copytree(self.folder.global_model(round.index - 1), partial, dirs_exist_ok=True)
        self.folder.skip(round.index, reason)

    def forget(self, round: Round, there: Set[Path]) -> None:
        """Delete what an attempt wrote into a round's folder: decisions about rows that are no longer there."""
        for begun in set(self.folder.round(round.index).iterdir()) - there:
            if not begun.name.startswith(POISONED):
                shutil.rmtree(begun)

    def attempt(self, round: Round, present: Sequence[int]) -> tuple[Refusal, ...]:
        """As `step`.

        Raises:
            RefusedError: if no client passes the gate, or one does not and the policy is `stop`.
            TooFewError: if those who pass are too few for a defense.
        """
        sent = self.folder.sent(round.index, present)
        received = sent
        malicious = self.malicious(round.index, present)
        if self.methods.attack and self.methods.attack.poison_model and malicious:
            received = {**sent, **self.let_the_adversary_act(round, self.methods.attack, malicious, sent)}
        admission = self.admitted(round.index, received)
        there = set(self.folder.round(round.index).iterdir())
        try:
            self.aggregate_rest(round, admission, sent)
        except NotFiniteError:
            admission = scan(admission)
            if self.settings.on_refused == "stop":
                raise RefusedError(admission.refusals) from None
            self.forget(round, there)
            self.aggregate_rest(round, admission, sent)
        return admission.refusals

    def aggregate_rest(self, round: Round, admission: Admission, sent: Mapping[int, Sent]) -> None:
        """Aggregate the rows of those who passed.

        Raises:
            TooFewError: if some were refused, and a defense cannot work with the others.
        """
        try:
            self.aggregate_and_save(round, admission.updates, sent)
        except NotFiniteError:
            raise
        except InputError as error:
            if not admission.refusals:
                raise
            raise TooFewError(admission.refusals, str(error)) from None

    def malicious(self, index: int, present: Sequence[int]) -> tuple[int, ...]:
        """The adversary's clients among those that answer in a round."""
        drawn = malicious_clients(self.arm, self.settings.clients, self.config.seed, index)
        return tuple(client for client in drawn if client in present)

    def aggregate_and_save(self, round: Round, updates: UpdateSet, sent: Mapping[int, Sent]) -> None:
        """From admitted updates to the next global model; nothing is there if it fails."""
        reference = self.folder.global_model(round.index - 1)
        settings = self.settings
        how: dict[str, Any] = {"space": settings.space, "device": settings.device, "memory": settings.memory}
        base = open_updates([reference], **how)
        own = self.folder.client(round.index, SERVER)
        trusted = open_updates([own], reference=reference, **how) if own.exists() else None
        if settings.weights == "equal":
            updates = updates.weighted_equally()
        updates = self.per_length(updates, sent)
        result = aggregate(updates, replace(round, reference=base, trusted=trusted), self.methods.defenses)
        result = self.methods.optimizer.step(result, round)
        with atomic_folder(self.folder.global_model(round.index)) as partial:
            fill_folder(result, base, reference, [partial])
            aggregate_buffers(reference, partial, sent, updates, robust=bool(self.methods.defenses))

    def per_length(self, updates: UpdateSet, sent: Mapping[int, Sent]) -> UpdateSet:
        """The rows as the optimizer wants them: FedNova's are divided by the length of each client's work."""
        if self.methods.optimizer.lengths is None:
            return updates
        claimed = {client_name(client): told.steps for client, told in sent.items()}
        steps = torch.tensor([float(claimed[client]) for client in updates.clients], dtype=torch.float64)
        lengths = self.methods.optimizer.lengths(steps, self.config.training)
        effective = updates.num_samples @ lengths / updates.num_samples.sum()
        return updates.mix((effective / lengths).diag())

    def let_the_adversary_act(
        self, round: Round, attack: Attack, malicious: tuple[int, ...], sent: Mapping[int, Sent]
    ) -> dict[int, Sent]:
        """Write what the adversary's clients submit, and return where; it is shown what it may see and nothing else.

        A client whose own update is not fit for the gate (its training diverged) is left as it is: the gate refuses it.
        """
        reference, settings = self.folder.global_model(round.index - 1), self.settings
        visible = visible_clients(self.arm, malicious, tuple(sent))
        memory, device = settings.memory, settings.device
        try:
            claims = [sent[client].num_samples for client in visible]
            addresses = [sent[client].address for client in visible]
            names = [client_name(client) for client in visible]
            seen, _ = scan(
                admit(addresses, names=names, reference=reference, num_samples=claims, memory=memory, device=device)
            )
        except RefusedError:
            return {}
        passed = tuple(client for client in visible if client_name(client) in seen.clients)
        own = tuple(client for client in malicious if client in passed)
        if not own:
            return {}
        threat = Threat(round, own, passed, open_updates([reference], memory=memory, device=device))
        targets = [self.folder.poisoned(round.index, client) for client in own]
        save_updates(poison(seen, attack, threat), threat.reference, reference, targets)
        return {client: sent[client]._replace(address=path) for client, path in zip(own, targets, strict=True)}

    def admitted(self, index: int, received: Mapping[int, Sent]) -> Admission:
        """Pass the gate; rows carry the clients' names, whatever folder they came from."""
        settings, counts = self.settings, [sent.num_samples for sent in received.values()]
        admission = admit(
            [sent.address for sent in received.values()],
            names=[client_name(client) for client in received],
            reference=self.folder.global_model(index - 1),
            num_samples=counts,
            max_samples=largest_claim(counts, settings.sample_cap, "federation.sample_cap"),
            space=settings.space,
            device=settings.device,
            memory=settings.memory,
        )
        if admission.refusals and settings.on_refused == "stop":
            raise RefusedError(admission.refusals)
        return admission


def visible_clients(arm: ArmSettings, malicious: tuple[int, ...], present: tuple[int, ...]) -> tuple[int, ...]:
    """The clients whose updates the adversary sees."""
    return malicious if arm.visible == "own" else present
