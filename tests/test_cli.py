"""The command line: machine output on stdout, prose on stderr, exit code 2 and nothing written for bad input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fedllm_sec.cli import main
from tests.updates.test_admit import A, set_value, truncate

PROGRAM = str(Path(sys.executable).parent / "fedllm-sec")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def fedllm_sec(monkeypatch, capsys):
    """Run the command line in this process, which spares it the imports."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedllm-sec", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Done(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def error_of(fedllm_sec):
    def run(*arguments):
        done = fedllm_sec(*arguments)
        assert done.returncode == 2, done
        assert done.stdout == ""
        return done.stderr

    return run


def test_the_installed_program_ends_with_the_right_code():
    done = subprocess.run([PROGRAM, "list", "defenses", "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)
    done = subprocess.run([PROGRAM, "report", "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nowhere: holds no run (no config.yaml)\n"


@pytest.mark.parametrize(("kind", "name"), [("attacks", "byzantine"), ("defenses", "krum"), ("tasks", "pubmedqa")])
def test_list(fedllm_sec, kind, name):
    assert name in fedllm_sec("list", kind).stdout
    entries = json.loads(fedllm_sec("list", kind, "--json").stdout)
    (entry,) = [entry for entry in entries if entry["name"] == name]
    assert "arXiv" in entry["paper"]


def test_aggregate(fedllm_sec, adapters, tmp_path):
    clients, server, _ = adapters
    set_value(50.0)(clients[4])
    out = tmp_path / "out"
    arguments = ["aggregate", *clients, "--global", server, "--defense", "krum", "-D", "f=1", "-Dm=2", "--out", out]
    done = fedllm_sec(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    decision = json.loads(done.stdout)
    assert decision == json.loads((out / "decision.json").read_text())
    assert decision["defenses"] == [{"name": "krum", "f": 1, "m": 2}]
    assert len(decision["decisions"]["krum"]["kept"]) == 2
    assert "client_04" not in decision["decisions"]["krum"]["kept"]
    assert (out / "adapter_config.json").read_bytes() == (server / "adapter_config.json").read_bytes()
    again = fedllm_sec(*arguments[:-1], tmp_path / "again")
    assert again.stdout.strip() == str(tmp_path / "again")
    assert "client_04" in again.stderr


def test_aggregate_writes_nothing_for_bad_input(error_of, adapters, tmp_path):
    clients, server, _ = adapters
    start = ["aggregate", *clients, "--global", server, "--out", tmp_path / "out"]
    for extra, message in [
        (["--defense", "krumm"], "unknown defense 'krumm'; did you mean 'krum'?"),
        (["--defense", "krum", "-D", "f=9"], "krum(f=9, m=1) needs n >= f + 3, got n=7"),
        (["--defense", "krum", "-D", "g=1"], "krum has no parameter 'g'"),
        (["--defense", "krum", "-D", "f"], "overrides are written key=value"),
        (["-D", "f=1"], "-D key=value goes behind the --defense"),
        (["--num-samples", "1,2"], "7 clients but 2 sample counts"),
        (["--num-samples", "a,b"], "give N,N,... or a JSON file"),
        (["--memory", "lots"], "cannot read 'lots'"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "use cpu or cuda"),
        (["--defense=krum", "-D", "f=9"], "krum(f=9, m=1) needs n >= f + 3, got n=7"),
        (["--defense", ""], "unknown defense ''"),
        (["--memory", "0"], "at least 1 MiB"),
    ]:
        assert message in error_of(*start, *extra).replace("\n", " "), extra
    truncate(clients[2])
    set_value(float("inf"))(clients[5])
    text = error_of(*start)
    assert "client_02" in text
    assert "client_05" in text
    assert A in text
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_an_output_that_exists_is_not_written_over(error_of, adapters, tmp_path):
    clients, server, _ = adapters
    (tmp_path / "out").mkdir()
    assert "exists already" in error_of("aggregate", *clients, "--global", server, "--out", tmp_path / "out")


def test_other_bad_input(error_of, tmp_path):
    assert "holds no run" in error_of("report", tmp_path)
    assert "no such configuration" in error_of("run", tmp_path / "none.yaml")
    assert "did you mean 'defenses'" in error_of("list", "defences")
    assert error_of("nonsense")
    assert "[/a]: no such file" in error_of("aggregate", "[/a]", "--global", "[b]", "--out", "o").replace("[b]", "[/a]")
    (tmp_path / "config.yaml").write_text("arms: {benign: {}}")
    (tmp_path / "benign").mkdir()
    (tmp_path / "benign" / "metrics.jsonl").write_text("{")
    assert "was damaged" in error_of("report", tmp_path)
    (tmp_path / "benign" / "metrics.jsonl").write_text("")
    assert "no round of this run is finished" in error_of("report", tmp_path)


def test_a_failed_aggregate_leaves_no_folders(error_of, adapters, tmp_path):
    clients, server, _ = adapters
    out = tmp_path / "a" / "b" / "c"
    assert "needs n >= f + 3" in error_of(
        "aggregate", *clients[:3], "--global", server, "--defense", "krum f=1", "--out", out
    )
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert "cannot make" in error_of("aggregate", *clients, "--global", server, "--out", tmp_path / "file" / "x")
