"""What each rule makes of the values: one pass over the adapters of each layout, each by itself, then side by side."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.audit.bank import Bank, unlike_trusted
from fedllm_sec.audit.base import Base
from fedllm_sec.audit.findings import Statistics
from fedllm_sec.audit.history import turns
from fedllm_sec.audit.intake import Opened, add
from fedllm_sec.audit.measure import Beside, Measured, measure, pairs_in
from fedllm_sec.audit.peers import colluders, copies, outliers, reversed_mean, scores_of, z_of
from fedllm_sec.audit.policy import Policy
from fedllm_sec.audit.rest import check_rest
from fedllm_sec.audit.weights import check_products, check_values, too_long_for_base
from fedllm_sec.terminal import reading
from fedllm_sec.updates.adapters import open_reference
from fedllm_sec.updates.device import Budget
from fedllm_sec.updates.errors import InputError, not_finite
from fedllm_sec.updates.layout import Layout
from fedllm_sec.updates.sources import ADAPTER_FILE, SafetensorsFile, all_finite

ALONE = {"KY001", "KY009", "FS005", "W009", "W014"}  # adapters with these are not laid beside the others


class Context(NamedTuple):
    """What an audit compares with.

    Attributes:
        policy: thresholds and expectations.
        reference: the global adapter's folder or file; None: adapters are taken as they are.
        start: its values, all of them numbers.
        base: the base model.
        bank: of trusted adapters.
        history: a folder of earlier rounds.
        budget: for the factors of a module of all adapters.
    """

    policy: Policy
    reference: Path | None
    start: SafetensorsFile | None
    base: Base | None
    bank: Bank | None
    history: Path | None
    budget: Budget


@dataclass
class Work:
    """An audit on its way.

    Attributes:
        context: what it compares with.
        opened: the adapters.
        notes: what is not looked at, and why.
        statistics: of those that can be compared.
    """

    context: Context
    opened: list[Opened]
    notes: list[str] = field(default_factory=list)
    statistics: Statistics | None = None


def compare(work: Work) -> None:
    """Read the values, and judge each adapter by itself and beside the others."""
    context, policy = work.context, work.context.policy
    bases: dict[str, float] = {}
    main: tuple[list[Opened], Measured, bool] | None = None
    for rows, measured in measure_groups(work):
        is_update = is_like(rows[0], context.start)
        if context.base is not None:
            bases |= context.base.norms([name for name in measured.modules if name not in bases])
        for row, opened in enumerate(rows):
            judge_alone(work, opened, measured, row, bases, is_update=is_update)
        wanted = is_update if context.start is not None else main is None or len(rows) > len(main[0])
        main = (rows, measured, is_update) if wanted else main
    if main is not None:
        rows, measured, is_update = main
        judge_together(work, rows, measured, is_update=is_update)
        left = len(work.opened) - len(rows)
        if left and len(work.opened) > 1:
            work.notes.append(
                f"{left} of {len(work.opened)} adapters are not compared with the others: see their findings"
            )
    if context.base is not None and context.base.weights and not bases and main is not None:
        work.notes.append("no weight of the base has a module's name: lengths were not compared with the base's")
    if context.bank is not None and context.bank.is_update != (context.start is not None):
        work.notes.append("the baseline is not compared: one of both is with --global, the other without")
    if context.bank is not None and context.bank.n < policy.thresholds.least_group:
        least = policy.thresholds.least_group
        work.notes.append(f"the baseline is of {context.bank.n} adapters: no z-scores are taken of fewer than {least}")


def measure_groups(work: Work) -> list[tuple[list[Opened], Measured]]:
    """One pass over the adapters of each layout."""
    groups: dict[tuple[Layout, bool], list[Opened]] = {}
    for each in work.opened:
        if each.source is not None:
            groups.setdefault((each.source.layout, each.has(*ALONE)), []).append(each)
    found = []
    for (layout, alone), rows in groups.items():
        start = work.context.start if not alone and is_like(rows[0], work.context.start) else None
        beside = [Beside(each.name, each.source, each.scalings) for each in rows if each.source is not None]
        pairs = pairs_in(layout, rows[0].modules, rows[0].scalings)
        with reading("auditing", lambda: work.context.budget.traffic.read):
            found.append((rows, measure(beside, pairs, start, work.context.budget)))
    return found


def is_like(opened: Opened, start: SafetensorsFile | None) -> bool:
    """Whether an adapter has the global adapter's layout."""
    return start is not None and opened.source is not None and opened.source.layout == start.layout


def checked(path: Path | None) -> SafetensorsFile | None:
    """The global adapter, whose values are numbers; None where there is none.

    Raises:
        InputError: if they are not.
    """
    if path is None:
        return None
    file = open_reference(path)
    for span in file.layout.spans(2**22):
        if not all_finite(file.load(span)):
            raise InputError(f"--global {path}: {not_finite(span.tensor)}")
    return file


def judge_alone(
    work: Work, opened: Opened, measured: Measured, row: int, bases: Mapping[str, float], *, is_update: bool
) -> None:
    """What an adapter's values say without the others."""
    policy, source = work.context.policy, opened.source
    assert source is not None
    file = ADAPTER_FILE if opened.subject.path.is_dir() else opened.subject.path.name
    factors = {name for pair in opened.modules.values() for name in pair}
    add(opened, policy, check_values(source.census, factors, policy.thresholds), file)
    if opened.has("FS005"):
        return
    ranks = {module: opened.tensors[a].shape[0] for module, (a, _) in opened.modules.items()}
    faults = list(check_products(measured, row, ranks, policy.thresholds, is_update=is_update))
    if opened.has("CF003"):  # the scaling of a module says why it is all of the update
        faults = [fault for fault in faults if fault.rule != "W008"]
    faults += too_long_for_base(measured, row, bases, policy.thresholds)
    faults += check_rest(opened, work.context.start if is_update else None, work.context.base, policy.thresholds)
    bank = work.context.bank
    if bank is not None and bank.is_update == is_update and not {"W009", "W014"} & {fault.rule for fault in faults}:
        faults += unlike_trusted(bank, measured, row, policy.thresholds)
    add(opened, policy, faults, file)


def judge_together(work: Work, rows: list[Opened], measured: Measured, *, is_update: bool) -> None:
    """What adapters say beside each other: those that are no updates at all, or broken, do not count."""
    policy, thresholds = work.context.policy, work.context.policy.thresholds
    keep = [i for i, each in enumerate(rows) if not each.has(*ALONE)]
    if not keep:
        return
    kept, names = [rows[i] for i in keep], tuple(rows[i].name for i in keep)
    gram = measured.gram[np.ix_(keep, keep)]
    turned = None
    if work.context.history is not None:
        current = {each.name: each.subject.path for each in kept}
        turned, notes = turns(work.context.history, current, work.context.reference, work.context.budget.memory)
        work.notes += notes
    scores = scores_of(gram, measured.agreement[keep], mean_of(measured.measures["aligned"][keep]), turned)
    z = z_of(scores, thresholds.least_group)
    if 1 < len(keep) < thresholds.least_group:
        least = thresholds.least_group
        work.notes.append(f"{len(keep)} adapters are compared: no z-scores are taken of fewer than {least}")
    if is_update and np.isnan(measured.agreement).all():
        work.notes.append("signs were not compared: the memory holds too few adapters at once; raise it")
    same = copies(gram, names, thresholds)
    close = colluders(gram, names, thresholds, set(same))
    for row, opened in enumerate(kept):
        faults = [found[row] for found in (same, close) if row in found]
        reverse = reversed_mean(scores, row, thresholds) if len(keep) > 2 else None
        faults += [reverse] if reverse is not None else outliers(scores, z, row, thresholds)
        add(opened, policy, faults)
    measures = {name: values[keep] for name, values in measured.measures.items()}
    work.statistics = Statistics(names, measured.modules, measures, gram, scores, z, is_update)


def mean_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) means of the rows of a table; NaN where nothing is known."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    mean: NDArray[np.float64] = np.where(known, values, 0).sum(axis=1) / np.where(count, count, np.nan)
    return mean
