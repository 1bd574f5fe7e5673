"""What all formats say of an audit: counts, verdicts, the tool, the policy's hash and the cost in a line."""

import hashlib
import json
from collections import Counter
from importlib.metadata import PackageNotFoundError, metadata, version

from fedllm_sec.audit.findings import Audit, Finding, Rule, Severity, Subject
from fedllm_sec.audit.output.words import jsonable, number

TOOL = "fedllm-sec"
NO_PROOF = "A pass is not a proof: an attacker who knows these measures can stay within them."
FIT, UNFIT = "fit", "unfit"


def tool_version() -> str:
    """Of the package that is installed."""
    try:
        return version(TOOL)
    except PackageNotFoundError:
        return "0.0.0"


def tool_home() -> str | None:
    """The project's address, where the package names one."""
    try:
        links = metadata(TOOL).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    return next((address.strip() for address in (link.partition(",")[2] for link in links) if address.strip()), None)


def policy_sha256(audit: Audit) -> str:
    """Of the policy as JSON with sorted keys: equal hashes, equal policies."""
    text = json.dumps(jsonable(audit.policy), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plural(count: int, word: str) -> str:
    """`1 finding`, `2 findings`."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def tally(audit: Audit) -> str:
    """`1 critical, 2 high, 1 suppressed`; '' without findings."""
    counts = Counter(each.severity for each in audit.findings if each.suppressed is None)
    parts = [f"{counts[severity]} {severity}" for severity in sorted(Severity, reverse=True) if counts[severity]]
    passed = sum(each.suppressed is not None for each in audit.findings)
    return ", ".join([*parts, *([f"{passed} suppressed"] if passed else [])])


def headline(audit: Audit) -> str:
    """The verdict in a line."""
    if not audit.subjects:
        return "There was nothing to audit."
    n, fit = len(audit.subjects), len(audit.fit)
    if not audit.findings:
        return f"{plural(n, 'adapter')}: no findings."
    kept = f"{fit} of {plural(n, 'adapter')} fit to merge"
    return f"{kept} ({tally(audit)}; fails on {audit.fail_on} and above)."


def verdict(audit: Audit, subject: Subject) -> str:
    """Of one adapter, for people: `fit`, or how many findings fail it."""
    failing = sum(finding.adapter == subject.name for finding in audit.failing)
    return plural(failing, "finding") if failing else FIT


def rules_of(findings: tuple[Finding, ...]) -> list[Rule]:
    """The distinct rules that were found, in order."""
    return list({finding.rule.id: finding.rule for finding in findings}.values())


def measured(finding: Finding) -> str:
    """What was measured, and what it was compared with."""
    value, limit = number(finding.measured), number(finding.threshold)
    return f"{value} (limit {limit})" if value and limit else value or (f"limit {limit}" if limit else "")


def size_text(count: float) -> str:
    """`12.5 MiB`."""
    for unit, width in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= width:
            return f"{count / width:.1f} {unit}"
    return f"{count:.0f} B"


def cost_line(audit: Audit) -> str:
    """`12.5 MiB read in 2 passes, peak memory 300.0 MiB, 1.2 s`; '' where nothing was counted."""
    return ", ".join(cost_text(key, value) for key, value in audit.cost.items())


def cost_text(name: str, value: float) -> str:
    """One of the costs."""
    known = {
        "bytes_read": f"{size_text(value)} read",
        "passes": f"{value:.3g} passes",
        "peak_memory": f"peak memory {size_text(value)}",
        "seconds": f"{value:.3g} s",
    }
    return known.get(name, f"{name.replace('_', ' ')} {number(value)}")


def norms_of(audit: Audit) -> dict[str, float]:
    """Lengths of the updates that were compared, by adapter."""
    known = audit.statistics
    return {} if known is None else dict(zip(known.adapters, known.norms.tolist(), strict=True))
