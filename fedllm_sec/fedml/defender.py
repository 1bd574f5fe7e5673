"""FedDefender with the papers' method names (FedSecurity, arXiv:2306.04959), over our defenses.

Code that was written against the papers, or against FedML, runs and gets our answers: lists of (samples, state dict of
*weights*) become rows of updates, go through the stages of `core.aggregate`, and come back as weights. Differences from
FedML, each a defect there: nothing that was handed in is written to, the stages are those that a defense has (there
are no lists of names), a memory goes by client and survives another `init`, and all tensors are looked at.
"""

import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm_sec.core import NOBODY, Defense, Round
from fedllm_sec.fedml.arguments import OneOfAProcess, client_names, fingerprint, keys_of
from fedllm_sec.fedml.defenses import translate_defense
from fedllm_sec.fedml.keys import Keys, count, text
from fedllm_sec.fedml.weights import Raw, Received, State, give_back, receive, weights_row, zero_reference
from fedllm_sec.registry import defense
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet

logger = logging.getLogger(__name__)

MEMORY = "defense_memory_dir"  # our only key in `args`: a folder for what defenses remember
BEFORE, ON, AFTER = range(3)
NOMINAL = 100  # clients of a round, where nobody says how many: nothing that is built for them is used


class FedDefender(OneOfAProcess):
    """The server's defense.

    A round is what lies between two calls of the same stage, or of an earlier one: before, on, after. What a defense
    remembers from round to round, and what it decided, lies in `args.defense_memory_dir/round_0001`, ... (a folder that
    holds no rounds yet), or without one in a temporary folder that vanishes with this object.
    """

    def __init__(self) -> None:
        self.is_enabled = False
        self.defense_type: str | None = None
        self.args: object = None
        self._keys = Keys({})
        self._arguments: dict[str, Any] | None = None
        self._built: dict[int, list[Defense]] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = Path()
        self._round = Round(index=0)
        self._stage, self._whole = AFTER, True
        self._names: list[tuple[State, str]] = []
        self._reference: State | None = None
        self._dropped: list[int] = []

    def init(self, args: object) -> None:
        """Read FedML's keys: `enable_defense`, `defense_type` and that defense's own.

        With the keys of the last call it changes nothing, and memory and rounds stay: FedML calls it for every
        aggregator.

        Raises:
            InputError: for an unknown `defense_type`, a key that is missing or wrong, a folder that holds rounds.
        """
        keys = keys_of(args)
        clients = keys.get("client_num_per_round", count, keys.get("client_num_in_total", count, 0))
        chain = translate_defense(keys, clients or NOMINAL)
        seed, folder = keys.get("random_seed", count, 0), keys.get(MEMORY, text, "")
        arguments, self.args = fingerprint(keys), args
        if arguments == self._arguments:
            return
        if chain:
            self._open_folder(folder)
        self.is_enabled, self._keys, self._arguments = bool(chain), keys, arguments
        self.defense_type = str(keys.raw("defense_type")).strip() if chain else None
        self._built, self._names, self._reference, self._dropped = {}, [], None, []
        self._round, self._stage, self._whole = Round(index=0, seed=seed), AFTER, True
        for warning in keys.warnings:
            logger.warning("%s", warning)

    def is_defense_enabled(self) -> bool:
        """Whether there is a defense."""
        return self.is_enabled

    def is_defense_before_aggregation(self) -> bool:
        """Whether the defense changes the list of clients' models."""
        return any(method.before for method in self._methods())

    def is_defense_on_aggregation(self) -> bool:
        """Whether the defense aggregates."""
        return any(method.on for method in self._methods())

    def is_defense_after_aggregation(self) -> bool:
        """Whether the defense changes the aggregated model."""
        return any(method.after for method in self._methods())

    def defend_before_aggregation(
        self, raw_client_grad_list: Raw, extra_auxiliary_info: State | None = None, clients: Sequence[str] | None = None
    ) -> list[tuple[float, State]]:
        """The models that go on to aggregation: fewer, clipped, mixed, or one.

        Args:
            raw_client_grad_list: (samples, state dict of weights) of each client of the round.
            extra_auxiliary_info: the global model's state dict, which they started from.
            clients: their names, which a memory goes by; by default by place, which is right only if the same clients
                come in the same order each round.

        Raises:
            InputError: if no defense is enabled, no global model is given, or too few clients are fit.
        """
        names = list(clients or client_names(len(raw_client_grad_list)))
        if len(names) != len(raw_client_grad_list):
            raise InputError(
                f"{len(raw_client_grad_list)} clients' models but {len(names)} names; give a name for each"
            )
        with self._in_stage(BEFORE):
            self._names = [(state, name) for name, (_, state) in zip(names, raw_client_grad_list, strict=True)]
            self._reference, self._dropped = extra_auxiliary_info, []
            if not self.is_defense_before_aggregation():
                return list(raw_client_grad_list)
            received, rows = self._rows(raw_client_grad_list, names)
            for place, method in enumerate(self._methods(len(raw_client_grad_list))):
                if method.before and rows.clients != NOBODY:
                    rows = method.before(rows, replace(self._round, place=place))
            out = give_back(rows, received)
            if set(rows.clients) <= set(names):
                self._dropped = [place for place, name in enumerate(names) if name not in rows.clients]
            self._names = [(state, name) for name, (_, state) in zip(rows.clients, out, strict=True)]
            return [*out]

    def defend_on_aggregation(
        self,
        raw_client_grad_list: Raw,
        base_aggregation_func: Callable[..., Any] | None = None,
        extra_auxiliary_info: State | None = None,
    ) -> Any:
        """The next global model: the defense's aggregate, or the base aggregator's, or the mean by samples.

        `base_aggregation_func(args=..., raw_grad_list=...)` is called as FedML calls it, with copies of the dicts,
        because FedML's own writes into the first.

        Raises:
            InputError: if no defense is enabled, no global model is given, or too few clients are fit.
        """
        with self._in_stage(ON):
            names = self._names_of(raw_client_grad_list)
            defends = self.is_defense_on_aggregation() and tuple(names) != NOBODY
            if not defends and base_aggregation_func is not None:
                copies = [(samples, OrderedDict(state)) for samples, state in raw_client_grad_list]
                return base_aggregation_func(args=self.args, raw_grad_list=copies)
            self._reference = self._reference if extra_auxiliary_info is None else extra_auxiliary_info
            received, rows = self._rows(raw_client_grad_list, names)
            methods = enumerate(self._methods(len(raw_client_grad_list)))
            stages = [(place, method.on) for place, method in methods if method.on and defends]
            result = rows.mean()
            for place, on in stages:  # there is one at most
                result = on(rows, replace(self._round, place=place))
            ((_, model),) = give_back(result, received)
            return model

    def defend_after_aggregation(self, global_model: State) -> State:
        """The aggregated model, clipped or with noise.

        It is taken as an update of the global model that the stages before were given; where there was none, of zero.

        Raises:
            InputError: if no defense is enabled, or the model is not fit.
        """
        with self._in_stage(AFTER):
            if not self.is_defense_after_aggregation():
                return global_model
            if self._reference is None:
                self._reference = zero_reference(global_model)
            received, row = self._rows([(1.0, global_model)], ["the aggregate"])
            for place, method in enumerate(self._methods()):
                if method.after:
                    row = method.after(row, replace(self._round, place=place))
            ((_, model),) = give_back(row, received)
            return model

    def defend(
        self,
        raw_client_grad_list: Raw,
        base_aggregation_func: Callable[..., Any] | None = None,
        extra_auxiliary_info: State | None = None,
    ) -> State:
        """All three stages, one after another: from clients' models to the next global one."""
        kept = self.defend_before_aggregation(raw_client_grad_list, extra_auxiliary_info)
        model: State = self.defend_on_aggregation(kept, base_aggregation_func, extra_auxiliary_info)
        return self.defend_after_aggregation(model)

    def get_malicious_client_idxs(self) -> list[int]:
        """The places of the clients that the last round left out; [] where rows are mixed or weighed instead."""
        return list(self._dropped)

    def get_benign_client_idxs(self, client_idxs: Sequence[int]) -> list[int]:
        """Those of the given places that were not left out."""
        return [place for place in client_idxs if place not in self._dropped]

    def _methods(self, clients: int = 0) -> list[Defense]:
        """The chain for so many clients: FedML's trimmed_mean has a share of them."""
        if not self.is_enabled:
            return []
        if clients not in self._built:
            chain = translate_defense(Keys(self._keys.values), clients or NOMINAL)  # its warnings have been told
            named = [(method["name"], {k: v for k, v in method.items() if k != "name"}) for method in chain]
            self._built[clients] = [defense.build(name, parameters) for name, parameters in named]
        return self._built[clients]

    def _open_folder(self, folder: str) -> None:
        if not folder:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedllm_sec-defender-")
            self._folder = Path(self._temporary.name)
            return
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if next(self._folder.glob("round_*"), None):
            raise InputError(f"{folder}: holds rounds already; give an empty folder as {MEMORY}")

    @contextmanager
    def _in_stage(self, stage: int) -> Iterator[None]:
        """Begin a new round unless this stage follows the last one; a round that failed is not remembered."""
        if not self.is_enabled:
            raise InputError("no defense is enabled: call init with enable_defense and a defense_type")
        if stage <= self._stage:
            index, last = self._round.index + 1, self._round.dir if self._whole else self._round.previous
            here = self._folder / f"round_{index:04d}"
            here.mkdir()
            self._round = replace(self._round, index=index, dir=here, previous=last)
            self._names, self._reference = [], None
        self._stage, self._whole = stage, False
        yield
        self._whole = True

    def _names_of(self, raw: Raw) -> list[str]:
        """The names under which this round has seen the models, or those by place."""
        found = [next((name for known, name in self._names if known is state), "") for _, state in raw]
        return found if all(found) and len(set(found)) == len(found) else client_names(len(raw))

    def _rows(self, raw: Raw, names: Sequence[str]) -> tuple[Received, UpdateSet]:
        if self._reference is None:
            raise InputError("the global model's state dict is missing: give it as extra_auxiliary_info")
        received = receive(raw, self._reference, names)
        self._round = replace(self._round, reference=weights_row(self._reference))
        return received, received.updates


FedMLDefender = FedDefender
