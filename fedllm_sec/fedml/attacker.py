"""FedAttacker with the papers' method names (FedSecurity, arXiv:2306.04959), over our registry of attacks.

Code that was written against the papers, or against FedML, runs; what it gets is what our attacks do. Differences from
FedML, each a defect there: what clients sent is never written to, an unknown `attack_type` is an error, victims and
coins are drawn by the run's seed (`random_seed`) and the round, and `init` with the same arguments changes nothing.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedllm_sec.core import Attack, Round, Threat, poison
from fedllm_sec.fedml.arguments import OneOfAProcess, client_names, fingerprint, keys_of
from fedllm_sec.fedml.attacks import Adversary, translate_attack
from fedllm_sec.fedml.datasets import poisoned
from fedllm_sec.fedml.keys import count
from fedllm_sec.fedml.weights import Raw, Received, State, give_back, receive, weights_row
from fedllm_sec.randomness import derived_seed
from fedllm_sec.registry import attack
from fedllm_sec.updates.admit import stack_updates
from fedllm_sec.updates.errors import InputError
from fedllm_sec.victim import Victim

logger = logging.getLogger(__name__)

MANY = 10**9  # clients of a round, where nobody says how many: then it is as many as are sent


class FedAttacker(OneOfAProcess):
    """The adversary of a federation.

    Rounds are counted: each `poison_model` is one, and so is each `reconstruct_data` of an attack that only looks.
    Client processes of FedML's cross-silo runs (`args.rank` from 1) count one round for each `is_to_poison_data`; where
    one process stands for all clients, it is asked once for each client of a round, in their order.
    """

    def __init__(self) -> None:
        self.is_enabled = False
        self.attack_type: str | None = None
        self.adversary: Adversary | None = None
        self.attack = Attack()
        self._arguments: dict[str, Any] | None = None
        self._seed = 0
        self._per_round: int | None = None
        self._rank = 0
        self._round = 1
        self._asked = 0
        self._poisons_in = 1

    def init(self, args: object) -> None:
        """Read FedML's keys: `enable_attack`, `attack_type` and that attack's own.

        With the keys of the last call it changes nothing but the rank, and the rounds go on: FedML calls it for every
        aggregator and every trainer.

        Raises:
            InputError: for an unknown `attack_type`, an attack that we do not have, a key that is missing or wrong.
        """
        keys = keys_of(args)
        per_round = keys.get("client_num_per_round", count, keys.get("client_num_in_total", count, 0))
        adversary = translate_attack(keys, per_round or MANY)
        method = attack.build(adversary.name, adversary.parameters) if adversary else Attack()
        if method.poison_data and not per_round:
            raise InputError("args: client_num_per_round is missing: malicious clients are drawn among so many")
        seed = keys.get("random_seed", count, 0)
        arguments = fingerprint(keys)
        self._rank = keys.get("rank", count, 0)
        if arguments == self._arguments:
            return
        self.attack, self.adversary, self.is_enabled = method, adversary, adversary is not None
        self.attack_type = str(keys.raw("attack_type")).strip() if adversary else None
        self._arguments, self._per_round, self._seed = arguments, per_round or None, seed
        self._round, self._asked, self._poisons_in = 1, 0, 1
        for warning in keys.warnings:
            logger.warning("%s", warning)

    def is_attack_enabled(self) -> bool:
        """Whether there is an attack; no coin is thrown here, but once in each round (`attack_prob`)."""
        return self.is_enabled

    def attacks_in(self, index: int) -> bool:
        """Whether the coin of a round falls for an attack; the same in every process."""
        if self.adversary is None or index not in self.adversary.rounds:
            return False
        coin = torch.Generator().manual_seed(derived_seed(self._seed, index, "attack_prob"))
        return bool(torch.rand((), generator=coin) < self.adversary.probability)

    def get_attack_types(self) -> str | None:
        """The `attack_type` that was asked for."""
        return self.attack_type

    def is_data_poisoning_attack(self) -> bool:
        """Whether the attack changes data."""
        return self.attack.poison_data is not None and self.is_attack_enabled()

    def is_model_poisoning_attack(self) -> bool:
        """Whether the attack changes models."""
        return self.attack.poison_model is not None and self.is_attack_enabled()

    def is_data_reconstruction_attack(self) -> bool:
        """Whether the attack reconstructs data."""
        return self.attack.reconstruct_data is not None and self.is_attack_enabled()

    def malicious(self, clients: int, index: int) -> tuple[int, ...]:
        """The places of the malicious clients among those of a round, the same in every process.

        Raises:
            InputError: if a round has fewer clients.
        """
        assert self.adversary is not None
        chosen = self.adversary.malicious
        if isinstance(chosen, tuple):
            if max(chosen, default=0) >= clients:
                raise InputError(f"malicious_client_id={max(chosen)}, but the round has clients 0 to {clients - 1}")
            return chosen
        if chosen > clients:
            raise InputError(f"{chosen} malicious clients, but the round has {clients}")
        lots = torch.Generator().manual_seed(derived_seed(self._seed, "malicious", index))
        return tuple(sorted(torch.randperm(clients, generator=lots)[:chosen].tolist()))

    def poison_model(
        self, raw_client_grad_list: Raw, extra_auxiliary_info: State | None = None, clients: Sequence[str] | None = None
    ) -> list[tuple[float, State]]:
        """What the server receives in place of what clients sent.

        Args:
            raw_client_grad_list: (samples, state dict of weights) of each client of the round.
            extra_auxiliary_info: the global model's state dict, which they started from.
            clients: their names; by default by place.

        Returns:
            A list of the same length; entries of honest clients are those that were given.

        Raises:
            InputError: if there is no model poisoning attack, or no global model is given.
        """
        if self.attack.poison_model is None:
            raise InputError("no model poisoning attack is enabled: call init with enable_attack and an attack_type")
        index, self._round = self._round, self._round + 1
        names = list(clients or client_names(len(raw_client_grad_list)))
        result = list(raw_client_grad_list)
        if not self.attacks_in(index):
            return result
        malicious = self.malicious(len(names), index)
        received, threat = self._seen(raw_client_grad_list, extra_auxiliary_info, names, malicious, index)
        if not threat.malicious:
            return result
        sent = give_back(poison(received.updates, self.attack, threat), received)
        for row, (_, state) in zip(threat.malicious, sent, strict=True):
            place = names.index(received.updates.clients[row])
            result[place] = (raw_client_grad_list[place][0], state)
        return result

    attack_model = poison_model  # FedML's name
    is_model_attack = is_model_poisoning_attack

    def reconstruct_data(
        self,
        raw_client_grad_list: Raw,
        extra_auxiliary_info: State | None = None,
        clients: Sequence[str] | None = None,
        *,
        victim: Victim | None = None,
    ) -> Any:
        """What the clients' models reveal of their data; other arguments as for `poison_model`.

        Args:
            victim: how these clients train: their learning rate, steps, architecture. The papers have no argument for
                it, and no attack gets anywhere without.

        Returns:
            What the attack returns; None in a round without an attack (`attack_prob`).

        Raises:
            InputError: if there is no reconstruction attack, or no global model is given.
        """
        if self.attack.reconstruct_data is None:
            raise InputError(
                "no data reconstruction attack is enabled: call init with enable_attack and an attack_type"
            )
        index, self._round = self._round, self._round + (self.attack.poison_model is None)
        if not self.attacks_in(index):
            return None
        names = list(clients or client_names(len(raw_client_grad_list)))
        received, threat = self._seen(raw_client_grad_list, extra_auxiliary_info, names, (), index)
        return self.attack.reconstruct_data(received.updates, replace(threat, victim=victim))

    def is_to_poison_data(self) -> bool:
        """Whether the client that asks is malicious in its round; see the class on who asks when."""
        if self.attack.poison_data is None or self._per_round is None:
            return False
        asked, self._asked = self._asked, self._asked + 1
        rounds, place = (asked, self._rank - 1) if self._rank else divmod(asked, self._per_round)
        self._poisons_in = rounds + 1
        chosen = self.malicious(self._per_round, rounds + 1)
        return place % self._per_round in chosen and self.attacks_in(rounds + 1)

    def poison_data(self, dataset: Any) -> Any:
        """What a malicious client trains on; the data that was given is left as it is.

        A `DataLoader` of (x, y), a `Dataset` or a list of batches comes back in its own form; anything else is handed
        to the attack as it is. The papers hand no model to it: the threat's reference is one coordinate, zero.

        Raises:
            InputError: if there is no data poisoning attack, or the data holds no pairs (x, y).
        """
        if self.attack.poison_data is None:
            raise InputError("no data poisoning attack is enabled: call init with enable_attack and an attack_type")
        nothing = stack_updates([{"no model": torch.zeros(1)}], [1.0])
        return poisoned(self.attack, dataset, Threat(Round(self._poisons_in, seed=self._seed), (0,), (0,), nothing))

    def _seen(
        self, raw: Raw, reference: State | None, names: Sequence[str], malicious: tuple[int, ...], index: int
    ) -> tuple[Received, Threat]:
        if reference is None:
            raise InputError("the global model's state dict is missing: give it as extra_auxiliary_info")
        received = receive(raw, reference, names)
        there = {name: row for row, name in enumerate(received.updates.clients)}
        own = tuple(there[names[place]] for place in malicious if names[place] in there)  # others are left as they are
        visible = tuple(range(len(there)))  # FedML hands the whole list to its attacker
        threat = Threat(Round(index, seed=self._seed), own, visible, weights_row(reference), "all", len(there))
        return received, threat


FedMLAttacker = FedAttacker
