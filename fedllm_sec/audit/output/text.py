"""An audit for people at a terminal."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedllm_sec.audit.findings import Audit, Finding, Rule, Severity
from fedllm_sec.audit.output.facts import (
    FIT,
    NO_PROOF,
    cost_line,
    headline,
    measured,
    norms_of,
    plural,
    rules_of,
    size_text,
    verdict,
)
from fedllm_sec.audit.output.words import SENTENCE, plain

STYLES = {
    Severity.CRITICAL: "bold white on red",
    Severity.HIGH: "bold red",
    Severity.MEDIUM: "yellow",
    Severity.LOW: "cyan",
}
MOST = 200  # findings in the table; a terminal is no place for more


def audit_tables(audit: Audit) -> list[RenderableType]:
    """What `rich` prints: findings, adapters, why and what to do, notes, cost."""
    if not audit.subjects:
        return [Text(headline(audit), "yellow"), *notes(audit)]
    if not audit.findings:
        clean = "1 adapter is clean." if len(audit.subjects) == 1 else f"{len(audit.subjects):,} adapters are clean."
        return [Text(f"{clean} {NO_PROOF}", "green"), *notes(audit)]
    shown: list[RenderableType] = [findings_table(audit)]
    if len(audit.findings) > MOST:
        shown.append(Text(f"{plural(len(audit.findings) - MOST, 'more finding')}: the other formats have them."))
    told = [explained(rule) for rule in rules_of(audit.findings)]
    return [*shown, adapters_table(audit), Text("Why it matters, and what to do", "bold"), *told, *notes(audit)]


def findings_table(audit: Audit) -> Table:
    """A line for each finding, the gravest first; those that are let pass are dim."""
    table = Table(title=headline(audit), title_justify="left", title_style="bold")
    table.add_column("severity", no_wrap=True)
    for name in ("rule", "place", "measured", "what was found"):
        table.add_column(name, overflow="fold")
    for finding in audit.findings[:MOST]:
        words = Text(plain(finding.message, SENTENCE))
        if finding.suppressed is not None:
            words.append(f"\nsuppressed: {plain(finding.suppressed, SENTENCE)}", "italic")
        row = (rule_text(finding.rule), Text(place(finding)), Text(measured(finding)), words)
        severity = Text(str(finding.severity), "" if finding.suppressed is not None else STYLES[finding.severity])
        table.add_row(severity, *row, style="dim" if finding.suppressed is not None else None)
    return table


def place(finding: Finding) -> str:
    """Where, each part of it on a line of its own."""
    path = finding.adapter if finding.file is None else f"{finding.adapter}/{finding.file}"
    lines = [plain(path), *([plain(finding.tensor)] if finding.tensor else [])]
    return "\n".join(lines + ([f"and {finding.places - 1:,} more"] if finding.places > 1 else []))


def rule_text(rule: Rule) -> Text:
    """`KY001` and below it its name."""
    return Text(rule.id, "bold").append(f"\n{rule.name}", "not bold")


def adapters_table(audit: Audit) -> Table:
    """A line for each adapter."""
    norms = norms_of(audit)
    table = Table(title="Adapters", title_justify="left", title_style="bold")
    table.add_column("adapter", overflow="fold")
    for name in ("tensors", "size", *(["update norm"] if norms else [])):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for subject in audit.subjects:
        cells = [f"{subject.tensors:,}", size_text(subject.size)]
        if norms:
            cells.append(f"{norms[subject.name]:.4g}" if subject.name in norms else "")
        word = verdict(audit, subject)
        shown = Text(word, "green" if word == FIT else "red")
        table.add_row(Text(plain(subject.name)), *map(Text, cells), shown)
    return table


def explained(rule: Rule) -> Text:
    """Why a rule matters, and what to do."""
    return Text(f"{rule.id} {rule.name}: ", "bold").append(f"{rule.says}. {rule.why} ", "not bold").append(rule.remedy)


def notes(audit: Audit) -> list[Text]:
    """What was not looked at, and the cost."""
    lines = [Text(f"Note: {plain(note, SENTENCE)}", "dim") for note in audit.notes]
    cost = cost_line(audit)
    return [*lines, *([Text(cost, "dim")] if cost else [])]
