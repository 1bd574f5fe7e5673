"""An audit as SARIF 2.1.0, as code scanning reads it."""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedllm_sec.audit.findings import Audit, Finding, Rule, Severity
from fedllm_sec.audit.output.facts import TOOL, policy_sha256, tool_home, tool_version
from fedllm_sec.audit.output.words import NAME, exact, jsonable, plain
from fedllm_sec.audit.rules import CATALOGUE

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {Severity.CRITICAL: "error", Severity.HIGH: "error", Severity.MEDIUM: "warning", Severity.LOW: "note"}
SCORES = {Severity.CRITICAL: "9.5", Severity.HIGH: "8.0", Severity.MEDIUM: "5.5", Severity.LOW: "2.0"}  # GitHub's bands
BASE = "%SRCROOT%"
WEIGHTS = "adapter_model.safetensors"
SAID = 1000  # characters of a message
LONGEST = 1024  # characters of a file's name; some readers refuse the whole log for a longer address
Json = dict[str, Any]


def audit_sarif(audit: Audit) -> Json:
    """The log; paths are relative to the folder in which the audit runs."""
    rules = list({rule.id: rule for rule in (*CATALOGUE, *(each.rule for each in audit.findings))}.values())
    files = artifacts(audit)
    places = {file["location"]["uri"]: index for index, file in enumerate(files)}
    seen: Counter[str] = Counter()
    ids = {rule.id: index for index, rule in enumerate(rules)}
    home = tool_home()
    driver = {
        "name": TOOL,
        "version": tool_version(),
        "semanticVersion": tool_version(),
        **({"informationUri": home} if home else {}),
        "rules": [rule_sarif(rule, severity_of(audit, rule)) for rule in rules],
    }
    run = {
        "tool": {"driver": driver},
        "originalUriBaseIds": {BASE: {"description": {"text": "The folder in which the audit ran."}}},
        "artifacts": files,
        "invocations": [invocation(audit)],
        "results": [result(audit, finding, ids[finding.rule.id], places, seen) for finding in audit.findings],
        "properties": {"policySha256": policy_sha256(audit), "cost": jsonable(audit.cost)},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def severity_of(audit: Audit, rule: Rule) -> Severity:
    """A rule's, as its findings and the policy have it: GitHub shows the rule's for each alert."""
    found = [finding.severity for finding in audit.findings if finding.rule.id == rule.id]
    named = audit.policy.get("severity", {}).get(rule.id)
    return max(found) if found else Severity[named.upper()] if named else rule.severity


def rule_sarif(rule: Rule, severity: Severity) -> Json:
    """A rule, with its help."""
    says = rule.says[0].upper() + rule.says[1:] + "."
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": says},
        "fullDescription": {"text": f"{says} {rule.why}"},
        "help": {
            "text": f"{rule.why}\nWhat to do: {rule.remedy}",
            "markdown": f"{rule.why}\n\n**What to do:** {rule.remedy}",
        },
        "defaultConfiguration": {"level": LEVELS[severity]},
        "properties": {
            "security-severity": SCORES[severity],
            "precision": "high" if rule.id[:2] in ("FS", "KY", "SH", "CF") else "medium",
            "tags": ["security", "machine-learning", "lora"],
        },
    }


def invocation(audit: Audit) -> Json:
    """How the audit went; its notes are what it did not look at."""
    said = [{"level": "note", "message": {"text": message(note)}} for note in audit.notes]
    return {"executionSuccessful": True, "exitCode": audit.exit_code, "toolExecutionNotifications": said}


def artifacts(audit: Audit) -> list[Json]:
    """The files that were read, each once, with their hashes."""
    files: dict[str, Json] = {}
    for subject in audit.subjects:
        for name, digest in subject.sha256.items():
            location = location_of(folder_of(subject.path) / name)
            files[location["uri"]] = {
                "location": location,
                "roles": ["analysisTarget"],
                "hashes": {"sha-256": digest},
            }
    return list(files.values())


def result(audit: Audit, finding: Finding, index: int, places: dict[str, int], seen: Counter[str]) -> Json:
    """One finding."""
    location = location_of(path_of(audit, finding))
    if location["uri"] in places:
        location["index"] = places[location["uri"]]
    where: Json = {"physicalLocation": {"artifactLocation": location, "region": {"startLine": 1}}}
    if finding.tensor:
        name = exact(finding.tensor)
        where["logicalLocations"] = [{"name": plain(name, NAME), "fullyQualifiedName": name, "kind": "member"}]
    key = fingerprint(finding)
    seen[key] += 1
    measured = {"measured": jsonable(finding.measured), "threshold": jsonable(finding.threshold)}
    told = {"adapter": exact(finding.adapter), "severity": str(finding.severity), "places": finding.places}
    found: Json = {
        "ruleId": finding.rule.id,
        "ruleIndex": index,
        "level": LEVELS[finding.severity],
        "message": {"text": message(finding.message)},
        "locations": [where],
        "partialFingerprints": {"primaryLocationLineHash": f"{key[:16]}:{seen[key]}", "finding/v1": key},
        "properties": {**told, **{name: value for name, value in measured.items() if value is not None}},
    }
    if finding.suppressed is not None:
        found["suppressions"] = [{"kind": "external", "justification": message(finding.suppressed)}]
    return found


def message(text: str) -> str:
    """A sentence in which nothing is a link or a placeholder, and that ends as one."""
    said = re.sub(r"\{(\d+)\}", r"(\1)", plain(text, SAID)).replace("](", "] (")
    return said if said.endswith((".", "!", "?")) else f"{said}."


def fingerprint(finding: Finding) -> str:
    """The same for the same thing in the same place, whatever was measured.

    GitHub knows alerts by `primaryLocationLineHash`; without one of ours it hashes the first line of a binary file, and
    all findings of a rule in one file are one alert.
    """
    parts = (finding.rule.id, finding.adapter, finding.file or "", finding.tensor or "")
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def folder_of(path: Path) -> Path:
    """That in which an adapter's files are: an adapter may be a lone safetensors file."""
    return path.parent if path.suffix == ".safetensors" and not path.is_dir() else path


def path_of(audit: Audit, finding: Finding) -> Path:
    """The file that a finding is in; of one about the whole adapter, its weights, for code scanning wants a file."""
    subject = next((each for each in audit.subjects if each.name == finding.adapter), None)
    if subject is None:
        return Path(finding.adapter) / (finding.file or "")
    folder = folder_of(subject.path)
    if finding.file is not None and len(finding.file) <= LONGEST:
        return folder / finding.file.lstrip("/")  # never what an absolute name would lead to
    if folder != subject.path:
        return subject.path
    return folder / WEIGHTS if WEIGHTS in subject.sha256 else folder / next(iter(subject.sha256), "")


def location_of(path: Path) -> Json:
    """Relative to where the audit runs, or, of a path that leads out of there, absolute."""
    here, absolute = Path.cwd(), Path(os.path.normpath(Path.cwd() / path))  # as written: links are not followed
    if absolute.is_relative_to(here) and absolute != here:
        return {"uri": encoded(absolute.relative_to(here)), "uriBaseId": BASE}
    return {"uri": f"file://{encoded(absolute)}"}


def encoded(path: Path) -> str:
    """Percent-encoded, the bytes of names that are no Unicode as they are on the disk."""
    text = path.as_posix()
    try:
        octets = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        octets = text.encode("utf-8", "surrogatepass")
    return quote(octets, safe="/~")
