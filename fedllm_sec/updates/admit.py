"""The gate: what may become a row, and why not.

Every update passes here before any method sees it, so that no method needs to think of NaN, of strange keys or of
counts below zero. An extra key is refused because PEFT would load it over the base model without a word.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedllm_sec.updates.device import TILE, Budget
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json
from fedllm_sec.updates.layout import Layout
from fedllm_sec.updates.sources import ADAPTER_CONFIG, SafetensorsFile, Source, StateDict, adapter_file
from fedllm_sec.updates.update_set import UpdateSet, from_sources

logger = logging.getLogger(__name__)

T = TypeVar("T")
Policy = Literal["stop", "drop"]
CHECKED = 16 * TILE  # elements looked at together for NaN


class Refusal(NamedTuple):
    """A client whose update was not admitted."""

    client: str
    reason: str


class Admitted(NamedTuple):
    """A client whose update may become a row."""

    client: str
    source: Source
    num_samples: float


class RefusedError(InputError):
    """Updates did not pass the gate; `refusals` lists them all."""

    def __init__(self, refusals: Sequence[Refusal]):
        self.refusals = tuple(refusals)
        super().__init__("\n".join(f"{client}: {reason}" for client, reason in refusals))


class Admission(NamedTuple):
    """What the gate let through, and what it did not."""

    updates: UpdateSet
    refusals: tuple[Refusal, ...]


def open_updates(
    paths: Sequence[Path | str],
    *,
    reference: Path | str | None = None,
    num_samples: Sequence[float] | None = None,
    max_samples: float = math.inf,
    device: str = "cpu",
    memory: str | int = "1GiB",
) -> UpdateSet:
    """Open clients' adapters as a lazy matrix of updates.

    Args:
        paths: PEFT adapter folders or safetensors files, one a client.
        reference: the global adapter that the clients started from: rows are client minus global. Without it the
            files are taken to hold updates already.
        num_samples: samples that each client claims; by default all count alike.
        max_samples: a larger claim counts as this much.
        device: where blocks are computed, `cpu` or `cuda`.
        memory: how much the blocks may take together, whatever the size of the model.

    Raises:
        RefusedError: if any update does not pass the gate, naming every client and its reason.
    """
    updates, refusals = admit(
        paths, reference=reference, num_samples=num_samples, max_samples=max_samples, device=device, memory=memory
    )
    if refusals:
        raise RefusedError(refusals)
    return updates


def admit(
    paths: Sequence[Path | str],
    *,
    reference: Path | str | None = None,
    num_samples: Sequence[float] | None = None,
    max_samples: float = math.inf,
    device: str = "cpu",
    memory: str | int = "1GiB",
) -> Admission:
    """Like `open_updates`, but go on with the clients that pass and return the others beside them.

    Raises:
        RefusedError: if no client passes.
        InputError: if the reference itself is not fit.
    """
    folders = [Path(path) for path in paths]
    if not folders:
        raise InputError("no client adapters given")
    budget = Budget.of(memory, device)
    base = open_reference(Path(reference)) if reference is not None else None
    counts = [1.0] * len(folders) if num_samples is None else list(num_samples)
    if len(counts) != len(folders):
        raise InputError(f"{len(folders)} clients but {len(counts)} sample counts; give one for each client")
    claims = zip(client_names(folders), folders, counts, strict=True)
    admitted, refusals = sift(
        claims, lambda folder: SafetensorsFile(adapter_file(folder)), base.layout if base else None, max_samples
    )
    if reference is not None:
        note_other_configs(folders, Path(reference))
    return assemble(admitted, refusals, budget, base)


def stack_updates(
    state_dicts: Sequence[Mapping[str, Tensor]], num_samples: Sequence[float], clients: Sequence[str] | None = None
) -> UpdateSet:
    """Make a set of updates that are already in memory.

    Args:
        state_dicts: one mapping from tensor name to floating-point tensor for each client: *updates* (client minus
            global), never weights.
        num_samples: how many samples each client claims.
        clients: names; `client_0`, `client_1`, ... by default.

    Raises:
        RefusedError: if any of them does not pass the gate, naming every client and its reason.
    """
    names = list(clients) if clients else [f"client_{i}" for i in range(len(state_dicts))]
    if not len(state_dicts) == len(names) == len(num_samples) or not names:
        raise InputError(f"{len(state_dicts)} updates, {len(names)} names and {len(num_samples)} sample counts")
    admitted, refusals = sift(zip(names, state_dicts, num_samples, strict=True), StateDict, None, math.inf)
    if refusals:
        raise RefusedError(refusals)
    return assemble(admitted, refusals, Budget(), None).updates


def sift(
    claims: Iterable[tuple[str, T, float]],
    open_source: Callable[[T], Source],
    expected: Layout | None,
    max_samples: float,
) -> tuple[list[Admitted], list[Refusal]]:
    """Part what may become a row from what may not; the first admitted layout binds where none is expected."""
    admitted: list[Admitted] = []
    refusals: list[Refusal] = []
    for client, claim, count in claims:
        try:
            source = open_source(claim)
            check_source(source, expected)
            admitted.append(Admitted(client, source, admitted_count(count, max_samples)))
            expected = expected or source.layout
        except InputError as refusal:
            refusals.append(Refusal(client, str(refusal)))
            logger.warning("refused %s: %s", client, refusal)
    return admitted, refusals


def assemble(
    admitted: Sequence[Admitted],
    refusals: Sequence[Refusal],
    budget: Budget,
    reference: Source | None,
) -> Admission:
    """Make the matrix of what passed."""
    if not admitted:
        raise RefusedError(refusals)
    names, sources, counts = zip(*admitted, strict=True)
    updates = from_sources(sources, names, torch.tensor(counts, dtype=torch.float64), budget, reference)
    return Admission(updates, tuple(refusals))


def open_reference(path: Path) -> SafetensorsFile:
    """Open the server's own adapter, which passes the same gate."""
    source = SafetensorsFile(adapter_file(path))
    try:
        check_source(source, None)
    except InputError as error:
        raise InputError(f"the global adapter {path}: {error}") from None
    return source


def check_source(source: Source, expected: Layout | None) -> None:
    """Raise InputError unless keys and shapes are the expected ones and every value is finite."""
    if not source.layout.columns:
        raise InputError("holds no values")
    if expected and (difference := expected.difference(source.layout)):
        raise InputError(difference)
    for span in source.layout.spans(CHECKED):
        if not bool(torch.isfinite(source.read(*span)).all()):
            raise InputError(f"tensor {span.tensor!r} holds NaN or infinite values")


def admitted_count(count: float, most: float) -> float:
    """A client's claim, at most `most`; raise InputError if it is no count."""
    if not math.isfinite(count) or count <= 0:
        raise InputError(f"claims num_samples={count}; a count must be a finite number above zero")
    return min(float(count), most)


def client_names(paths: Sequence[Path]) -> list[str]:
    """Short names: the folder's or the file's own, the whole path where that is not unique."""
    short = [path.name if path.is_dir() or not path.suffix else path.stem for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def note_other_configs(clients: Sequence[Path], server: Path) -> None:
    """Log where a client's adapter_config departs from the server's, which is the one that counts."""
    ours = server / ADAPTER_CONFIG
    if not ours.is_file():
        return
    expected = read_json(ours)
    for client in clients:
        theirs = client / ADAPTER_CONFIG
        found = read_json(theirs) if theirs.is_file() else expected
        if fields := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
            logger.warning("%s: its adapter_config differs in %s; the server's is used", client, ", ".join(fields))
