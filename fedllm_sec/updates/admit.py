"""The gate: what may become a row, and why not.

Every update passes here before any method sees it, so that no method needs to think of NaN, of strange keys or of
counts below zero. An extra key is refused because PEFT would load it over the base model without a word.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedllm_sec.updates.adapters import adapter_config, client_names, open_client, open_reference
from fedllm_sec.updates.claims import admitted_count, refuse_repeated
from fedllm_sec.updates.device import TILE, Budget
from fedllm_sec.updates.errors import InputError, NotFiniteError
from fedllm_sec.updates.factors import AdapterFactors, Anchor
from fedllm_sec.updates.layout import Layout
from fedllm_sec.updates.pairs import product_layout
from fedllm_sec.updates.rows import from_sources, product_rows
from fedllm_sec.updates.sources import Row, Source, StateDict
from fedllm_sec.updates.update_set import UpdateSet

logger = logging.getLogger(__name__)

T = TypeVar("T")
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
    space: str = "factors",
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
        space: `factors`: a row is the tensors of the file. `product`: each LoRA pair of it is the one matrix s B A that
            it stands for, with the scaling of the reference's adapter_config (the clients' own without a reference);
            then no choice of factors can deceive a method.
        device: where blocks are computed, `cpu` or `cuda`.
        memory: how much the blocks may take together, whatever the size of the model.

    Raises:
        RefusedError: if any update does not pass the gate, naming every client and its reason. Values are looked at
            when they are first read: a NaN then raises NotFiniteError, whatever is done with the rows.
    """
    admission = admit(
        paths,
        reference=reference,
        num_samples=num_samples,
        max_samples=max_samples,
        space=space,
        device=device,
        memory=memory,
    )
    if admission.refusals:
        raise RefusedError(scan(admission).refusals)  # all of them at once
    return admission.updates


def admit(
    paths: Sequence[Path | str | Row],
    *,
    names: Sequence[str] | None = None,
    reference: Path | str | None = None,
    num_samples: Sequence[float] | None = None,
    max_samples: float = math.inf,
    space: str = "factors",
    device: str = "cpu",
    memory: str | int = "1GiB",
) -> Admission:
    """Like `open_updates`, but go on with the clients that pass and return the others beside them.

    Clients are called by `names`, by default after their folders.

    Raises:
        RefusedError: if no client passes.
        InputError: if the reference itself is not fit.
    """
    folders = [path if isinstance(path, Row) else Path(path) for path in paths]
    if not folders:
        raise InputError("no client adapters given")
    refuse_repeated([os.path.realpath(str(folder)) for folder in folders])
    if not max_samples > 0:
        raise InputError(f"max_samples={max_samples}: must be above zero")
    budget = Budget.of(memory, device)
    base = open_reference(Path(reference)) if reference is not None else None
    config = adapter_config(Path(reference)) if reference is not None else None
    counts = [1.0] * len(folders) if num_samples is None else list(num_samples)
    if len(counts) != len(folders):
        raise InputError(f"{len(folders)} clients but {len(counts)} sample counts; give one for each client")
    called = names or client_names(folders)
    claims = zip(called, folders, counts, strict=True)
    admitted, refusals = sift(claims, lambda folder: open_client(folder, config, binds=base is None), base, max_samples)
    if space not in ("factors", "product"):
        raise InputError(
            f"space={space!r}: updates are compared in the space of their factors, or in that of 'product'"
        )
    if space == "factors":
        return assemble(admitted, refusals, budget, base)
    if base is None and admitted:
        first = folders[called.index(admitted[0].client)]
        config = None if isinstance(first, Row) else adapter_config(first)
    return assemble_products(admitted, refusals, budget, base, config)


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


def assemble_products(
    admitted: Sequence[Admitted],
    refusals: Sequence[Refusal],
    budget: Budget,
    reference: Source | None,
    config: Mapping[str, Any] | None,
) -> Admission:
    """Make the matrix of what passed, in the space of LoRA products."""
    if not admitted:
        raise RefusedError(refusals)
    if config is None:
        logger.warning("no adapter_config.json tells lora_alpha: LoRA products are scaled by 1")
    names, sources, claims = zip(*admitted, strict=True)
    counts = torch.tensor(claims, dtype=torch.float64)
    layout = product_layout(sources[0].layout, config)
    anchor = Anchor(AdapterFactors("the global adapter", reference, budget)) if reference else None
    factors = [AdapterFactors(name, source, budget, anchor) for name, source, _ in admitted]
    plain = layout.plain
    beside = from_sources(sources, names, counts, budget, reference, plain) if plain.shapes else None
    return Admission(product_rows(layout, factors, beside, names, counts, budget), tuple(refusals))


def check_source(source: Source, expected: Layout | None) -> None:
    """Raise InputError unless keys and shapes are the expected ones."""
    if not source.layout.columns:
        raise InputError("holds no values")
    if expected and (difference := expected.difference(source.layout)):
        raise InputError(difference)


def scan(admission: Admission) -> Admission:
    """Read everything once, and refuse the clients with values that are not finite as well.

    Methods need no scan: every block is checked when it is read, and the first one that is not fit raises
    NotFiniteError. A scan finds all such clients, so that the others can go on.

    Raises:
        RefusedError: if no client is left.
    """
    updates, refusals = admission
    faults: dict[int, Refusal] = {}
    for probe in probes(updates):
        for row in range(len(updates)):
            try:
                if row not in faults:
                    probe(row)
            except NotFiniteError as fault:
                faults[row] = Refusal(fault.client, fault.reason)
                logger.warning("refused %s: %s", fault.client, fault.reason)
    every = (*refusals, *faults.values())
    if len(faults) == len(updates):
        raise RefusedError(every)
    fit = updates.rows([row for row in range(len(updates)) if row not in faults])
    return Admission(replace(fit, derived_gram=None), every)  # its Gram matrix is not a part of the one with a NaN


def probes(updates: UpdateSet) -> Iterator[Callable[[int], object]]:
    """Functions of a row's number that each read a part of it; together they read all of it."""
    sources = updates.products.sources if updates.products else ()
    for pair in updates.layout.pairs:
        yield lambda row, pair=pair: (sources[row].left(pair, 0, pair.d_out), sources[row].right(pair))  # type: ignore[misc]
    for span in updates.layout.plain.spans(CHECKED):
        yield lambda row, span=span: updates.fetch(span, [row])()  # type: ignore[misc]
