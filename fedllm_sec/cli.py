"""fedllm-sec: run, matrix, audit, aggregate, attack, reconstruct, list, report, import-fedml.

Machine output goes to stdout, progress and prose to stderr. Exit codes: 0 fine, 2 bad input or usage;
`audit` ends with 1 where it found something, and with 3 where there was nothing to audit.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

import fedllm_sec
from fedllm_sec.audit.command import audit, rules_table
from fedllm_sec.terminal import console
from fedllm_sec.updates.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def main() -> None:
    """Run the command line; an error that the user can mend is one line and exit code 2.

    So is what the system refuses: a name that is too long, a full disk, a folder that may not be written to.
    """
    try:
        app()
    except (InputError, OSError) as error:
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A configuration file, such as configs/exp09_pythia_pubmedqa.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, any field of the configuration.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
) -> None:
    """Run an experiment: every arm, from the same seeds, and a report."""
    from fedllm_sec.federation.command import run_recipe

    raise typer.Exit(run_recipe(config, overrides or [], resume=resume))


@app.command()
def matrix(
    config: Annotated[Path, typer.Argument(help="A configuration with attacks and defenses: configs/matrix_*.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, any field of the configuration.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one for each core or GPU.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a matrix that was cut off.")] = False,
) -> None:
    """Run every attack against every defense from several seeds, in parallel, and draw heat maps."""
    from fedllm_sec.federation.matrix.command import matrix_command

    raise typer.Exit(matrix_command(config, overrides or [], processes, resume=resume))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of a matrix.")],
    out: Annotated[Path | None, typer.Option(help="Where to; default: report/ in the first run.")] = None,
) -> None:
    """Draw a run's figures (PNG and SVG) and write one HTML page."""
    from fedllm_sec.reports.heat_map import matrix_report
    from fedllm_sec.reports.page import report as write_report

    if len(runs) > 1 or not (runs[0] / "matrix.json").is_file():
        print(write_report(runs, out))
    elif out is not None:
        raise InputError(f"--out {out}: the page of a matrix links to its cells and lies beside them; leave --out out")
    else:
        print(matrix_report(runs[0]))


app.command()(audit)


class ChainCommand(TyperCommand):
    """A command in which each `-D key=value` belongs to the `--defense` before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Fold `--defense krum -D f=1` into `--defense "krum f=1"`, which may also be written so."""
        folded: list[str] = []
        rest = iter(args)
        for arg in rest:
            if arg.startswith("--defense="):
                folded += ["--defense", arg.removeprefix("--defense=")]
            elif not arg.startswith("-D"):
                folded.append(arg)
            elif len(folded) < 2 or folded[-2] != "--defense":
                raise InputError("-D key=value goes behind the --defense that it belongs to")
            else:
                folded[-1] += " " + shlex.quote(arg[2:] or next(rest, ""))
        return super().parse_args(ctx, folded)


@app.command(cls=ChainCommand)
def aggregate(
    clients: Annotated[list[Path], typer.Argument(help="PEFT adapter folders or .safetensors files, one a client.")],
    reference: Annotated[Path, typer.Option("--global", help="The adapter that the clients started from.")],
    out: Annotated[Path, typer.Option(help="Where the aggregated adapter goes; must not exist.")],
    defense: Annotated[list[str] | None, typer.Option(help="A defense by name; repeat to chain.")] = None,
    parameter: Annotated[list[str] | None, typer.Option("-D", help="key=value of the --defense before it.")] = None,
    num_samples: Annotated[str | None, typer.Option(help="N,N,... or a JSON file; default: all alike.")] = None,
    sample_cap: Annotated[float | None, typer.Option(help="A claim counts as at most so many median claims.")] = None,
    trusted: Annotated[Path | None, typer.Option(help="An adapter that you trained yourself from --global.")] = None,
    space: Annotated[str, typer.Option(help="factors, or product: of LoRA pairs, B A")] = "factors",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    memory: Annotated[str, typer.Option(help="For the blocks, whatever the model's size.")] = "1GiB",
    seed: Annotated[int, typer.Option(help="Of defenses that draw at random.")] = 0,
    audited: Annotated[bool, typer.Option("--audit", help="Audit first; leave out what fails, and say why.")] = False,
    policy: Annotated[Path | None, typer.Option(help="Of the audit: a YAML file; implies --audit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision for machines.")] = False,
) -> None:
    """Aggregate clients' adapters under a chain of defenses into one adapter, streamed."""
    from fedllm_sec.audit import read_policy
    from fedllm_sec.federation.offline import aggregate_adapters, decision_table, parse_chain, parse_counts

    del parameter  # folded into `defense`
    decision = aggregate_adapters(
        clients,
        reference,
        out,
        parse_chain(defense or []),
        num_samples=parse_counts(num_samples),
        sample_cap=sample_cap,
        trusted=trusted,
        space=space,
        device=device,
        memory=memory,
        seed=seed,
        audit=read_policy(policy) if audited or policy is not None else None,
    )
    if as_json:
        print(json.dumps(decision, indent=2))
    else:
        console.print(decision_table(decision))
        print(out)


@app.command(cls=ChainCommand)
def attack(
    name: Annotated[str, typer.Argument(help="An attack that sends models: fedllm-sec list attacks.")],
    clients: Annotated[list[Path], typer.Argument(help="PEFT adapter folders or .safetensors files, one a client.")],
    reference: Annotated[Path, typer.Option("--global", help="The adapter that the clients started from.")],
    malicious: Annotated[str, typer.Option(help="N,N,...: places of the adversary's clients in the list, from 0.")],
    out: Annotated[Path, typer.Option(help="Where the adapter folders go; must not exist.")],
    parameter: Annotated[list[str] | None, typer.Option("-A", help="key=value of the attack; repeat.")] = None,
    visible: Annotated[str, typer.Option(help="What it sees: own, colluders, all, aggregator.")] = "all",
    defense: Annotated[list[str] | None, typer.Option(help="The server's, for --visible aggregator.")] = None,
    of_defense: Annotated[list[str] | None, typer.Option("-D", help="key=value of the --defense before it.")] = None,
    previous: Annotated[Path | None, typer.Option(help="The global adapter of the round before.")] = None,
    round: Annotated[int | None, typer.Option(min=1, help="Its number; default: 1, with --previous 2.")] = None,
    num_samples: Annotated[str | None, typer.Option(help="N,N,... or a JSON file; default: all alike.")] = None,
    space: Annotated[str, typer.Option(help="factors, or product: in which the server decides.")] = "factors",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    memory: Annotated[str, typer.Option(help="For the blocks, whatever the model's size.")] = "1GiB",
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done for machines.")] = False,
) -> None:
    """Rewrite some clients' adapters as an attack would, streamed: a folder to try your own aggregation on."""
    from fedllm_sec.config import override_tree
    from fedllm_sec.core import Round, knowledge_named
    from fedllm_sec.federation.offline import parse_chain, parse_counts
    from fedllm_sec.federation.offline_attack import Received, attack_adapters, attack_table

    del of_defense  # folded into `defense`
    report = attack_adapters(
        name,
        override_tree(parameter or []),
        Received(clients, reference, parse_counts(num_samples), space, device, memory),
        parse_places(malicious),
        out,
        visible=knowledge_named(visible),
        chain=parse_chain(defense or []),
        previous=previous,
        round=Round(round or (2 if previous else 1), seed=seed),
    )
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        console.print(attack_table(report))
        print(out)


@app.command()
def reconstruct(
    client: Annotated[Path, typer.Argument(help="A client's PEFT adapter folder or .safetensors file.")],
    reference: Annotated[Path, typer.Option("--global", help="The adapter that the client started from.")],
    base: Annotated[str | None, typer.Option(help="The base model: a folder, a GGUF file or a hub id.")] = None,
    method: Annotated[str, typer.Option(help="lora_tokens, span, revealing_labels: list attacks.")] = "lora_tokens",
    parameter: Annotated[list[str] | None, typer.Option("-A", help="key=value of the method; repeat.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="The client's: sgd, adam, adamw; default: a guess.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The client's; it matters for Adam.")] = None,
    steps: Annotated[int | None, typer.Option(help="The client's optimizer steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The client's.")] = 1,
    weight_decay: Annotated[float, typer.Option(min=0, help="The client's; of sgd it is found if need be.")] = 0.0,
    truth: Annotated[Path | None, typer.Option(help="The texts trained on (.txt, .json, .jsonl), to compare.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for people here.")] = None,
    memory: Annotated[str, typer.Option(help="For blocks, and for the vocabulary's vectors.")] = "1GiB",
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found for machines.")] = False,
) -> None:
    """Show what a client's adapter reveals of the texts that it was trained on, and how sure that is."""
    from fedllm_sec.config import override_tree
    from fedllm_sec.federation.offline_reconstruction import (
        Told,
        reconstruct_adapter,
        reconstruction_table,
        write_page,
    )

    how = Told(optimizer, learning_rate, steps, batch_size, weight_decay)
    chosen = override_tree(parameter or [])
    result = reconstruct_adapter(client, reference, base, method, chosen, how, truth=truth, memory=memory, seed=seed)
    if html is not None:
        write_page(result, html)
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        Console().print(reconstruction_table(result))


def parse_places(text: str) -> list[int]:
    """`"0,3"` -> [0, 3]."""
    try:
        return [int(place) for place in text.split(",")]
    except ValueError:
        raise InputError(f"--malicious {text!r}: give places in the list of clients, such as 0,3") from None


@app.command("import-fedml")
def import_fedml(
    source: Annotated[Path, typer.Argument(help="FedML's YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Where ours goes; default: <name>.yaml in this folder.")] = None,
) -> None:
    """Translate a FedML configuration into ours, and say what FedML would have ignored or crashed on."""
    from fedllm_sec.fedml import write_import

    print(write_import(source, out))


@app.command("list")
def list_methods(
    kind: Annotated[str, typer.Argument(help="attacks, defenses, tasks, models, procedures, optimizers or rules")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List what a configuration can name, with parameters and papers."""
    from fedllm_sec.federation.optimizers import optimizer
    from fedllm_sec.models import model
    from fedllm_sec.registry import did_you_mean, signature_text
    from fedllm_sec.tasks import task
    from fedllm_sec.training.procedures import procedure

    if kind == "rules":
        list_rules(as_json=as_json)
        return
    registries: dict[str, Any] = {"attacks": fedllm_sec.attack, "defenses": fedllm_sec.defense}
    registries |= {"tasks": task, "models": model, "procedures": procedure, "optimizers": optimizer}
    if kind not in registries:
        raise InputError(f"nothing to list under {kind!r}{did_you_mean(kind, [*registries, 'rules'])}")
    entries = list(registries[kind])
    if as_json:
        fields = [
            {"name": e.name, "summary": e.summary, "parameters": signature_text(e), "paper": e.paper} for e in entries
        ]
        print(json.dumps(fields, indent=2))
        return
    table = Table("name", "what it does", "parameters", "paper")
    for entry in entries:
        table.add_row(entry.name, entry.summary, signature_text(entry), entry.paper)
    Console().print(table)


def list_rules(*, as_json: bool) -> None:
    """The rules of `audit`."""
    rules = rules_table()
    if as_json:
        print(json.dumps([dict(zip(("id", "severity", "says", "why"), rule, strict=True)) for rule in rules], indent=2))
        return
    table = Table("rule", "severity", "what is wrong", "why it matters")
    for rule in rules:
        table.add_row(*rule)
    Console().print(table)
