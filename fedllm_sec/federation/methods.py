"""An arm's methods, built from its settings, and rehearsed before any work."""

from typing import NamedTuple

import torch

from fedllm_sec.config import Config
from fedllm_sec.core import Attack, Defense, Round, aggregate, check_granted
from fedllm_sec.federation.adversary import malicious_clients, only_looks
from fedllm_sec.federation.curious import check_victims
from fedllm_sec.federation.optimizers import Optimizer, optimizer
from fedllm_sec.federation.participants import participants
from fedllm_sec.registry import attack, defense
from fedllm_sec.settings import ArmSettings, FederationSettings, Method, OwnTraining
from fedllm_sec.training.procedures import procedure
from fedllm_sec.updates.admit import stack_updates
from fedllm_sec.updates.device import Budget
from fedllm_sec.updates.errors import InputError


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
    check_attack(arm, methods.attack, config)
    check_own_training(arm, methods, config)
    check_victims(arm, methods.attack, config)
    if methods.optimizer.transfer is not None:
        check_for_transfer(methods, federation)
    rehearse(methods, config)
    return methods


def check_labels(arm: ArmSettings, chosen: Attack | None, trained: Method) -> None:
    """Raise InputError for an attack on labels where clients train without them."""
    looks = procedure.build(trained.name, trained.parameters).uses_labels
    if arm.attack and chosen and chosen.labels_only and not looks:
        raise InputError(
            f"{arm.attack.name} changes nothing under training.procedure={trained.name}, which looks at no label"
        )


def check_attack(arm: ArmSettings, chosen: Attack | None, config: Config) -> None:
    """Raise InputError for an attack that was not granted what it needs, or that a client's training cannot follow."""
    if arm.attack is None or chosen is None:
        return
    name, trained = arm.attack.name, config.training.procedure
    try:
        check_granted(chosen, "aggregator" if only_looks(chosen) else arm.visible)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    check_labels(arm, chosen, trained)
    if trains(chosen) and not procedure.build(trained.name, trained.parameters).heeds_local:
        raise InputError(f"{name} acts while clients train, and training.procedure={trained.name} has no place for it")


def check_own_training(arm: ArmSettings, methods: Methods, config: Config) -> None:
    """Raise InputError where nobody would train as `own_training` says."""
    if arm.own_training == OwnTraining():
        return
    if methods.optimizer.transfer is not None:
        raise InputError(f"{config.federation.optimizer.name} has no own_training of malicious clients: leave it out")
    if methods.attack is None or not (methods.attack.poison_data or trains(methods.attack)):
        name = arm.attack.name if arm.attack else "an arm without an attack"
        raise InputError(f"own_training: {name} changes nothing of how clients train: leave it out")


def trains(chosen: Attack) -> bool:
    """Whether an attack has a say in a client's training."""
    return bool(chosen.train or chosen.train_last)


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
    acts_on_data_alone = attack is None or (attack.poison_data and not (attack.poison_model or trains(attack)))
    if methods.defenses or federation.root_samples or not acts_on_data_alone:
        raise InputError(
            f"{federation.optimizer.name} exchanges features, not weights: leave out defenses and "
            "federation.root_samples, and of attacks take one that acts on data alone, such as label_flipping"
        )
