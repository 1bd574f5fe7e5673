"""The whole audit: intake, one pass over the values, and what each rule makes of it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from fedllm_sec.audit.bank import Bank, unlike_trusted
from fedllm_sec.audit.base import Base
from fedllm_sec.audit.findings import Audit, Statistics, gravest_first, severity_named
from fedllm_sec.audit.history import turns
from fedllm_sec.audit.intake import Opened, add, expected_of, hashed, open_adapter
from fedllm_sec.audit.lineage import against_base
from fedllm_sec.audit.measure import Beside, Measured, measure, pairs_in
from fedllm_sec.audit.peers import colluders, copies, outliers, reversed_mean, scores_of, z_of
from fedllm_sec.audit.policy import Policy
from fedllm_sec.audit.weights import check_products, check_values, too_long_for_base
from fedllm_sec.terminal import console, reading
from fedllm_sec.updates.adapters import client_names, open_reference
from fedllm_sec.updates.device import Budget
from fedllm_sec.updates.errors import InputError, not_finite
from fedllm_sec.updates.layout import Layout
from fedllm_sec.updates.memory import peak_memory
from fedllm_sec.updates.sources import ADAPTER_CONFIG, ADAPTER_FILE, SafetensorsFile, all_finite

T = TypeVar("T")
ALONE = {"KY001", "KY009", "FS005", "W009", "W014"}  # adapters with these are not laid beside the others


class Context(NamedTuple):
    """What an audit compares with.

    Attributes:
        policy: thresholds and expectations.
        reference: the global adapter; None: adapters are taken as they are.
        base: the base model.
        bank: of trusted adapters.
        history: a folder of earlier rounds.
        budget: for the factors of a module of all adapters.
    """

    policy: Policy
    reference: Path | None
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
        passes: over the values of the largest group.
    """

    context: Context
    opened: list[Opened]
    notes: list[str] = field(default_factory=list)
    statistics: Statistics | None = None
    measured: list[tuple[list[Opened], Measured]] = field(default_factory=list)


def audit_adapters(
    paths: Sequence[Path | str],
    *,
    names: Sequence[str] | None = None,
    reference: Path | str | None = None,
    base: Path | str | None = None,
    trusted: Sequence[Path | str] = (),
    bank: Path | str | Bank | None = None,
    history: Path | str | None = None,
    policy: Policy | None = None,
    device: str = "cpu",
    memory: str | int = "512MiB",
) -> Audit:
    """Audit adapters: what is malformed, smuggled, out of order by itself, or unlike the others.

    Values are read once, module by module; nothing is unpickled, imported or run, and nothing leaves the machine.

    Args:
        paths: PEFT adapter folders, or safetensors files.
        names: by which findings call them; default: their folders'.
        reference: the global adapter that they started from: then updates are compared.
        base: the base model's folder or its config.json.
        trusted: adapters of one layout that are known to be good, to measure the others against.
        bank: the same, made before.
        history: a folder of earlier rounds, see `history.turns`.
        policy: thresholds, expectations and suppressions.
        device: where inner products are computed, `cpu` or `cuda`.
        memory: for the factors of one module of all adapters.

    Raises:
        InputError: if what they are compared with cannot be read. What is wrong with the adapters is a finding.
    """
    began = time.perf_counter()
    context = Context(
        policy or Policy(),
        Path(reference) if reference is not None else None,
        Base(Path(base)) if base is not None else None,
        bank_of(bank, trusted, reference, memory),
        Path(history) if history is not None else None,
        Budget.of(memory, device),
    )
    work = look_at_all([Path(path) for path in paths], names, context)
    compare(work)
    return finished(work, began)


def bank_of(
    bank: Path | str | Bank | None,
    trusted: Sequence[Path | str],
    reference: Path | str | None,
    memory: str | int,
) -> Bank | None:
    """The bank that was given, or one of the trusted adapters."""
    if bank is not None and trusted:
        raise InputError("give trusted adapters, or a baseline that was made of them, not both")
    if trusted:
        return make_bank(trusted, reference=reference, memory=memory)
    return bank if bank is None or isinstance(bank, Bank) else Bank.read(Path(bank))


def make_bank(
    trusted: Sequence[Path | str], *, reference: Path | str | None = None, memory: str | int = "512MiB"
) -> Bank:
    """Measure trusted adapters; all of them must be of one layout and in order.

    Raises:
        InputError: if there are fewer than two, or one of them is not fit to be trusted.
    """
    start = Path(reference) if reference is not None else None
    context = Context(Policy(), start, None, None, None, Budget.of(memory))
    work = look_at_all([Path(path) for path in trusted], None, context)
    if bad := [f for each in work.opened for f in each.findings if f.severity >= severity_named("high")]:
        raise InputError(f"trusted adapter {bad[0].adapter}: {bad[0].message} ({bad[0].rule.id}); leave it out")
    groups = measure_groups(work)
    if len(groups) != 1:
        raise InputError(f"trusted adapters have {len(groups)} layouts; give those of one kind")
    ((rows, measured),) = groups
    sources = [{"name": each.name, "sha256": each.subject.sha256.get(ADAPTER_FILE, "")} for each in rows]
    return Bank.of(measured, sources, is_update=start is not None)


def look_at_all(paths: Sequence[Path], names: Sequence[str] | None, context: Context) -> Work:
    """Intake: everything that can be told without reading values."""
    for path in paths:
        if not path.exists() and not path.is_symlink():
            raise InputError(f"{path}: no such file or folder")
    called = list(names) if names is not None else client_names(paths)
    if len(called) != len(paths) or len(set(called)) != len(called):
        raise InputError(f"{len(paths)} adapters need as many different names, got {len(set(called))}")
    expected = expected_of(context.reference) if context.reference is not None else None
    opened = []
    for path, name in watched(list(zip(paths, called, strict=True)), "looking"):
        adapter = open_adapter(path, name, context.policy, expected)
        hashed(adapter, context.policy)
        if context.base is not None:
            against_base(adapter, context.base, context.policy, expected)
        opened.append(adapter)
    return Work(context, opened)


def watched(items: Sequence[T], label: str) -> Sequence[T]:
    """The same, with a progress bar on a terminal where there are many."""
    if len(items) < 4 or not console.is_terminal:
        return items
    return track(items, label, console=console, transient=True)  # type: ignore[return-value]


def compare(work: Work) -> None:
    """Read the values, and judge each adapter by itself and beside the others."""
    context, policy = work.context, work.context.policy
    bases: dict[str, float] | None = None
    main: tuple[list[Opened], Measured, bool] | None = None
    for rows, measured in measure_groups(work):
        is_update = context.reference is not None and is_like(rows[0], context.reference)
        if context.base is not None and bases is None:
            bases = context.base.norms({name: name for name in measured.modules})
        for row, opened in enumerate(rows):
            judge_alone(work, opened, measured, row, bases or {}, is_update=is_update)
        wanted = is_update if context.reference is not None else main is None or len(rows) > len(main[0])
        main = (rows, measured, is_update) if wanted else main
    if main is not None:
        rows, measured, is_update = main
        judge_together(work, rows, measured, is_update=is_update)
        left = len(work.opened) - len(rows)
        if left and len(work.opened) > 1:
            work.notes.append(
                f"{left} of {len(work.opened)} adapters are not compared with the others: see their findings"
            )
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
        reference = None
        if work.context.reference is not None and not alone and is_like(rows[0], work.context.reference):
            reference = checked_reference(work.context.reference)
        beside = [Beside(each.name, each.source, each.scalings) for each in rows if each.source is not None]
        pairs = pairs_in(layout, rows[0].modules, rows[0].scalings)
        with reading("auditing", lambda: work.context.budget.traffic.read):
            found.append((rows, measure(beside, pairs, reference, work.context.budget)))
    return found


def is_like(opened: Opened, reference: Path) -> bool:
    """Whether an adapter has the global adapter's layout."""
    return opened.source is not None and opened.source.layout == open_reference(reference).layout


def checked_reference(path: Path) -> SafetensorsFile:
    """The global adapter, whose values are numbers.

    Raises:
        InputError: if they are not.
    """
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
    faults += too_long_for_base(measured, row, bases, policy.thresholds)
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
        turned, notes = turns(work.context.history, current, work.context.reference, "256MiB")
        work.notes += notes
    scores = scores_of(gram, measured.agreement[keep], mean_of(measured.measures["aligned"][keep]), turned)
    z = z_of(scores, thresholds.least_group)
    if 1 < len(keep) < thresholds.least_group:
        least = thresholds.least_group
        work.notes.append(f"{len(keep)} adapters are compared: no z-scores are taken of fewer than {least}")
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


def finished(work: Work, began: float) -> Audit:
    """What is said in the end."""
    policy, context = work.context.policy, work.context
    compared = set(work.statistics.adapters) if work.statistics is not None else set()
    subjects = tuple(replace(each.subject, compared=each.name in compared) for each in work.opened)
    findings = policy.judged([finding for each in work.opened for finding in each.findings])
    if context.reference is None and len(subjects) > 1:
        work.notes.append("no --global: adapters are compared as they are, not what each changed")
    size = sum(each.size for each in subjects)
    cost = {
        "bytes_read": float(context.budget.traffic.read),
        "passes": round(context.budget.traffic.read / size, 3) if size else 0.0,
        "peak_memory": float(peak_memory()),
        "seconds": round(time.perf_counter() - began, 3),
    }
    level = severity_named(policy.fail_on)
    return Audit(subjects, gravest_first(findings), level, policy.as_json(), work.statistics, tuple(work.notes), cost)


def adapters_in(paths: Sequence[Path]) -> list[Path]:
    """The adapters that are meant: a folder that holds none itself stands for those in it.

    Raises:
        InputError: if a path does not exist.
    """
    found = []
    for path in paths:
        if not path.exists() and not path.is_symlink():
            raise InputError(f"{path}: no such file or folder")
        if path.is_file() or looks_like_adapter(path):
            found.append(path)
        else:
            found += [each for each in sorted(path.iterdir()) if each.is_dir() and looks_like_adapter(each)]
    return found


def looks_like_adapter(folder: Path) -> bool:
    """Whether a folder is meant to be an adapter's, fit or not."""
    return (folder / ADAPTER_CONFIG).exists() or any(folder.glob("adapter_model.*"))
