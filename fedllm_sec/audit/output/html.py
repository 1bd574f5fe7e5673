"""An audit as one page that needs nothing else: no script, no resource from anywhere."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import Any

import yaml

from fedllm_sec.audit.findings import Audit, Finding
from fedllm_sec.audit.output.facts import (
    FIT,
    NO_PROOF,
    TOOL,
    cost_line,
    headline,
    measured,
    norms_of,
    policy_sha256,
    rules_of,
    size_text,
    tool_version,
    verdict,
)
from fedllm_sec.audit.output.pictures import Picture, pictures
from fedllm_sec.audit.output.words import SENTENCE, html, jsonable
from fedllm_sec.reports.page import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST = 1000  # findings on a page
LOOK = """
body { max-width: 90rem; } th, td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; } code { font-size: 13px; }
.badge { padding: .1rem .5rem; border-radius: .3rem; white-space: nowrap; font-weight: 600; }
.critical { background: #8c1d18; color: white; } .high { background: #f9d9d6; } .medium { background: #fdeec8; }
.low { background: #e1eefa; } .suppressed { opacity: .6; } .more { color: #555; font-size: 14px; }
.wide img { max-width: 100%; height: auto; } .wide figure { margin: 2rem 0; } figcaption { text-align: left; }
.verdict { padding: .6rem 1rem; font-weight: 600; }
"""


def audit_page(audit: Audit) -> str:
    """The page's text."""
    style = "holds" if audit.exit_code == 0 else "fails"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>Adapter audit</title><style>{STYLE}{LOOK}</style></head><body>",
        f"<h1>Adapter audit</h1><p class='verdict {style}'>{escape(headline(audit))}</p><p>{NO_PROOF}</p>",
        findings_section(audit),
        adapters_section(audit),
        pictures_section(audit),
        notes_section(audit),
        policy_section(audit),
    ]
    return "\n".join(part for part in parts if part) + "\n</body></html>\n"


def findings_section(audit: Audit) -> str:
    """Each finding in a line; below, why each kind matters and what to do."""
    if not audit.findings:
        return ""
    head = row([cell(name, "th") for name in ("severity", "rule", "place", "measured", "what was found")])
    lines = "".join(finding_row(finding) for finding in audit.findings[:MOST])
    more = len(audit.findings) - MOST
    rest = f"<p>And {more:,} more: the other formats have them.</p>" if more > 0 else ""
    return f"<h2>Findings</h2><table>{head}{lines}</table>{rest}{rules_section(audit)}"


def finding_row(finding: Finding) -> str:
    """A line of the table."""
    path = finding.adapter if finding.file is None else f"{finding.adapter}/{finding.file}"
    tensor = f"<br><code>{html(finding.tensor)}</code>" if finding.tensor else ""
    more = f"<br><span class='more'>and {finding.places - 1:,} more</span>" if finding.places > 1 else ""
    passed = finding.suppressed
    why_passed = "" if passed is None else f"<br><em>suppressed: {html(passed, SENTENCE)}</em>"
    cells = [
        cell(f"<span class='badge {finding.severity}'>{finding.severity}</span>"),
        cell(f"<strong>{escape(finding.rule.id)}</strong><br>{escape(finding.rule.name)}"),
        cell(f"<code>{html(path)}</code>{tensor}{more}"),
        cell(html(measured(finding))),
        cell(f"{html(finding.message, SENTENCE)}{why_passed}"),
    ]
    return row(cells, "" if passed is None else "suppressed")


def rules_section(audit: Audit) -> str:
    """Why each rule that was found matters, and what to do."""
    head = row([cell(name, "th") for name in ("rule", "why it matters", "what to do")])
    lines = [
        row(
            [
                cell(f"<strong>{escape(rule.id)}</strong><br>{escape(rule.name)}"),
                cell(f"{escape(rule.says)}. {escape(rule.why)}"),
                cell(escape(rule.remedy)),
            ]
        )
        for rule in rules_of(audit.findings)
    ]
    return f"<h2>Why it matters, and what to do</h2><table>{head}{''.join(lines)}</table>"


def adapters_section(audit: Audit) -> str:
    """A line for each adapter, with the hashes of its files."""
    norms = norms_of(audit)
    head = row(
        [
            *(cell(name, "th") for name in ("adapter", "verdict")),
            *(cell(name, "th", "number") for name in ("tensors", "size", "update norm")),
            cell("SHA-256", "th"),
        ]
    )
    lines = []
    for subject in audit.subjects:
        word = verdict(audit, subject)
        norm = f"{norms[subject.name]:.4g}" if subject.name in norms else ""
        hashes = "<br>".join(f"<code>{html(digest)}</code> {html(name)}" for name, digest in subject.sha256.items())
        cells = [cell(html(subject.name)), cell(word, style="holds" if word == FIT else "fails")]
        cells += [cell(text, style="number") for text in (f"{subject.tensors:,}", size_text(subject.size), norm)]
        lines.append(row([*cells, cell(hashes, style="more")]))
    return f"<h2>Adapters</h2><table>{head}{''.join(lines)}</table>" if lines else ""


def pictures_section(audit: Audit) -> str:
    """All figures."""
    drawn = "".join(figure(picture) for picture in pictures(audit))
    return f"<h2>Beside each other</h2><div class='wide'>{drawn}</div>" if drawn else ""


def figure(picture: Picture) -> str:
    """A figure as part of the page; the same figure, the same bytes."""
    source = f"data:image/svg+xml;base64,{b64encode(svg(picture.figure)).decode()}"
    title, note = escape(picture.title), escape(picture.note)
    return (
        f"<figure><img alt='{title}' src='{source}'><figcaption><strong>{title}.</strong> {note}</figcaption></figure>"
    )


def svg(drawing: Any) -> bytes:
    """A matplotlib figure as SVG."""
    import matplotlib as mpl

    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "fedllm_sec"}):  # else the names inside are drawn at random
        drawing.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    return buffer.getvalue()


def notes_section(audit: Audit) -> str:
    """What was not looked at, and the cost."""
    lines = "".join(f"<li>{html(note, SENTENCE)}</li>" for note in audit.notes)
    cost = cost_line(audit)
    listed = f"<h2>Not looked at</h2><ul>{lines}</ul>" if lines else ""
    return listed + (f"<h2>Cost</h2><p>{html(cost, SENTENCE)}</p>" if cost else "")


def policy_section(audit: Audit) -> str:
    """What was used."""
    text = yaml.safe_dump(jsonable(audit.policy), sort_keys=False, width=110)
    by = f"{TOOL} {tool_version()}; SHA-256 of the policy: <code>{policy_sha256(audit)}</code>"
    return f"<h2>Policy</h2><p>{by}</p><pre>{escape(text)}</pre>"


def row(cells: Sequence[str], style: str = "") -> str:
    """A line of a table."""
    return f"<tr class='{style}'>{''.join(cells)}</tr>" if style else f"<tr>{''.join(cells)}</tr>"


def cell(content: str, kind: str = "td", style: str = "") -> str:
    """A cell; its content is HTML."""
    return f"<{kind} class='{style}'>{content}</{kind}>" if style else f"<{kind}>{content}</{kind}>"
