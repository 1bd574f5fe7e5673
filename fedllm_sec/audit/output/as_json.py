"""An audit as JSON, for programs."""

from typing import Any

from fedllm_sec.audit.findings import Audit, Finding, Statistics, Subject
from fedllm_sec.audit.output.facts import FIT, TOOL, UNFIT, policy_sha256, tool_version
from fedllm_sec.audit.output.words import exact, jsonable

SCHEMA_VERSION = 1  # grows when a field changes its meaning or goes; new fields may come at any time


def audit_json(audit: Audit) -> dict[str, Any]:
    """All that the audit says; `json.dumps(..., allow_nan=False)` takes it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": TOOL, "version": tool_version()},
        "policy": jsonable(audit.policy),
        "policy_sha256": policy_sha256(audit),
        "fail_on": str(audit.fail_on),
        "exit_code": audit.exit_code,
        "adapters": [adapter_json(audit, subject) for subject in audit.subjects],
        "findings": [finding_json(finding) for finding in audit.findings],
        "statistics": None if audit.statistics is None else statistics_json(audit.statistics),
        "notes": jsonable(audit.notes),
        "cost": jsonable(audit.cost),
    }


def adapter_json(audit: Audit, subject: Subject) -> dict[str, Any]:
    """One adapter, and whether it may be merged."""
    return {
        "name": exact(subject.name),
        "path": exact(str(subject.path)),
        "sha256": jsonable(subject.sha256),
        "size": subject.size,
        "tensors": subject.tensors,
        "compared": subject.compared,
        "verdict": UNFIT if audit.fails(subject.name) else FIT,
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    """One finding, with what its rule says."""
    return {
        "rule": finding.rule.id,
        "name": finding.rule.name,
        "severity": str(finding.severity),
        "adapter": exact(finding.adapter),
        "file": jsonable(finding.file),
        "tensor": jsonable(finding.tensor),
        "message": exact(finding.message),
        "measured": jsonable(finding.measured),
        "threshold": jsonable(finding.threshold),
        "places": finding.places,
        "suppressed": jsonable(finding.suppressed),
        "why": finding.rule.why,
        "remedy": finding.rule.remedy,
    }


def statistics_json(statistics: Statistics) -> dict[str, Any]:
    """The measures as nested lists; what is no finite number is null."""
    return {
        "adapters": jsonable(statistics.adapters),
        "modules": jsonable(statistics.modules),
        "measures": jsonable(statistics.measures),
        "gram": jsonable(statistics.gram),
        "scores": jsonable(statistics.scores),
        "z": jsonable(statistics.z),
        "is_update": statistics.is_update,
    }
