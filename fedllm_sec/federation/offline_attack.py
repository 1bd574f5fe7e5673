"""Rewrite a folder of adapters as an adversary would, so that anyone can try their aggregation on it."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.markup import escape
from rich.table import Table

from fedllm_sec.core import Knowledge, Round, Threat, aggregate, check_granted, poison
from fedllm_sec.federation.audited import Chain
from fedllm_sec.federation.run_folder import client_name, fill_folder
from fedllm_sec.federation.stealth import stealth
from fedllm_sec.registry import attack, defense
from fedllm_sec.updates.admit import open_updates
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import atomic_folder, write_json
from fedllm_sec.updates.sources import ADAPTER_CONFIG, ADAPTER_FILE, adapter_file
from fedllm_sec.updates.update_set import UpdateSet


@dataclass(frozen=True)
class Received:
    """What clients sent, and how a server reads it.

    Attributes:
        clients: PEFT adapter folders or safetensors files, as the clients trained them.
        reference: the adapter that they started from.
        num_samples: of each client; by default all count alike.
        space: of factors or of products: in which the server decides, and the attack with it.
        device: where blocks are computed.
        memory: for the blocks.
    """

    clients: Sequence[Path]
    reference: Path
    num_samples: Sequence[float] | None = None
    space: str = "factors"
    device: str = "cpu"
    memory: str = "1GiB"

    def updates(self, clients: Sequence[Path], space: str) -> UpdateSet:
        """Clients minus the reference."""
        how: dict[str, Any] = {"space": space, "device": self.device, "memory": self.memory}
        return open_updates(clients, reference=self.reference, num_samples=self.num_samples, **how)

    def weights(self, path: Path, space: str) -> UpdateSet:
        """An adapter as it is, one row."""
        return open_updates([path], space=space, device=self.device, memory=self.memory)


def attack_adapters(
    name: str,
    parameters: Mapping[str, Any],
    received: Received,
    malicious: Sequence[int],
    out: Path,
    *,
    round: Round,
    visible: Knowledge = "all",
    chain: Chain = (),
    previous: Path | None = None,
) -> dict[str, Any]:
    """Write a folder with an adapter folder for each client: malicious ones rewritten, the others as they were.

    Args:
        name: of an attack that sends models.
        parameters: its own.
        received: what clients sent.
        malicious: places among the clients of those that the adversary owns.
        out: a folder that does not exist yet; it appears whole or not at all.
        round: its number and the seed.
        visible: what the adversary sees.
        chain: names and parameters of the server's defenses, for an attack that tries itself on them.
        previous: the global adapter of the round before, for attacks that need one.

    Returns:
        What `attack.json` holds: who was rewritten how, and how well each hides (`federation.stealth`).

    Raises:
        InputError: for an unknown attack or parameter, one that acts on data, a client that there is not, an update
            that does not pass the gate.
    """
    check_out(out, received)
    method = attack.build(name, parameters)
    if method.poison_model is None or method.train_last is not None:
        raise InputError(f"{name}: acts on data or while clients train, not on finished adapters; use fedllm-sec run")
    check_granted(method, visible)
    own = checked_places(malicious, len(received.clients))
    rows = received.updates(received.clients, received.space)
    found: dict[str, Any] = {}
    threat = replace(threat_of(received, own, visible, chain, previous, round), noted=found.__setitem__)
    with atomic_folder(out) as partial:
        folders = [partial / folder for folder in folder_names(received.clients)]
        for place, folder in enumerate(folders):
            folder.mkdir()
            if place not in own:
                copy_adapter(received.clients[place], received.reference, folder)
        for seen, view in views(rows, threat):
            poisoned = poison(seen, method, view)
            weights = received.weights(received.reference, "product" if poisoned.layout.pairs else "factors")
            fill_folder(poisoned, weights, received.reference, [folders[place] for place in view.malicious])
        measures = stealth(received.updates(folders, received.space).gram, own)
        hidden = {rows.clients[place]: measure for place, measure in zip(own, measures, strict=True)}
        report: dict[str, Any] = {"attack": {"name": name, **parameters}, "visible": visible, "space": received.space}
        report |= {"seed": round.seed, "malicious": hidden, "found": found, "clients": list(rows.clients)}
        write_json(partial / "attack.json", report)
    return report


def check_out(out: Path, received: Received) -> None:
    """Raise InputError for a folder that exists, or lies in one that is read."""
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already; choose another --out")
    for given in (*received.clients, received.reference):
        if given.is_dir() and out.resolve().is_relative_to(given.resolve()):
            raise InputError(f"{out}: lies in {given}, which is read; choose another --out")


def threat_of(
    received: Received,
    own: tuple[int, ...],
    visible: Knowledge,
    chain: Chain,
    previous: Path | None,
    round: Round,
) -> Threat:
    """What the adversary holds, and sees if it sees everything."""
    base = received.weights(received.reference, received.space)

    def before(index: int, space: str = "factors") -> UpdateSet:
        path = {round.index: received.reference, round.index - 1: previous}.get(index)
        if path is None:
            remedy = "give it with --previous" if index == round.index - 1 else "use fedllm-sec run"
            raise InputError(f"this attack needs what clients received in round {index}: {remedy}")
        return received.weights(path, space)

    return Threat(
        round.as_the_adversary_knows_it(),
        own,
        tuple(range(len(received.clients))),
        base,
        visible,
        len(received.clients),
        factors=received.updates(received.clients, "factors") if received.space == "product" else None,
        received=before,
        server=server_of(chain, replace(round, reference=base)) if visible == "aggregator" else None,
    )


def checked_places(malicious: Sequence[int], clients: int) -> tuple[int, ...]:
    """The malicious clients' places in order, each once.

    Raises:
        InputError: if there are none, or one that does not exist.
    """
    if not malicious:
        raise InputError("--malicious: name at least one client, by its place in the list, from 0")
    if unknown := [place for place in malicious if not 0 <= place < clients]:
        raise InputError(f"--malicious {unknown[0]}: there are clients 0 to {clients - 1}")
    return tuple(sorted(set(malicious)))


def views(rows: UpdateSet, everybody: Threat) -> Iterator[tuple[UpdateSet, Threat]]:
    """What the adversary is shown of all rows; where each malicious client acts by itself, each its own."""
    if everybody.knowledge in ("all", "aggregator"):
        yield rows, everybody
        return
    own = everybody.malicious
    for group in [(place,) for place in own] if everybody.knowledge == "own" else [own]:
        factors = everybody.factors and everybody.factors.rows(group)
        yield rows.rows(group), replace(everybody, malicious=group, visible=group, factors=factors)


def server_of(chain: Chain, round: Round) -> Callable[[UpdateSet], AbstractContextManager[UpdateSet]]:
    """What a server with these defenses would make of rows."""

    defenses = [defense.build(name, chosen) for name, chosen in chain]

    @contextmanager
    def server(sent: UpdateSet) -> Iterator[UpdateSet]:
        with TemporaryDirectory(prefix="fedllm_sec_") as scratch:
            yield aggregate(sent, replace(round, dir=Path(scratch)), defenses)

    return server


def folder_names(clients: Sequence[Path]) -> list[str]:
    """The clients' own names, or their numbers where those are not unique."""
    names = [path.name if path.is_dir() else path.stem for path in clients]
    return names if len(set(names)) == len(names) else [client_name(place) for place in range(len(names))]


def copy_adapter(source: Path, reference: Path, folder: Path) -> None:
    """Copy a client's adapter and its configuration, the global one's where it is a bare file, into a folder."""
    file = adapter_file(source)
    shutil.copyfile(file, folder / (file.name if source.is_dir() else ADAPTER_FILE))
    for place in (source, reference):
        if (place / ADAPTER_CONFIG).is_file():
            shutil.copyfile(place / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
            return


def attack_table(report: Mapping[str, Any]) -> Table:
    """For people: who was rewritten, and how well that hides."""
    table = Table("client", "norm / median", "cosine to the mean", "Krum rank", title=escape(report["attack"]["name"]))
    for client, found in report["malicious"].items():
        numbers = (found["norm_ratio"], found["cosine"], found["krum_rank"])
        table.add_row(escape(client), *("" if number is None else f"{number:.3g}" for number in numbers))
    return table
