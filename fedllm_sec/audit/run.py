"""The whole audit: intake, one pass over the values, and what each rule makes of it."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.progress import track

from fedllm_sec.audit.bank import Bank
from fedllm_sec.audit.base import Base
from fedllm_sec.audit.findings import Audit, gravest_first, severity_named
from fedllm_sec.audit.intake import expected_of, hashed, open_adapter
from fedllm_sec.audit.judging import Context, Work, checked, compare, measure_groups
from fedllm_sec.audit.lineage import against_base
from fedllm_sec.audit.policy import Policy
from fedllm_sec.terminal import console
from fedllm_sec.updates.adapters import client_names
from fedllm_sec.updates.claims import refuse_repeated
from fedllm_sec.updates.device import Budget
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.memory import peak_memory
from fedllm_sec.updates.sources import ADAPTER_CONFIG, ADAPTER_FILE

if TYPE_CHECKING:
    from fedllm_sec.audit.behaviour import Probe

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    probe: "Probe | None" = None,
    privacy: bool = False,
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
        probe: texts and words to ask the model with each adapter; needs the base's folder.
        privacy: whether to look what updates reveal; needs the base's folder and the global adapter.
        device: where inner products are computed, `cpu` or `cuda`.
        memory: for the factors of one module of all adapters.

    Raises:
        InputError: if what they are compared with cannot be read. What is wrong with the adapters is a finding.
    """
    began = time.perf_counter()
    global_adapter = Path(reference) if reference is not None else None
    context = Context(
        policy or Policy(),
        global_adapter,
        checked(global_adapter),
        Base(Path(base)) if base is not None else None,
        bank_of(bank, trusted, reference, memory),
        Path(history) if history is not None else None,
        Budget.of(memory, device),
    )
    work = look_at_all([Path(path) for path in paths], names, context)
    compare(work)
    if probe is not None:
        from fedllm_sec.audit.behaviour import check_behaviour  # imports what models need, which takes seconds

        check_behaviour(work, probe)
    if privacy:
        from fedllm_sec.audit.privacy import check_privacy

        check_privacy(work)
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
    context = Context(Policy(), start, checked(start), None, None, None, Budget.of(memory))
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
        if not path.is_file() and not path.is_dir() and not path.is_symlink():
            raise InputError(f"{path}: no such file or folder")
    refuse_repeated([str(path.absolute()) for path in paths])
    called = list(names) if names is not None else client_names(paths)
    if len(called) != len(paths) or len(set(called)) != len(called):
        raise InputError(f"{len(paths)} adapters need as many different names, got {len(set(called))}")
    expected = expected_of(context.reference) if context.reference is not None else None
    opened = []
    for path, name in watched(list(zip(paths, called, strict=True)), "looking"):
        adapter = open_adapter(path, name, context.policy, expected)
        hashed(adapter, context.policy)
        against_base(adapter, context.base, context.policy, expected)
        opened.append(adapter)
    return Work(context, opened)


def watched(items: Sequence[T], label: str) -> Sequence[T]:
    """The same, with a progress bar on a terminal where there are many."""
    if len(items) < 4 or not console.is_terminal:
        return items
    return track(items, label, console=console, transient=True)  # type: ignore[return-value]


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
        if path.is_file() and path.suffix != ".safetensors":
            raise InputError(f"{path}: is neither a PEFT adapter folder nor a .safetensors file")
        if path.is_file() or looks_like_adapter(path):
            found.append(path)
        else:
            inside = sorted(path.iterdir())
            meant = [each for each in inside if each.suffix == ".safetensors" or looks_like_adapter(each)]
            for each in inside:
                if each not in meant:
                    logger.warning("%s is no adapter, and was not audited", each)
            found += meant
    return found


def looks_like_adapter(folder: Path) -> bool:
    """Whether a folder is meant to be an adapter's, fit or not."""
    return folder.is_dir() and ((folder / ADAPTER_CONFIG).exists() or any(folder.glob("adapter_model.*")))
