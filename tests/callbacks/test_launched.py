"""Callbacks in several processes, under DeepSpeed and on a 4-bit base: what one process does, they do."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.callbacks.launched import SHORT
from tests.launch import ROOT, environment

ON_WEIGHTS = (
    "plain",
    "clip",
    "clip_steps",
    "noise",
    "replace",
    "freeze",
    "lazy",
    "disguised",
    "both",
    "probe",
    "audit",
)
ON_GRADIENTS = ("mask", "wbc")
REFUSED = {*ON_GRADIENTS, "hide"}


def run(folder, accelerate_config, *arguments):
    """Run all cases; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable]
    if accelerate_config:
        (folder / "configs").symlink_to(ROOT / "configs")
        launcher += ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(ROOT / "configs/accelerate" / f"{accelerate_config}.yaml")]
    script = [str(ROOT / "tests/callbacks/launched.py"), str(folder), *arguments]
    environ = {**environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *script], cwd=folder, capture_output=True, text=True, timeout=580, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def update(folder, case):
    return load_file(folder / case / "update.safetensors")


def flat(state):
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, the whole batch."""
    return run(tmp_path_factory.mktemp("alone"), None, "4")


def assert_same_everywhere(folder):
    for case in ON_WEIGHTS:
        digests = {path.read_text() for path in folder.glob(f"{case}.*.sha256")}
        assert len(digests) == 1, case


def assert_same_as_alone(folder, alone, cases):
    plain = flat(update(alone, "plain"))
    for case in cases:
        found, expected = flat(update(folder, case)), flat(update(alone, case))
        assert float((found - expected).norm()) < 1e-4 * float(plain.norm()), case
        claims, same = (json.loads((place / case / "client.json").read_text()) for place in (folder, alone))
        assert claims["num_samples"] == same["num_samples"] == 16
        assert claims["steps"] == same["steps"] == (1 if case in ("lazy", "disguised") else 4)
        assert claims["received_sha256"] == same["received_sha256"]


def assert_same_looks(folder, alone):
    """The main process looks, at what all saw."""
    (look,), (same,) = (json.loads((place / "probe.0.json").read_text()) for place in (folder, alone))
    assert look["leakage/tokens"] == same["leakage/tokens"] > 10
    assert look["leakage/token_recall"] == pytest.approx(same["leakage/token_recall"], abs=0.1)
    assert json.loads((folder / "probe.1.json").read_text()) == []
    assert json.loads((folder / "audit.0.json").read_text()) == {"2": [], "4": []}
    assert json.loads((folder / "audit.1.json").read_text()) == {}


def assert_each_does_what_it_says(alone):
    plain, received = flat(update(alone, "plain")), flat(load_file(alone / "lazy/adapter_model.safetensors"))
    assert float(plain.norm()) > 5 * SHORT
    assert float(flat(update(alone, "clip")).norm()) == pytest.approx(SHORT, rel=1e-4)
    assert float(flat(update(alone, "clip_steps")).norm()) == pytest.approx(SHORT, rel=1e-4)
    assert torch.allclose(flat(update(alone, "replace")), 3 * plain, atol=1e-6)
    noise = flat(update(alone, "noise")) - plain
    assert torch.allclose(flat(update(alone, "both")) - flat(update(alone, "clip")), noise, atol=1e-6)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.2)
    assert not flat(update(alone, "lazy")).any()
    assert received.any()
    assert not any(value.any() for name, value in update(alone, "freeze").items() if "lora_A" in name)
    assert json.loads((alone / "refused.0.json").read_text()) == {}


def test_alone_each_does_what_it_says(alone):
    assert_each_does_what_it_says(alone)


def test_two_processes_do_what_one_does(alone, tmp_path):
    """Under DistributedDataParallel, over gloo."""
    folder = run(tmp_path / "two", "cpu_2", "2")
    assert_same_everywhere(folder)
    assert_same_as_alone(folder, alone, (*ON_WEIGHTS, *ON_GRADIENTS))
    assert_same_looks(folder, alone)
    hidden = update(folder, "hide")["base_model.model.classifier.weight"]
    assert hidden.any()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_under_deepspeed_they_do_the_same_or_refuse(alone, tmp_path, stage):
    folder = run(tmp_path / stage, stage, "2")
    assert_same_everywhere(folder)
    assert_same_as_alone(folder, alone, ON_WEIGHTS)
    assert_same_looks(folder, alone)
    for rank in (0, 1):
        refused = json.loads((folder / f"refused.{rank}.json").read_text())
        assert refused.keys() == REFUSED
        assert all("train without DeepSpeed" in reason for reason in refused.values())
    assert not any((folder / case).exists() for case in REFUSED)


def test_on_a_4_bit_base_they_do_what_they_say(tmp_path):
    """The adapter's values are float32 there too."""
    pytest.importorskip("bitsandbytes")
    folder = run(tmp_path / "4bit", None, "4", "4bit")
    assert_each_does_what_it_says(folder)
