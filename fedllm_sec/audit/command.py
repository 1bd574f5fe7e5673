"""`fedllm-sec audit`: from arguments to an audit, a report and an exit code."""

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedllm_sec.audit.findings import Audit, severity_named
from fedllm_sec.audit.policy import read_policy
from fedllm_sec.registry import did_you_mean
from fedllm_sec.terminal import console
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import write_text

if TYPE_CHECKING:
    from fedllm_sec.audit.behaviour import Probe

FORMATS = ("text", "json", "sarif", "html", "markdown")
WIDE = 160  # columns of a text report in a file


def audit(
    adapters: Annotated[
        list[Path], typer.Argument(help="PEFT adapter folders, .safetensors files, or a folder of them.")
    ],
    reference: Annotated[
        Path | None, typer.Option("--global", help="The adapter that the clients started from.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base model's folder, or its config.json.")] = None,
    trusted: Annotated[list[Path] | None, typer.Option(help="An adapter known to be good; repeat: 8 or more.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="A bank that --write-baseline made.")] = None,
    history: Annotated[
        Path | None, typer.Option(help="A folder of earlier rounds, or the folder of a run's arm.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="A YAML file: thresholds, expectations, suppressions.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Texts, one a line, to ask the model; needs --base.")] = None,
    words: Annotated[Path | None, typer.Option(help="Words, one a line, to try as triggers with --probe.")] = None,
    privacy: Annotated[
        bool | None, typer.Option(help="What updates reveal; default: with --base and --global.")
    ] = None,
    format: Annotated[str, typer.Option(help="text, json, sarif, html or markdown")] = "text",
    out: Annotated[Path | None, typer.Option(help="Where the report goes; default: stdout.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Write a Markdown summary here too, for a pull request.")] = None,
    fail_on: Annotated[str | None, typer.Option(help="low, medium, high or critical; default: the policy's.")] = None,
    no_fail: Annotated[
        bool, typer.Option("--no-fail", help="Only report: findings do not change the exit code.")
    ] = False,
    write_baseline: Annotated[
        Path | None, typer.Option(help="Make a bank of these adapters, which are trusted.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    memory: Annotated[str, typer.Option(help="For the factors of one module of all adapters.")] = "512MiB",
    seed: Annotated[int, typer.Option(help="Of the words that --probe draws.")] = 0,
) -> None:
    """Audit adapters before they are merged: malformed, smuggled, oversized, unlike the others.

    Exit codes, the same in every format: 0 clean, 1 findings at or above --fail-on, 2 bad input, 3 nothing to audit.
    """
    check_options(format, words, probe, privacy, base, reference, out, summary)
    rules = read_policy(policy)
    if fail_on is not None:
        rules = rules.model_copy(update={"fail_on": str(severity_named(fail_on))})
    result = audited(
        adapters, write_baseline, memory, reference=reference, base=base, trusted=trusted or (), bank=baseline,
        history=history, policy=rules, probe=read_texts(probe, words, seed),
        privacy=tells_privacy(reference, base) if privacy is None else privacy, device=device,
    )  # fmt: skip
    if result is None:
        console.print("there was nothing to audit", highlight=False)
        raise typer.Exit(3)
    report(result, format, out, summary)
    raise typer.Exit(0 if no_fail else result.exit_code)


def audited(adapters: Sequence[Path], write_baseline: Path | None, memory: str, **how: Any) -> Audit | None:
    """Audit what is there, and make a bank of it if wanted; None where there is nothing."""
    from fedllm_sec.audit.run import adapters_in, audit_adapters, make_bank

    found = adapters_in(adapters)
    if not found:
        return None
    result = audit_adapters(found, memory=memory, **how)
    if write_baseline is not None:
        make_bank(found, reference=how["reference"], memory=memory).save(write_baseline)
        console.print(f"baseline of {len(found)} adapters: {write_baseline}", highlight=False, markup=False)
    return result


def read_texts(probe: Path | None, words: Path | None, seed: int) -> "Probe | None":
    """What the model is to be asked; None: nothing."""
    if probe is None:
        return None
    from fedllm_sec.audit.behaviour import read_probe

    return read_probe(probe, words, seed)


def tells_privacy(reference: Path | None, base: Path | None) -> bool:
    """Whether all is given that it takes to tell what updates reveal."""
    return reference is not None and base is not None and base.is_dir() and any(base.glob("model*.safetensors"))


def check_options(
    format: str,
    words: Path | None,
    probe: Path | None,
    privacy: bool | None,
    base: Path | None,
    reference: Path | None,
    out: Path | None,
    summary: Path | None,
) -> None:
    """Refuse options that do not go together, before any work.

    Raises:
        InputError: naming them.
    """
    for path in (out, summary):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    if format not in FORMATS:
        raise InputError(f"there is no format {format!r}{did_you_mean(format, dict.fromkeys(FORMATS))}")
    if words is not None and probe is None:
        raise InputError("--words are tried in front of the texts of --probe: give both")
    if probe is not None and base is None:
        raise InputError("--probe asks a model: give --base FOLDER")
    if privacy and (base is None or reference is None):
        raise InputError("--privacy needs --base FOLDER and --global ADAPTER")


def report(result: Audit, format: str, out: Path | None, summary: Path | None) -> None:
    """Print or write the report."""
    from fedllm_sec.audit.output.markdown import audit_markdown

    if format == "text" and out is None:
        show(result, Console())
    else:
        text = rendered(result, format)
        if out is None:
            print(text)
        else:
            write_text(out, text)
            console.print(str(out), highlight=False, markup=False)
    if summary is not None:
        write_text(summary, audit_markdown(result))


def rendered(result: Audit, format: str) -> str:
    """The report as text."""
    if format == "json":
        from fedllm_sec.audit.output.as_json import audit_json

        return json.dumps(audit_json(result), indent=2, allow_nan=False) + "\n"
    if format == "sarif":
        from fedllm_sec.audit.output.sarif import audit_sarif

        return json.dumps(audit_sarif(result), indent=2, allow_nan=False) + "\n"
    if format == "html":
        from fedllm_sec.audit.output.html import audit_page

        return audit_page(result)
    if format == "markdown":
        from fedllm_sec.audit.output.markdown import audit_markdown

        return audit_markdown(result)
    buffer = StringIO()
    show(result, Console(file=buffer, width=WIDE))
    return buffer.getvalue()


def show(result: Audit, where: Console) -> None:
    """Print tables."""
    from fedllm_sec.audit.output.text import audit_tables

    for table in audit_tables(result):
        where.print(table)


def rules_table() -> Sequence[tuple[str, str, str, str]]:
    """Every rule, for `fedllm-sec list rules`: id, severity, what it says, why."""
    from fedllm_sec.audit.rules import CATALOGUE

    return [(rule.id, str(rule.severity), rule.says, rule.why) for rule in CATALOGUE]
