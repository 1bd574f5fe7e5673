"""The server's step of a round: admit, let the adversary rewrite its rows, defend, aggregate, save."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fedllm_sec.config import ArmSettings, Config, FederationSettings
from fedllm_sec.core import Attack, Defense, Round, Threat, aggregate, derived_seed, poison
from fedllm_sec.federation.buffers import aggregate_buffers
from fedllm_sec.federation.optimizers import Optimizer, optimizer
from fedllm_sec.federation.participants import participants
from fedllm_sec.federation.run_folder import (
    SERVER,
    ArmFolder,
    Sent,
    client_name,
    fill_folder,
    save_updates,
)
from fedllm_sec.registry import attack, defense
from fedllm_sec.updates.admit import (
    Admission,
    Refusal,
    RefusedError,
    admit,
    open_updates,
    scan,
    stack_updates,
)
from fedllm_sec.updates.claims import largest_claim
from fedllm_sec.updates.device import Budget
from fedllm_sec.updates.errors import InputError, NotFiniteError
from fedllm_sec.updates.files import atomic_folder
from fedllm_sec.updates.update_set import UpdateSet

logger = logging.getLogger(__name__)


class Methods(NamedTuple):
    """An arm's attack and defenses and the server's optimizer, built."""

    attack: Attack | None
    defenses: tuple[Defense, ...]
    optimizer: Optimizer


def build_methods(arm: ArmSettings, config: Config) -> Methods:
    """Build an arm's methods and rehearse its defenses.

    Raises:
        InputError: for unknown names or parameters, a client that does not exist, or a defense that cannot work with
            so many clients; all before any work.
    """
    federation = config.federation
    malicious_clients(arm, federation.clients, seed=0, index=1)
    Budget.of(federation.memory, federation.device)
    methods = Methods(
        attack.build(arm.attack.name, arm.attack.parameters) if arm.attack else None,
        tuple(defense.build(method.name, method.parameters) for method in arm.defenses),
        optimizer.build(federation.optimizer.name, federation.optimizer.parameters),
    )
    methods.optimizer.check(config.training)
    if arm.attack and arm.attack.name == "label_flipping" and config.training.procedure.name == "gan":
        raise InputError("label_flipping changes nothing under training.procedure=gan, which looks at no label")
    if methods.optimizer.transfer is not None:
        check_for_transfer(methods, federation)
    rehearse(methods, config)
    return methods


def rehearse(methods: Methods, config: Config) -> None:
    """Let the defenses work on tiny updates of all clients, and of those of the round in which the fewest answer.

    Raises:
        InputError: if they cannot work; naming that round, if they cannot work with so few.
    """
    federation = config.federation
    if not methods.defenses:
        return
    rehearse_with(federation.clients, methods, config)
    rounds = range(1, federation.rounds + 1) if federation.dropout else [1]
    fewest, index = min((len(participants(federation, config.seed, index)), index) for index in rounds)
    try:
        rehearse_with(fewest, methods, config)
    except InputError as error:
        raise InputError(f"in round {index} only {fewest} of {federation.clients} clients answer: {error}") from None


def rehearse_with(clients: int, methods: Methods, config: Config) -> None:
    """Let the defenses work on so many tiny updates."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"rehearsal": torch.randn(3, generator=generator)} for _ in range(clients)]
    updates = stack_updates(rows, [1.0] * clients)
    trusted = updates.rows([0]) if config.federation.root_samples else None
    aggregate(updates, Round(reference=updates.rows([0]), trusted=trusted), methods.defenses)


def check_for_transfer(methods: Methods, federation: FederationSettings) -> None:
    """Raise InputError for what acts on weights, where clients send features."""
    attack = methods.attack
    if methods.defenses or federation.root_samples or (attack and (attack.poison_model or not attack.poison_data)):
        raise InputError(
            f"{federation.optimizer.name} exchanges features, not weights: leave out defenses and "
            "federation.root_samples, and of attacks take one that acts on data alone, such as label_flipping"
        )


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

        Raises:
            RefusedError: if an update does not pass the gate and the policy is `stop`.
            InputError: if too few clients are left for a defense.
        """
        sent = self.folder.sent(round.index, present)
        received = sent
        malicious = self.malicious(round.index, present)
        if self.methods.attack and self.methods.attack.poison_model and malicious:
            received = {**sent, **self.let_the_adversary_act(round, self.methods.attack, malicious, sent)}
        admission = self.admitted(round.index, received)
        there = set(self.folder.round(round.index).iterdir())
        try:
            self.aggregate_and_save(round, admission.updates, sent)
        except NotFiniteError:
            admission = scan(admission)
            if self.settings.on_refused == "stop":
                raise RefusedError(admission.refusals) from None
            for begun in set(self.folder.round(round.index).iterdir()) - there:  # decisions about rows no longer there
                shutil.rmtree(begun)
            self.aggregate_and_save(round, admission.updates, sent)
        return admission.refusals

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
