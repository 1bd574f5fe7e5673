"""Aggregate a folder of adapters that somebody sent, without a federation."""

import json
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fedllm_sec.audit import Policy
from fedllm_sec.config import override_tree
from fedllm_sec.core import Round, aggregate
from fedllm_sec.defenses.geometry.gram import norms
from fedllm_sec.federation.audited import Chain, audited
from fedllm_sec.federation.run_folder import fill_folder
from fedllm_sec.registry import defense
from fedllm_sec.terminal import reading
from fedllm_sec.updates.admit import open_updates
from fedllm_sec.updates.claims import largest_claim
from fedllm_sec.updates.errors import InputError, NotFiniteError
from fedllm_sec.updates.files import atomic_folder, read_json, write_json
from fedllm_sec.updates.memory import peak_memory
from fedllm_sec.updates.sources import ADAPTER_CONFIG, adapter_file
from fedllm_sec.updates.update_set import UpdateSet

logger = logging.getLogger(__name__)


def aggregate_adapters(
    clients: Sequence[Path],
    reference: Path,
    out: Path,
    chain: Chain,
    *,
    num_samples: Sequence[float] | None = None,
    sample_cap: float | None = None,
    trusted: Path | None = None,
    space: str = "factors",
    device: str = "cpu",
    memory: str = "1GiB",
    seed: int = 0,
    audit: Policy | None = None,
) -> dict[str, Any]:
    """Write the adapter that a server would make of the clients' adapters, and, as `decision.json`, why; return that.

    Args:
        clients: PEFT adapter folders or safetensors files.
        reference: the adapter that the clients started from.
        out: a folder that does not exist yet; it appears whole or not at all.
        chain: names and parameters of defenses, in order; none: FedAvg.
        num_samples: of each client; by default all count alike.
        sample_cap: a claim counts as at most so many times the median claim.
        trusted: an adapter that the server trained itself from the same start, for defenses that compare with one.
        space: in which to decide and to average: of the factors of LoRA pairs, or of their products.
        device: where blocks are computed.
        memory: for the blocks.
        seed: of defenses that draw at random.
        audit: audit the clients' adapters first by this policy, and leave out what fails.

    Raises:
        InputError: for an unknown defense or parameter, an update that does not pass the gate, too few clients.
    """
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already; choose another --out")
    defenses = [defense.build(name, parameters) for name, parameters in chain]
    passed = audited(clients, reference, num_samples, audit, device=device, memory=memory) if audit else None
    clients, num_samples = (passed.clients, passed.num_samples) if passed else (clients, num_samples)
    how: dict[str, Any] = {"space": space, "device": device, "memory": memory}
    most = largest_claim(num_samples or [], sample_cap, "--sample-cap")
    updates = open_updates(clients, reference=reference, num_samples=num_samples, max_samples=most, **how)
    base = open_updates([reference], **how)
    own = open_updates([trusted], reference=reference, **how) if trusted else None
    warn_without_config(reference, out)
    began = time.perf_counter()
    with atomic_folder(out) as partial, reading("aggregating", lambda: updates.budget.traffic.read):
        with blaming_nobody_for(own, updates):
            result = aggregate(updates, Round(dir=partial, seed=seed, reference=base, trusted=own), defenses)
            discarded = fill_folder(result, base, reference, [partial])
        decision = decision_of(updates, chain, partial)
        if discarded is not None:
            decision["discarded_energy"] = discarded[0]
        decision |= cost_of([updates, base, *([own] if own else [])], clients, time.perf_counter() - began)
        if passed:
            decision["audit"] = passed.write(partial, reference, chain)
        write_json(partial / "decision.json", decision)
        forget(partial)
    return decision


def forget(folder: Path) -> None:
    """Delete what defenses remember for the next round, which one aggregation does not have."""
    for left in [*folder.glob("*/settled_*"), *folder.glob("*/row_*"), *folder.glob("*/memory.json")]:
        left.unlink()


def warn_without_config(reference: Path, out: Path) -> None:
    """Say that PEFT will not load what is written, where the global adapter has no configuration to go with it."""
    if not (reference / ADAPTER_CONFIG).is_file():
        logger.warning("%s has no %s: PEFT will not load %s before one is put there", reference, ADAPTER_CONFIG, out)


@contextmanager
def blaming_nobody_for(trusted: UpdateSet | None, updates: UpdateSet) -> Iterator[None]:
    """Say of a NaN in the server's own update that it is the server's: there is no client to leave out."""
    try:
        yield
    except NotFiniteError as fault:
        if trusted is None or fault.client in updates.clients or fault.client not in trusted.clients:
            raise
        raise InputError(f"--trusted {fault.client}: {fault.reason}; train it again") from None


def decision_of(updates: UpdateSet, chain: Chain, folder: Path) -> dict[str, Any]:
    """What was received, and what each defense decided; lengths where a defense had to know them."""
    decisions = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/decision.json"))}
    known = "gram" in vars(updates)
    return {
        "defenses": [{"name": name, **parameters} for name, parameters in chain],
        "space": "product" if updates.layout.pairs else "factors",
        "clients": list(updates.clients),
        "num_samples": updates.num_samples.tolist(),
        "norms": norms(updates.gram).tolist() if known else None,
        "decisions": decisions,
    }


def cost_of(sets: Sequence[UpdateSet], clients: Sequence[Path], seconds: float) -> dict[str, Any]:
    """What the aggregation cost.

    Bytes read, from the clients' files and from the server's own adapters; the first as passes over the clients'
    files; the most memory that this process ever took; the time.
    """
    read = [updates.budget.traffic.read for updates in sets]
    size = sum(adapter_file(path).stat().st_size for path in clients)
    passes = round(read[0] / size, 3)
    return {"bytes_read": sum(read), "passes": passes, "peak_memory": peak_memory(), "seconds": round(seconds, 3)}


def decision_table(decision: Mapping[str, Any]) -> Table:
    """The same for people: a line for each client, and below it what it cost."""
    names = " → ".join(d["name"] for d in decision["defenses"]) or "FedAvg"
    table = Table("client", "samples", title=names, caption=caption_of(decision))
    columns: list[Mapping[str, str]] = []
    if decision["norms"]:
        table.add_column("update norm", justify="right")
        norms = zip(decision["clients"], decision["norms"], strict=True)
        columns.append({client: f"{norm:.4g}" for client, norm in norms})
    for name, found in decision["decisions"].items():
        for key in ("scores", "weights"):
            if key in found:
                table.add_column(f"{name} {key[:-1]}", justify="right")
                columns.append({client: f"{value:.4g}" for client, value in found[key].items()})
        if "kept" in found:
            table.add_column(f"{name} kept")
            judged = found.get("scores") or found.get("weights") or dict.fromkeys(decision["clients"])
            kept = {name for group in found["kept"] for name in (group, *group.split("+"))}  # of buckets, their clients
            columns.append({c: "[green]yes[/green]" if c in kept else "[red]no[/red]" for c in judged})
    for client, samples in zip(decision["clients"], decision["num_samples"], strict=True):
        table.add_row(escape(client), f"{samples:g}", *(column.get(client, "") for column in columns))
    return table


def caption_of(decision: Mapping[str, Any]) -> str:
    """Thresholds, the space, and the cost, in a line or two."""
    parts = [
        f"{name}: {key} {value if isinstance(value, list) else format(value, '.4g')}"
        for name, found in decision["decisions"].items()
        for key, value in found.get("thresholds", {}).items()
    ]
    if decision.get("discarded_energy") is not None:
        parts.append(f"the rank discards {decision['discarded_energy']:.3g} of the update's energy")
    if decision.get("audit"):
        parts.append(f"the audit left out {len(decision['audit']['left_out'])} of {len(decision['audit']['sources'])}")
    parts.append(f"space: {decision['space']}")
    parts.append(f"{decision['passes']:g} passes, {decision['bytes_read'] / 2**20:,.1f} MiB read")
    parts.append(f"peak {decision['peak_memory'] / 2**20:,.0f} MiB, {decision['seconds']:g} s")
    return escape("; ".join(parts))


def parse_counts(text: str | None) -> list[float] | None:
    """`"10,20,30"`, or a JSON file that holds a list of numbers.

    Raises:
        InputError: if it is neither.
    """
    if text is None:
        return None
    try:
        numbers = set(text) <= set("0123456789.,+-eE naif")
        counts = text.split(",") if numbers else json.loads(Path(text).read_text(encoding="utf-8"))
        return [float(count) for count in counts]
    except (ValueError, TypeError, OSError) as error:
        raise InputError(
            f"--num-samples {text!r}: give N,N,... or a JSON file with a list of numbers ({error})"
        ) from None


def parse_chain(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """`["krum f=1 m=2"]` -> `[("krum", {"f": 1, "m": 2})]`; the registry checks names and values."""
    chain = []
    for text in texts:
        try:
            name, *pairs = shlex.split(text) or [""]
        except ValueError as error:
            raise InputError(f"--defense {text!r}: {error}") from None
        chain.append((name, override_tree(pairs)))
    return chain
