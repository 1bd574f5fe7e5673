"""The server's step of a round: admit, let the adversary rewrite its rows, defend, aggregate, save."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fedllm_sec.config import ArmSettings, FederationSettings
from fedllm_sec.core import Attack, Defense, Round, Threat, aggregate, derived_seed, poison
from fedllm_sec.federation.run_folder import ArmFolder, client_name, save_updates
from fedllm_sec.registry import attack, defense
from fedllm_sec.updates.admit import Refusal, RefusedError, admit, open_updates, stack_updates
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json
from fedllm_sec.updates.update_set import UpdateSet


class Methods(NamedTuple):
    """An arm's attack and defenses, built."""

    attack: Attack | None
    defenses: tuple[Defense, ...]


def build_methods(arm: ArmSettings, federation: FederationSettings) -> Methods:
    """Build an arm's methods and rehearse its defenses on as many tiny updates as there are clients.

    Raises:
        InputError: for unknown names or parameters, a client that does not exist, or a defense that cannot work with
            so many clients; all before any work.
    """
    malicious_clients(arm, federation.clients, seed=0, index=1)
    methods = Methods(
        attack.build(arm.attack.name, arm.attack.parameters) if arm.attack else None,
        tuple(defense.build(method.name, method.parameters) for method in arm.defenses),
    )
    generator = torch.Generator().manual_seed(0)
    rows = [{"rehearsal": torch.randn(3, generator=generator)} for _ in range(federation.clients)]
    aggregate(stack_updates(rows, [1.0] * federation.clients), Round(), methods.defenses)
    return methods


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


def threat_of(arm: ArmSettings, malicious: tuple[int, ...], clients: int, round: Round, reference: Path) -> Threat:
    """What the adversary holds and sees in a round."""
    visible = malicious if arm.visible == "own" else tuple(range(clients))
    return Threat(round, malicious, visible, open_updates([reference]))


def server_step(
    folder: ArmFolder, round: Round, arm: ArmSettings, methods: Methods, settings: FederationSettings, seed: int
) -> tuple[Refusal, ...]:
    """From the clients' folders of a round to the next global adapter; return who was refused.

    Raises:
        RefusedError: if an update does not pass the gate and the policy is `stop`.
        InputError: if too few clients are left for a defense.
    """
    clients = range(settings.clients)
    reference = folder.global_adapter(round.index - 1)
    sent = [folder.client(round.index, client) for client in clients]
    counts = [read_json(path / "client.json")["num_samples"] for path in sent]
    received = list(sent)
    if methods.attack and methods.attack.poison_model:
        malicious = malicious_clients(arm, settings.clients, seed, round.index)
        threat = threat_of(arm, malicious, settings.clients, round, reference)
        honest = open_updates(sent, reference=reference, num_samples=counts, memory=settings.memory)
        poisoned = poison(honest, methods.attack, threat).add(threat.reference)
        targets = [folder.poisoned(round.index, client) for client in malicious]
        save_updates(poisoned, reference, targets)
        for client, target in zip(malicious, targets, strict=True):
            received[client] = target
    updates, refusals = admitted(received, reference, counts, settings)
    if settings.weights == "equal":
        updates = updates.weighted_equally()
    result = aggregate(updates, round, methods.defenses)
    base = open_updates([reference], device=settings.device, memory=settings.memory)
    save_updates(result.add(base), reference, [folder.global_adapter(round.index)])
    return refusals


def admitted(
    received: Sequence[Path], reference: Path, counts: Sequence[float], settings: FederationSettings
) -> tuple[UpdateSet, tuple[Refusal, ...]]:
    """Pass the gate; rows carry the clients' names, whatever folder they came from."""
    updates, refusals = admit(
        received,
        reference=reference,
        num_samples=counts,
        max_samples=settings.max_samples or float("inf"),
        device=settings.device,
        memory=settings.memory,
    )
    if refusals and settings.on_refused == "stop":
        raise RefusedError(refusals)
    names = {path.name: client_name(client) for client, path in enumerate(received)}
    named = replace(updates, clients=tuple(names[client] for client in updates.clients))
    return named, tuple(Refusal(names[client], reason) for client, reason in refusals)
