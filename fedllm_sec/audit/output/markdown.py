"""An audit as Markdown: a summary for a pull request, and a section of a merged adapter's model card."""

from collections.abc import Sequence

from fedllm_sec.audit.findings import Audit, Finding, Subject
from fedllm_sec.audit.output.facts import (
    FIT,
    NO_PROOF,
    TOOL,
    cost_line,
    headline,
    measured,
    plural,
    policy_sha256,
    rules_of,
    size_text,
    tool_version,
    verdict,
)
from fedllm_sec.audit.output.words import SENTENCE, markdown, markdown_code

MOST = 50  # findings in a table
SHORT = 12  # digits of a hash in the summary
WEIGHTS = "adapter_model.safetensors"


def audit_markdown(audit: Audit) -> str:
    """A summary for a pull request or a step of a workflow."""
    mark = "✅" if audit.exit_code == 0 else "❌"
    parts = [f"## {mark} Adapter audit", f"**{headline(audit)}**"]
    if audit.findings:
        parts.append(findings_table(audit))
    if len(audit.findings) > MOST:
        parts.append(f"And {plural(len(audit.findings) - MOST, 'more finding')}.")
    if audit.subjects:
        parts.append(adapters_table(audit))
    parts += [explained(audit)] if audit.findings else []
    parts += ["\n".join(f"- {markdown(note, SENTENCE)}" for note in audit.notes)] if audit.notes else []
    return "\n\n".join([*parts, f"<sub>{footer(audit)}</sub>"]) + "\n"


def findings_table(audit: Audit) -> str:
    """The gravest findings."""
    head = ("severity", "rule", "place", "measured", "what was found")
    return table(head, [finding_row(finding) for finding in audit.findings[:MOST]])


def finding_row(finding: Finding) -> list[str]:
    """A line of the table."""
    path = finding.adapter if finding.file is None else f"{finding.adapter}/{finding.file}"
    places = [markdown_code(path), *([markdown_code(finding.tensor)] if finding.tensor else [])]
    more = f"<br>and {finding.places - 1:,} more" if finding.places > 1 else ""
    said, severity = markdown(finding.message, SENTENCE), f"**{finding.severity}**"
    if finding.suppressed is not None:
        severity = f"{finding.severity} (suppressed)"
        said += f"<br>*suppressed:* {markdown(finding.suppressed, SENTENCE)}"
    rule = f"{finding.rule.id} {markdown(finding.rule.name)}"
    return [severity, rule, "<br>".join(places) + more, markdown(measured(finding)), said]


def adapters_table(audit: Audit) -> str:
    """A line for each adapter."""
    rows = [
        [
            markdown_code(subject.name),
            f"{subject.tensors:,}",
            size_text(subject.size),
            markdown_code(weights_hash(subject)[:SHORT]) if weights_hash(subject) else "",
            verdict(audit, subject) if verdict(audit, subject) == FIT else f"**{verdict(audit, subject)}**",
        ]
        for subject in audit.subjects
    ]
    return table(("adapter", "tensors", "size", "sha256", "verdict"), rows)


def weights_hash(subject: Subject) -> str:
    """SHA-256 of its weights; of a lone file, that file's; '' where none was read."""
    only = next(iter(subject.sha256.values())) if len(subject.sha256) == 1 else ""
    return subject.sha256.get(WEIGHTS, subject.sha256.get(subject.path.name, only))


def explained(audit: Audit) -> str:
    """Why each rule matters and what to do, folded away."""
    told = [
        f"**{rule.id} {markdown(rule.name)}**: {markdown(rule.says, SENTENCE)}. "
        f"{markdown(rule.why, SENTENCE)} *{markdown(rule.remedy, SENTENCE)}*"
        for rule in rules_of(audit.findings)
    ]
    return "\n\n".join(["<details><summary>Why it matters, and what to do</summary>", *told, "</details>"])


def footer(audit: Audit) -> str:
    """Tool, policy, cost."""
    cost = cost_line(audit)
    parts = [f"{TOOL} {tool_version()}, policy <code>{policy_sha256(audit)[:SHORT]}</code>", *([cost] if cost else [])]
    return f"{'; '.join(parts)}. {NO_PROOF}"


def card_section(audit: Audit) -> str:
    """`## Audit` for the model card of the adapter that was merged from those that are fit."""
    rows = [
        [
            markdown_code(subject.name),
            markdown_code(weights_hash(subject)) if weights_hash(subject) else "",
            "left out" if audit.fails(subject.name) else "passed",
        ]
        for subject in audit.subjects
    ]
    fit = len(audit.fit)
    said = (
        f"Before this adapter was merged, {TOOL} {tool_version()} audited {plural(len(audit.subjects), 'source')}: "
        f"{fit} passed, {len(rows) - fit} left out. Policy <code>{policy_sha256(audit)}</code>, "
        f"which leaves out for findings of {audit.fail_on} severity and above. {NO_PROOF}"
    )
    parts = ["## Audit", said, *([table(("source", "sha256", "verdict"), rows)] if rows else [])]
    for subject in audit.subjects:
        found = [finding for finding in audit.failing if finding.adapter == subject.name]
        if found:
            parts += [f"Left out: {markdown_code(subject.name)}", "\n".join(card_lines(found))]
    return "\n\n".join(parts) + "\n"


def card_lines(found: Sequence[Finding]) -> list[str]:
    """A line for each finding of one source."""
    lines = [
        f"- {each.rule.id} {markdown(each.rule.name)} ({each.severity}): {markdown(each.message, SENTENCE)}"
        for each in found[:MOST]
    ]
    return lines + ([f"- and {plural(len(found) - MOST, 'more finding')}"] if len(found) > MOST else [])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
