"""What an audit finds: severities, rules and findings, and the whole of an audit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.updates.errors import InputError


class Severity(IntEnum):
    """How much a finding matters; the order is that of `--fail-on`."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Rule:
    """One kind of finding.

    Attributes:
        id: stable for ever, such as `KY001`.
        name: for people and for code scanning, in kebab case.
        severity: of its findings, unless the policy says another.
        says: what is wrong, in a line.
        why: it matters.
        remedy: what to do about it.
    """

    id: str
    name: str
    severity: Severity
    says: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one adapter.

    Attributes:
        rule: what kind.
        adapter: whose, by name.
        message: what was found, in a sentence.
        severity: the rule's, or the policy's.
        file: within the adapter's folder; None: the adapter as a whole.
        tensor: the (first) tensor or module that is meant.
        measured: the value that was measured, as JSON has it.
        threshold: what it was compared with.
        places: how many tensors or files it was found in.
        suppressed: the reason that the policy gives for letting it pass; such a finding never fails an audit.
    """

    rule: Rule
    adapter: str
    message: str
    severity: Severity
    file: str | None = None
    tensor: str | None = None
    measured: Any = None
    threshold: Any = None
    places: int = 1
    suppressed: str | None = None

    @property
    def place(self) -> str:
        """Where, for people: `client_03/adapter_model.safetensors: lm_head.weight`."""
        path = self.adapter if self.file is None else f"{self.adapter}/{self.file}"
        more = f" (and {self.places - 1} more)" if self.places > 1 else ""
        return path + (f": {self.tensor}" if self.tensor else "") + more


@dataclass(frozen=True)
class Subject:
    """An adapter that was audited.

    Attributes:
        name: by which findings call it.
        path: its folder, or its safetensors file.
        sha256: of each of its regular files that was read, by name within the folder.
        size: bytes of its weights; 0 where they could not be opened.
        tensors: how many.
        compared: whether it was laid beside the others: what is malformed is not.
    """

    name: str
    path: Path
    sha256: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    tensors: int = 0
    compared: bool = False


@dataclass(frozen=True)
class Statistics:
    """What one pass over the adapters measured: the rows are adapters (n), the columns modules (m).

    Attributes:
        adapters: n names, of those that could be compared.
        modules: m names.
        measures: by name, (n, m) float64: `norm` (Frobenius, in product space, scaling included), `top1` (share of
            the squared norm in the largest singular value), `rank` (effective, exp of the entropy), `kurtosis` (of
            entries), `gauge` (log10 of ||B|| / ||A||), `moved` and `aligned` (by how much A shrank while B grew against
            the global adapter, and the cosine of A with the global A), `slack` (what the factors' movement allows, over
            what the product moved).
        gram: (n, n) float64 inner products of whole updates.
        scores: by name, (n,) float64: each adapter beside the others, such as `krum` or `cosine`; NaN where unknown.
        z: the same as robust z-scores; without the ones that were refused.
        is_update: whether rows are client minus global.
    """

    adapters: tuple[str, ...]
    modules: tuple[str, ...]
    measures: Mapping[str, NDArray[np.float64]]
    gram: NDArray[np.float64]
    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    z: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    is_update: bool = False

    @property
    def norms(self) -> NDArray[np.float64]:
        """(n,) lengths of whole updates."""
        lengths: NDArray[np.float64] = np.sqrt(np.clip(np.diagonal(self.gram), 0, None))
        return lengths


@dataclass(frozen=True)
class Audit:
    """Everything that an audit says.

    Attributes:
        subjects: what was audited, in the order given.
        findings: the gravest first; those that the policy lets pass are among them, and say so.
        fail_on: the least severity that fails.
        policy: as JSON, what was used with all thresholds.
        statistics: None where no two values could be compared with anything.
        notes: what was not looked at, and why.
        cost: bytes read, passes, peak memory in bytes, seconds.
    """

    subjects: tuple[Subject, ...]
    findings: tuple[Finding, ...]
    fail_on: Severity
    policy: Mapping[str, Any]
    statistics: Statistics | None = None
    notes: tuple[str, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)

    def fails(self, adapter: str) -> bool:
        """Whether an adapter has a finding that fails."""
        return any(finding.adapter == adapter for finding in self.failing)

    @property
    def failing(self) -> tuple[Finding, ...]:
        """Findings at or above `fail_on` that nobody lets pass."""
        return tuple(each for each in self.findings if each.suppressed is None and each.severity >= self.fail_on)

    @property
    def fit(self) -> tuple[str, ...]:
        """The names of the adapters that may be merged."""
        failed = {finding.adapter for finding in self.failing}
        return tuple(subject.name for subject in self.subjects if subject.name not in failed)

    @property
    def exit_code(self) -> int:
        """0: nothing that fails, 1: something, 3: there was nothing to audit; the same in every format."""
        return 3 if not self.subjects else int(bool(self.failing))


def gravest_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """In the order in which people should read them; suppressed ones last."""

    def order(each: Finding) -> tuple[bool, int, str, str, str]:
        return each.suppressed is not None, -each.severity, each.adapter, each.rule.id, each.tensor or ""

    return tuple(sorted(findings, key=order))


def suppressed(finding: Finding, reason: str) -> Finding:
    """The same, let pass for a reason."""
    return replace(finding, suppressed=reason)


def severity_named(name: str) -> Severity:
    """`"high"` -> Severity.HIGH.

    Raises:
        InputError: for another word.
    """
    names = {str(each): each for each in Severity}
    if name not in names:
        raise InputError(f"there is no severity {name!r}; there are {', '.join(names)}")
    return names[name]
