"""One self-contained HTML page: table, claims, figures, who was kept in each round, and the configuration."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from os.path import relpath
from pathlib import Path

from fedllm_sec.reports.claims import HEAD, READING, Finding, claims_markdown, findings, origin
from fedllm_sec.reports.figure import NO_CURVE, TITLES, draw, seeds_note
from fedllm_sec.reports.read import Curve, Group, Run, grouped, label, read_run
from fedllm_sec.reports.table import rows
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); }
.figures img { width: 100%; height: auto; }
figure { margin: 0; } figcaption { color: #555; font-size: 14px; text-align: center; }
.kept { background: #d8f0e2; } .malicious { color: #b3261e; font-weight: 600; }
td.client { text-align: center; }
.claims th, .claims td { text-align: left; } .claims td:last-child { white-space: nowrap; font-weight: 600; }
.holds { background: #d8f0e2; } .fails { background: #f9d9d6; } .some { background: #fdeec8; } .unknown { color: #666; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
"""


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write figures, page and `claims.md` (if anything is claimed) of one or more runs, and return the page.

    Runs of one configuration, each from a seed of its own, are one curve an arm: their mean, and a band.

    Args:
        folders: of the runs.
        out: where to; by default `report/` in the first run's folder.

    Raises:
        InputError: if a folder holds no run.
    """
    groups = grouped([read_run(folder) for folder in folders])
    claimed = claims_markdown(groups)
    runs = [run for group in groups for run in group.runs]
    out = out or folders[0] / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error}") from None
    known = set().union(*(curve.measured for run in runs for curve in run.curves))
    measured = [metric for metric in TITLES if metric in known and metric not in NO_CURVE]
    drawings = [image(TITLES[metric], draw(groups, metric, out)[1]) for metric in measured]
    splits = [run.folder / "split.svg" for run in runs]
    drawings += [image("Who has which examples", split) for split in splits if split.is_file()]
    for run in runs:
        samples = [(curve.name, run.folder / curve.name / "samples.png") for curve in run.curves]
        drawings += [image(f"{run.folder.name}: what {name} makes", path) for name, path in samples if path.is_file()]
        drawings += [image(f"{run.folder.name}: {told}", path) for told, path in last_looks(run, "png")]
    if claimed:
        write_text(out / "claims.md", claimed)
    write_text(out / "index.html", page(groups, drawings, pages_of_looks(runs, out)))
    return out / "index.html"


def last_looks(run: Run, kind: str) -> list[tuple[str, Path]]:
    """The last file of a kind (`png`, `html`) in which each arm shows what a curious server found; what, and where."""
    found = []
    for curve in run.curves:
        paths = sorted((run.folder / curve.name).glob(f"round_*/reconstructed/*.{kind}"))
        for path in paths[-1:]:
            index = int(path.parts[-3].rpartition("_")[2])
            found.append((f"what {curve.name} finds in the update of {path.stem}, round {index}", path))
    return found


def pages_of_looks(runs: Sequence[Run], out: Path) -> str:
    """Links to the pages of the last texts that curious servers found; '' where there are none."""
    looks = [(f"{run.folder.name}: {told}", path) for run in runs for told, path in last_looks(run, "html")]
    links = "".join(f"<li><a href='{escape(relpath(path, out))}'>{escape(told)}</a></li>" for told, path in looks)
    return f"<h2>Texts that were found in updates</h2><ul>{links}</ul>" if links else ""


def image(title: str, drawing: Path) -> str:
    """A drawing (SVG or PNG) as part of the page, its names its own, and what it shows below it."""
    kind = {".svg": "svg+xml", ".png": "png"}[drawing.suffix]
    source = f"data:image/{kind};base64,{b64encode(drawing.read_bytes()).decode()}"
    return f"<figure><img alt='{escape(title)}' src='{source}'><figcaption>{escape(title)}</figcaption></figure>"


def page(groups: Sequence[Group], drawings: Sequence[str], looks: str = "") -> str:
    """The page's text; `looks` are links to pages of their own."""
    title = ", ".join(group.name for group in groups)
    runs = [run for group in groups for run in group.runs]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        html_table(*rows(groups)),
        majority_line(runs[0].curves[0]),
        f"<p>{seeds_note(groups)}</p>",
        claims_section(groups),
        f"<div class='figures'>{''.join(drawings)}</div>",
        looks,
    ]
    for run in runs:
        parts += [kept_table(curve, label(run, curve.name, len(runs) == 1)) for curve in run.curves]
    parts += [configuration(group.runs[0], group.runs[1:]) for group in groups]
    return "\n".join(parts) + "</html>\n"


def claims_section(groups: Sequence[Group]) -> str:
    """What is claimed, ours, and whether it holds; '' where nothing is claimed."""
    found = [(group, findings(group)) for group in groups]
    tables = [
        f"<h3>{escape(group.name)}: {escape(origin(group))}</h3>{claims_html(some)}" for group, some in found if some
    ]
    return f"<h2>Claims</h2><p>{escape(READING)}</p>{''.join(tables)}" if tables else ""


def claims_html(found: Sequence[Finding]) -> str:
    """A group's table of claims: green holds, red fails, yellow where the seeds do not agree."""
    classes = {"holds": "holds", "fails": "fails", "not measured": "unknown"}
    head = "".join(f"<th>{escape(title)}</th>" for title in HEAD)
    lines = ""
    for finding in found:
        *cells, verdict = finding.cells
        lines += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines += f"<td class='{classes.get(verdict, 'some')}'>{escape(verdict)}</td></tr>"
    return f"<table class='claims'><tr>{head}</tr>{lines}</table>"


def configuration(run: Run, others: Sequence[Run]) -> str:
    """What ran; of the runs of one experiment, the first one's, for they differ in seed and folder alone."""
    names = ", ".join(other.folder.name for other in others)
    also = f"<p>That of {escape(names)} differs in seed and folder alone.</p>" if others else ""
    return f"<h2>Configuration of {escape(run.folder.name)}</h2>{also}<pre>{escape(run.config)}</pre>"


def majority_line(curve: Curve) -> str:
    """What the accuracy is to be compared with; '' for a task without labels."""
    share = curve.last.get("majority_accuracy")
    return "" if share is None else f"<p>Always answering the commonest label: {share:.1%} accuracy.</p>"


def html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A plain table."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{top}</tr>{lines}</table>"


def kept_table(curve: Curve, name: str) -> str:
    """Who was kept in each round, and who was malicious; '' for an arm whose server keeps everybody."""
    decided = [row for row in curve.rounds if any("kept" in decision for decision in row.get("decisions", {}).values())]
    if not decided:
        return ""
    clients = list(decided[0]["num_samples"])
    lines = "".join(round_line(row, clients) for row in decided)
    head = "".join(f"<th>{escape(client)}</th>" for client in clients)
    return (
        f"<h2>Kept by the server: {escape(name)}</h2><p>Green: kept; the number is the defense's score, or "
        f"the client's weight; <span class='malicious'>red: malicious</span>, which no defense is told.</p>"
        f"<table><tr><th>round</th>{head}</tr>{lines}</table>"
    )


def round_line(row: dict[str, object], clients: Sequence[str]) -> str:
    """One round of the table of who was kept."""
    decisions = row["decisions"]
    assert isinstance(decisions, dict)
    decision = next(d for d in decisions.values() if "kept" in d)
    malicious, scores = row["malicious"], decision.get("scores") or decision.get("weights") or {}
    assert isinstance(malicious, list)
    cells = [
        f"<td class='client {'kept' if client in decision['kept'] else ''} "
        f"{'malicious' if client in malicious else ''}'>{score_text(scores.get(client))}</td>"
        for client in clients
    ]
    return f"<tr><td>{row['round']}</td>{''.join(cells)}</tr>"


def score_text(score: float | None) -> str:
    """`12.3`; a client that was refused, or a defense without scores, has none."""
    return "" if score is None else f"{score:.3g}"
