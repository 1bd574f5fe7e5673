"""The server's step of a round: admit, let the adversary rewrite its rows, defend, aggregate, save."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from fedllm_sec.config import ArmSettings, FederationSettings
from fedllm_sec.core import Attack, Defense, Round, Threat, aggregate, derived_seed, poison
from fedllm_sec.federation.run_folder import ArmFolder, client_name, save_updates
from fedllm_sec.registry import attack, defense
from fedllm_sec.updates.admit import Refusal, RefusedError, admit, is_count, open_updates, stack_updates
from fedllm_sec.updates.device import Budget
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json
from fedllm_sec.updates.update_set import UpdateSet

logger = logging.getLogger(__name__)


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
    Budget.of(federation.memory, federation.device)
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


def server_step(
    folder: ArmFolder, round: Round, arm: ArmSettings, methods: Methods, settings: FederationSettings, seed: int
) -> tuple[Refusal, ...]:
    """From the clients' folders of a round to the next global adapter; return who was refused.

    Raises:
        RefusedError: if an update does not pass the gate and the policy is `stop`.
        InputError: if too few clients are left for a defense.
    """
    reference = folder.global_adapter(round.index - 1)
    received = [folder.client(round.index, client) for client in range(settings.clients)]
    counts = [read_json(path / "client.json")["num_samples"] for path in received]
    malicious = malicious_clients(arm, settings.clients, seed, round.index)
    if methods.attack and methods.attack.poison_model and malicious:
        for client, path in let_the_adversary_act(folder, round, arm, methods.attack, malicious, counts, settings):
            received[client] = path
    updates, refusals = admitted(received, reference, counts, settings)
    if settings.weights == "equal":
        updates = updates.weighted_equally()
    result = aggregate(updates, round, methods.defenses)
    base = open_updates([reference], device=settings.device, memory=settings.memory)
    save_updates(result.add(base), reference, [folder.global_adapter(round.index)])
    return refusals


def let_the_adversary_act(
    folder: ArmFolder,
    round: Round,
    arm: ArmSettings,
    attack: Attack,
    malicious: tuple[int, ...],
    counts: Sequence[float],
    settings: FederationSettings,
) -> list[tuple[int, Path]]:
    """Write what the adversary's clients submit, and return where; it is shown what it may see and nothing else.

    A client whose own update is not fit for the gate (its training diverged) is left as it is: the gate refuses it.
    """
    reference = folder.global_adapter(round.index - 1)
    visible = visible_clients(arm, malicious, settings.clients)
    sent = [folder.client(round.index, client) for client in visible]
    memory, device = settings.memory, settings.device
    try:
        seen, _ = admit(
            sent, reference=reference, num_samples=[counts[i] for i in visible], memory=memory, device=device
        )
    except RefusedError:
        return []
    passed = tuple(client for client in visible if client_name(client) in seen.clients)
    own = tuple(client for client in malicious if client in passed)
    if not own:
        return []
    threat = Threat(round, own, passed, open_updates([reference], memory=memory, device=device))
    targets = [folder.poisoned(round.index, client) for client in own]
    save_updates(poison(seen, attack, threat).add(threat.reference), reference, targets)
    return list(zip(own, targets, strict=True))


def visible_clients(arm: ArmSettings, malicious: tuple[int, ...], clients: int) -> tuple[int, ...]:
    """The clients whose updates the adversary sees."""
    return malicious if arm.visible == "own" else tuple(range(clients))


def largest_claim(counts: Sequence[float], settings: FederationSettings) -> float:
    """What a claim counts as at most: so many times the median claim; say so where it bites."""
    plausible = [count for count in counts if is_count(count)]  # the gate refuses the others
    if settings.sample_cap is None or not plausible:
        return math.inf
    most = settings.sample_cap * median(plausible)
    if max(plausible) > most:
        logger.warning("a client claims %g samples; it counts as %g (federation.sample_cap)", max(plausible), most)
    return most


def admitted(
    received: Sequence[Path], reference: Path, counts: Sequence[float], settings: FederationSettings
) -> tuple[UpdateSet, tuple[Refusal, ...]]:
    """Pass the gate; rows carry the clients' names, whatever folder they came from."""
    updates, refusals = admit(
        received,
        reference=reference,
        num_samples=counts,
        max_samples=largest_claim(counts, settings),
        device=settings.device,
        memory=settings.memory,
    )
    if refusals and settings.on_refused == "stop":
        raise RefusedError(refusals)
    names = {path.name: client_name(client) for client, path in enumerate(received)}
    named = replace(updates, clients=tuple(names[client] for client in updates.clients))
    return named, tuple(Refusal(names[client], reason) for client, reason in refusals)
