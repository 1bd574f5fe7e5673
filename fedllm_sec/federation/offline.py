"""Aggregate a folder of adapters that somebody sent, without a federation."""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fedllm_sec.config import override_tree
from fedllm_sec.core import Round, aggregate
from fedllm_sec.federation.run_folder import fill_adapter_folder
from fedllm_sec.registry import defense
from fedllm_sec.updates.admit import open_updates
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import atomic_folder, read_json, write_json
from fedllm_sec.updates.sources import ADAPTER_CONFIG
from fedllm_sec.updates.update_set import UpdateSet

logger = logging.getLogger(__name__)

Chain = Sequence[tuple[str, Mapping[str, Any]]]


def aggregate_adapters(
    clients: Sequence[Path],
    reference: Path,
    out: Path,
    chain: Chain,
    *,
    num_samples: Sequence[float] | None = None,
    device: str = "cpu",
    memory: str = "1GiB",
    seed: int = 0,
) -> dict[str, Any]:
    """Write the adapter that a server would make of the clients' adapters, and why, as `decision.json` beside it.

    Args:
        clients: PEFT adapter folders or safetensors files.
        reference: the adapter that the clients started from.
        out: a folder that does not exist yet; it appears whole or not at all.
        chain: names and parameters of defenses, in order; none: FedAvg.
        num_samples: of each client; by default all count alike.
        device: where blocks are computed.
        memory: for the blocks.
        seed: of defenses that draw at random.

    Returns:
        What `decision.json` holds.

    Raises:
        InputError: for an unknown defense or parameter, an update that does not pass the gate, too few clients.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; choose another --out")
    defenses = [defense.build(name, parameters) for name, parameters in chain]
    updates = open_updates(clients, reference=reference, num_samples=num_samples, device=device, memory=memory)
    base = open_updates([reference], device=device, memory=memory)
    if not (reference / ADAPTER_CONFIG).is_file():
        logger.warning("%s has no %s: PEFT will not load %s before one is put there", reference, ADAPTER_CONFIG, out)
    with atomic_folder(out) as partial:
        result = aggregate(updates, Round(dir=partial, seed=seed), defenses)
        fill_adapter_folder(result.add(base), reference, [partial])
        decision = decision_of(updates, chain, partial)
        write_json(partial / "decision.json", decision)
    return decision


def decision_of(updates: UpdateSet, chain: Chain, folder: Path) -> dict[str, Any]:
    """What was received, and what each defense decided."""
    decisions = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/decision.json"))}
    return {
        "defenses": [{"name": name, **parameters} for name, parameters in chain],
        "clients": list(updates.clients),
        "num_samples": updates.num_samples.tolist(),
        "norms": updates.gram.diagonal().sqrt().tolist(),
        "decisions": decisions,
    }


def decision_table(decision: Mapping[str, Any]) -> Table:
    """The same for people: a line for each client."""
    table = Table(
        "client", "samples", "update norm", title=" → ".join(d["name"] for d in decision["defenses"]) or "FedAvg"
    )
    judged = {name: d for name, d in decision["decisions"].items() if "scores" in d}
    for name in judged:
        table.add_column(f"{name} score", justify="right")
        table.add_column("kept")
    for i, client in enumerate(decision["clients"]):
        row = [escape(client), f"{decision['num_samples'][i]:g}", f"{decision['norms'][i]:.4g}"]
        for d in judged.values():
            score = d["scores"].get(client)
            row += ["" if score is None else f"{score:.4g}", "[green]yes[/green]" if client in d["kept"] else "no"]
        table.add_row(*row)
    return table


def parse_counts(text: str | None) -> list[float] | None:
    """`"10,20,30"`, or a JSON file that holds a list of numbers.

    Raises:
        InputError: if it is neither.
    """
    if text is None:
        return None
    try:
        counts = json.loads(Path(text).read_text(encoding="utf-8")) if Path(text).is_file() else text.split(",")
        return [float(count) for count in counts]
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--num-samples {text!r}: give N,N,... or a JSON file with a list of numbers ({error})"
        ) from None


def parse_chain(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """`["krum f=1 m=2"]` -> `[("krum", {"f": 1, "m": 2})]`; the registry checks names and values."""
    chain = []
    for text in texts:
        name, *pairs = shlex.split(text) or [""]
        chain.append((name, override_tree(pairs)))
    return chain
