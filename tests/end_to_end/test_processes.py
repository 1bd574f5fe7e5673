"""The same bytes from one process and from two, and from a run that was killed and resumed."""

import json
import os
import signal
import subprocess
import time

import pytest

from fedllm_sec.federation.offline import aggregate_adapters
from tests.launch import assert_same_run, command, environment, launch


@pytest.fixture(scope="session")
def one_process(small, tmp_path_factory):
    place = tmp_path_factory.mktemp("one")
    launch("cpu", *small, "trackers=[tensorboard]", cwd=place)
    return place / "run"


def test_two_processes_give_the_same_bytes(small, one_process, tmp_path):
    launch("cpu_2", *small, "trackers=[tensorboard]", cwd=tmp_path)
    assert_same_run(one_process, tmp_path / "run")
    timing = json.loads((tmp_path / "run/benign/round_0001/timing.json").read_text())
    assert timing["processes"] == 2


@pytest.mark.parametrize(
    "moment", ["benign/round_0001/client_03", "attacked/round_0002/poisoned_*", "defended/global_0002"]
)
def test_a_killed_run_resumes_to_the_same_bytes(small, one_process, tmp_path, moment):
    arguments = [*small, "trackers=[tensorboard]"]
    with subprocess.Popen(
        command(None, *arguments), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "run").glob(moment)):
            assert process.poll() is None, process.stderr.read().decode()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "run/summary.json").exists()
    launch(None, *arguments, "--resume", cwd=tmp_path)
    assert_same_run(one_process, tmp_path / "run")


def test_trackers_get_the_same_metrics(one_process):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(one_process / "attacked" / "tensorboard"))
    events.Reload()
    rounds = [json.loads(line) for line in (one_process / "attacked/metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("test_loss")] == [0, 1, 2]
    for event, row in zip(events.Scalars("test_loss"), rounds, strict=True):
        assert event.value == pytest.approx(row["test_loss"], rel=1e-6)


def test_offline_aggregation_makes_of_the_folders_what_the_server_made(one_process, tmp_path):
    """`fedllm-sec aggregate` on what a round left gives the bytes of the next global adapter."""
    for arm, chain in (("benign", []), ("attacked", []), ("defended", [("krum", {"f": 1, "m": 2})])):
        folder = one_process / arm / "round_0002"
        clients = sorted(folder.glob("client_*"))
        counts = [json.loads((client / "client.json").read_text())["num_samples"] for client in clients]
        received = [p if (p := folder / f"poisoned_{c.name[-2:]}").exists() else c for c in clients]
        out = tmp_path / arm
        aggregate_adapters(received, one_process / arm / "global_0001", out, chain, num_samples=counts)
        expected = one_process / arm / "global_0002/adapter_model.safetensors"
        assert (out / "adapter_model.safetensors").read_bytes() == expected.read_bytes()


def test_a_round_has_what_the_design_says(one_process):
    arm = one_process / "defended"
    assert {"config.yaml", "environment.json", "metrics.jsonl", "global_0000", "round_0001"} <= {
        p.name for p in arm.iterdir()
    }
    claims = json.loads((arm / "round_0001/client_00/client.json").read_text())
    assert {"num_samples", "loss", "seconds", "seed"} <= claims.keys()
    assert json.loads((arm / "environment.json").read_text())["packages"]["torch"]
    assert (arm / "round_0001/krum/decision.json").is_file()
    assert not list(one_process.rglob("*.partial"))
