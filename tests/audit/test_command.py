"""`fedllm-sec audit` and `aggregate --audit`: exit codes, formats, files, and what is merged."""

import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedllm_sec.audit import RULES, audit_adapters
from fedllm_sec.cli import app, main
from fedllm_sec.federation.offline import aggregate_adapters
from fedllm_sec.updates.errors import InputError
from tests.audit import corpus
from tests.audit.corpus import WEIGHTS, state, with_file, write
from tests.audit.test_corpus import GLOBAL, group, plus, update_of
from tests.launch import ROOT

FORMATS = ("text", "json", "sarif", "html", "markdown")


@pytest.fixture
def folders(tmp_path):
    """Nine honest clients and one that is twenty times too long, and what they started from."""
    states = group(tmp_path)
    states[6] = plus(update_of(states, 6), 20)
    clients = [write(tmp_path / "uploads" / f"client_{i}", each) for i, each in enumerate(states)]
    return clients, write(tmp_path / "global", GLOBAL)


def run(*arguments):
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


@pytest.mark.parametrize("format", FORMATS)
def test_the_exit_code_does_not_depend_on_the_format(tmp_path, folders, format):
    clients, server = folders
    assert run(*clients[:6], "--global", server, "--format", format).exit_code == 0
    found = run(*clients, "--global", server, "--format", format)
    assert found.exit_code == 1
    assert "P003" in found.stdout
    assert run(*clients, "--global", server, "--format", format, "--fail-on", "high").exit_code == 0
    assert run(*clients, "--global", server, "--format", format, "--no-fail").exit_code == 0
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "--format", format).exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "no such file"),
        (["{client}", "--format", "xml"], "no format 'xml'"),
        (["{client}", "--fail-on", "severe"], "no severity 'severe'"),
        (["{client}", "--words", "w.txt"], "--probe"),
        (["{client}", "--probe", "p.txt"], "--base"),
        (["{client}", "--privacy"], "--base"),
        (["{client}", "--policy", "none.yaml"], "cannot be read"),
        (["{client}", "--global", "nowhere"], "nowhere"),
        (["{client}", "--memory", "3"], "memory"),
        (["{client}", "--baseline", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_told_with_code_2(folders, monkeypatch, capsys, arguments, error):
    filled = ["fedllm-sec", "audit", *(each.replace("{client}", str(folders[0][0])) for each in arguments)]
    monkeypatch.setattr("sys.argv", filled)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert error in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_adapters_stands_for_them_and_reports_go_to_files(tmp_path, folders):
    clients, server = folders
    out, summary = tmp_path / "report.json", tmp_path / "summary.md"
    done = run(clients[0].parent, "--global", server, "--format", "json", "--out", out, "--summary", summary)
    assert done.exit_code == 1
    told = json.loads(out.read_text())
    assert [each["name"] for each in told["adapters"]] == [client.name for client in clients]
    assert [each["adapter"] for each in told["findings"]] == ["client_6"]
    assert "P003" in summary.read_text()
    again = tmp_path / "again.json"
    run(clients[0].parent, "--global", server, "--format", "json", "--out", again)
    without = [{k: v for k, v in json.loads(path.read_text()).items() if k != "cost"} for path in (out, again)]
    assert without[0] == without[1]


def test_a_policy_is_obeyed_and_its_faults_are_told(tmp_path, folders):
    clients, server = folders
    policy = tmp_path / "audit.yaml"
    policy.write_text(yaml.safe_dump({"suppress": [{"rule": "P003", "reason": "a large data set"}]}))
    done = run(*clients, "--global", server, "--policy", policy, "--format", "json")
    assert done.exit_code == 0
    assert [each["suppressed"] for each in json.loads(done.stdout)["findings"]] == ["a large data set"]
    policy.write_text(yaml.safe_dump({"severity": {"P003": "low"}}))
    assert run(*clients, "--global", server, "--policy", policy).exit_code == 0
    policy.write_text(yaml.safe_dump({"thresholds": {"z": 1e9}}))
    assert run(*clients, "--global", server, "--policy", policy).exit_code == 0
    for bad in ("thresholds: {zz: 1}", "suppress: [{rule: P003}]", "severity: {P999: low}", "[1", "known_bad: [x]"):
        policy.write_text(bad)
        with pytest.raises(InputError, match="--policy"):
            CliRunner().invoke(app, ["audit", str(clients[0]), "--policy", str(policy)], catch_exceptions=False)


def test_a_baseline_is_written_and_used(tmp_path, folders):
    trusted = [write(tmp_path / f"trusted_{i}", state(i)) for i in range(9)]
    bank, odd = tmp_path / "bank.json", write(tmp_path / "odd", state(50, size=0.3))
    assert run(*trusted, "--write-baseline", bank).exit_code == 0
    assert json.loads(bank.read_text())["n"] == 9
    found = run(odd, "--baseline", bank, "--format", "json")
    assert [each["rule"] for each in json.loads(found.stdout)["findings"]] == ["W007"]
    options = [option for folder in trusted for option in ("--trusted", folder)]
    assert run(odd, *options).exit_code == 1


def test_all_rules_are_listed_and_documented():
    listed = json.loads(CliRunner().invoke(app, ["list", "rules", "--json"]).stdout)
    assert [each["id"] for each in listed] == list(RULES)
    text = (ROOT / "docs/audit.md").read_text()
    assert all(f"| {rule.id} |" in text for rule in RULES.values())


def test_what_fails_is_not_merged_and_it_is_told_why(tmp_path, folders):
    clients, server = folders
    with_file("setup.py", "import os")(clients[2])
    arguments = [*clients, "--global", server, "--audit", "--num-samples", ",".join("123456789") + ",10"]
    out = tmp_path / "merged"
    done = CliRunner().invoke(app, ["aggregate", *map(str, arguments), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    decision = json.loads((out / "decision.json").read_text())
    assert {name: [f["rule"] for f in found] for name, found in decision["audit"]["left_out"].items()} == {
        "client_2": ["FS013"],
        "client_6": ["P003"],
    }
    assert decision["clients"] == [f"client_{i}" for i in (0, 1, 3, 4, 5, 7, 8, 9)]
    assert decision["num_samples"] == [1, 2, 4, 5, 6, 8, 9, 10]
    kept = [client for i, client in enumerate(clients) if i not in (2, 6)]
    aggregate_adapters(kept, server, tmp_path / "by_hand", [], num_samples=[1, 2, 4, 5, 6, 8, 9, 10])
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "by_hand" / WEIGHTS).read_bytes()
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/base"
    assert front["library_name"] == "peft"
    for told in (decision["audit"]["sources"]["client_0"][WEIGHTS], "FS013", "P003"):
        assert told in card
    assert json.loads((out / "audit.json").read_text())["exit_code"] == 1
    assert audit_adapters([out], reference=server).exit_code == 0


def test_where_nothing_passes_nothing_is_written(tmp_path, folders):
    clients, server = folders
    for client in clients:
        corpus.ALONE["head of the base"][1](client)
    with pytest.raises(InputError, match=r"no adapter passed the audit:\nclient_0: KY001"):
        CliRunner().invoke(
            app,
            ["aggregate", *map(str, clients), "--global", str(server), "--out", str(tmp_path / "out"), "--audit"],
            catch_exceptions=False,
        )
    assert not (tmp_path / "out").exists()


def test_what_changes_after_its_audit_is_not_merged(tmp_path, folders, monkeypatch):
    from fedllm_sec.federation import offline

    clients, server = folders

    def meanwhile(*arguments, **options):
        passed = audited(*arguments, **options)
        (clients[0] / WEIGHTS).write_bytes((clients[6] / WEIGHTS).read_bytes())
        os.utime(clients[0] / WEIGHTS, ns=(1, 1))
        return passed

    audited = offline.audited
    monkeypatch.setattr(offline, "audited", meanwhile)
    from fedllm_sec.audit import Policy

    with pytest.raises(InputError, match="changed after it had been audited"):
        aggregate_adapters(clients, server, tmp_path / "out", [], audit=Policy())
    assert not (tmp_path / "out").exists()


def test_smuggled_weights_are_refused_at_every_intake(tmp_path):
    from fedllm_sec.updates import open_updates

    evil, server = write(tmp_path / "evil"), write(tmp_path / "server")
    corpus.ALONE["head of the base"][1](evil)
    assert "base_model.model.embed_out.weight" in load_file(evil / WEIGHTS)
    for how in ({}, {"reference": server}, {"space": "product"}, {"space": "product", "reference": server}):
        with pytest.raises(InputError, match=r"embed_out\.weight.*PEFT would load it over"):
            open_updates([evil], **how)


def test_an_adapter_of_nothing_but_base_weights_is_refused_too(tmp_path):
    from fedllm_sec.updates import open_updates

    evil = write(tmp_path / "evil", {"base_model.model.gpt_neox.final_layer_norm.weight": torch.ones(4)})
    with pytest.raises(InputError, match=r"final_layer_norm\.weight.*PEFT would load it over"):
        open_updates([evil])


@pytest.mark.parametrize("pattern", ["x?" * 5000, "a)|(b", "("])
def test_a_clients_pattern_cannot_hold_up_the_gate_either(tmp_path, pattern):
    from fedllm_sec.updates import open_updates

    client = write(tmp_path / "client", settings=corpus.config(alpha_pattern={pattern: 8}))
    with pytest.raises(InputError, match="alpha_pattern cannot be read"):
        open_updates([client], space="product")
