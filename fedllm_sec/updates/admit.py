"""The gate: what may become a row, and why not.

Every update passes here before any method sees it, so that no method needs to think of NaN, of strange keys or of
counts below zero. An extra key is refused because PEFT would load it over the base model without a word.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

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
CHECKED = 16 * TILE  # elements looked at together for NaN
LARGEST_CONFIG = 2**20  # bytes of an adapter_config.json
LARGEST_COUNT = 2**53  # samples; past it float64 does not count


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
    refuse_repeated([str(folder.resolve()) for folder in folders])
    if not max_samples > 0:
        raise InputError(f"max_samples={max_samples}: must be above zero")
    budget = Budget.of(memory, device)
    base = open_reference(Path(reference)) if reference is not None else None
    config = adapter_config(Path(reference)) if reference is not None else None
    counts = [1.0] * len(folders) if num_samples is None else list(num_samples)
    if len(counts) != len(folders):
        raise InputError(f"{len(folders)} clients but {len(counts)} sample counts; give one for each client")
    claims = zip(client_names(folders), folders, counts, strict=True)
    admitted, refusals = sift(claims, lambda folder: open_client(folder, config), base, max_samples)
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
    refuse_repeated(names)
    admitted, refusals = sift(zip(names, state_dicts, num_samples, strict=True), StateDict, None, math.inf)
    if refusals:
        raise RefusedError(refusals)
    return assemble(admitted, refusals, Budget(), None).updates


def sift(
    claims: Iterable[tuple[str, T, float]],
    open_source: Callable[[T], Source],
    reference: Source | None,
    max_samples: float,
) -> tuple[list[Admitted], list[Refusal]]:
    """Part what may become a row from what may not; without a reference the first admitted layout binds."""
    expected = reference.layout if reference else None
    admitted: list[Admitted] = []
    refusals: list[Refusal] = []
    for client, claim, count in claims:
        try:
            source = open_source(claim)
            check_source(source, expected, reference)
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
    try:
        source = SafetensorsFile(adapter_file(path))
        check_source(source, None, None)
    except InputError as error:
        raise InputError(f"the global adapter {path}: {error}") from None
    return source


def open_client(folder: Path, expected_config: dict[str, Any] | None) -> SafetensorsFile:
    """Open a client's adapter; its adapter_config is only compared with the server's, which is the one that counts."""
    source = SafetensorsFile(adapter_file(folder))
    if expected_config is not None:
        found = adapter_config(folder) or expected_config
        keys = expected_config.keys() | found.keys()
        if fields := sorted(key for key in keys if expected_config.get(key) != found.get(key)):
            logger.warning("%s: its adapter_config differs in %s; the server's is used", folder, ", ".join(fields))
    return source


def adapter_config(folder: Path) -> dict[str, Any] | None:
    """The adapter configuration of a PEFT folder, or None where there is none.

    Raises:
        InputError: if it is not a JSON object of a sane size.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    if path.stat().st_size > LARGEST_CONFIG:
        raise InputError(f"{path}: is {path.stat().st_size:,} bytes long, which no adapter configuration is")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object")
    return config


def check_source(source: Source, expected: Layout | None, reference: Source | None) -> None:
    """Raise InputError unless keys and shapes are the expected ones and every value of the update is finite.

    It must be so in float32, in which adapters travel, and after the reference is subtracted: then squares and sums
    of them are finite in float64, and no method needs to think of overflow.
    """
    if not source.layout.columns:
        raise InputError("holds no values")
    if expected and (difference := expected.difference(source.layout)):
        raise InputError(difference)
    for span in source.layout.spans(CHECKED):
        values = source.read(*span).double()
        if reference is not None:
            values = values - reference.read(*span).double()
        if not bool(torch.isfinite(values.float()).all()):
            raise InputError(f"tensor {span.tensor!r} holds NaN or infinite values, or none that float32 can hold")


def admitted_count(count: object, most: float) -> float:
    """A client's claim, at most `most`; raise InputError if it is no plausible count."""
    if not is_count(count):
        raise InputError(f"claims num_samples={str(count)[:40]}; a count must be a finite number above zero")
    return min(float(count), most)


def is_count(count: object) -> TypeGuard[float]:
    """Whether a client's claim can be a number of samples."""
    return isinstance(count, int | float) and not isinstance(count, bool) and 0 < count <= LARGEST_COUNT


def refuse_repeated(names: Sequence[str]) -> None:
    """Raise InputError if a client is given twice: it would vouch for itself."""
    if repeated := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InputError(f"{repeated}: is given twice; give each client once")


def client_names(paths: Sequence[Path]) -> list[str]:
    """Short names: the folder's or the file's own, the whole path where that is not unique."""
    short = [path.name if path.is_dir() or not path.suffix else path.stem for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
