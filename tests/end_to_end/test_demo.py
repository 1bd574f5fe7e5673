"""`make demo`, as it stands in the Makefile: the three facts of the headline experiment, and what the run leaves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedllm_sec.updates import open_updates
from tests.launch import ROOT


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's folder, run by the Makefile's own command, with a fresh cache so that the base is trained too."""
    place = tmp_path_factory.mktemp("demo")
    printed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in printed.splitlines() if "launch" in line]
    words = line.replace(".venv/bin/accelerate", f"{sys.executable} -m accelerate.commands.accelerate_cli").split()
    words[words.index("launch")] = "launch --main_process_port 0"
    for name in ("recipes", "configs"):
        (place / name).symlink_to(ROOT / name)
    environment = {**os.environ, "FEDLLM_SEC_CACHE": str(place / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        " ".join(words), shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return place, done


def curve(place, arm, metric):
    lines = (place / "runs/demo" / arm / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[metric] for line in lines]


def test_the_base_is_a_language_model(demo):
    (report,) = demo[0].glob("cache/*/training.json")
    training = json.loads(report.read_text())
    assert training["held_out_loss"] < 0.25 * training["held_out_unigram_entropy"]
    assert training["weights"] > 2_000_000


def test_honest_training_visibly_improves_the_model(demo):
    losses, accuracies = curve(demo[0], "benign", "test_loss"), curve(demo[0], "benign", "accuracy")
    assert losses[-1] < 0.7 * losses[0]
    assert accuracies[-1] > curve(demo[0], "benign", "majority_accuracy")[-1] + 0.15


def test_the_attack_visibly_breaks_it(demo):
    attacked, benign = curve(demo[0], "attacked", "test_loss"), curve(demo[0], "benign", "test_loss")
    assert attacked[-1] > 2 * benign[-1]
    assert attacked[-1] > attacked[0]
    assert curve(demo[0], "attacked", "accuracy")[-1] < curve(demo[0], "benign", "accuracy")[-1] - 0.15


def test_m_krum_brings_back_what_the_attack_took(demo):
    benign, attacked, defended = (curve(demo[0], arm, "test_loss")[-1] for arm in ("benign", "attacked", "defended"))
    assert (attacked - defended) / (attacked - benign) >= 0.8


def test_the_byzantine_client_is_never_kept(demo):
    for row in map(json.loads, (demo[0] / "runs/demo/defended/metrics.jsonl").read_text().splitlines()[1:]):
        assert len(row["malicious"]) == 1
        assert len(row["decisions"]["krum"]["kept"]) == 2
        assert not set(row["malicious"]) & set(row["decisions"]["krum"]["kept"])


def test_all_arms_begin_from_the_same_adapter_and_the_adversary_is_the_same(demo):
    run = demo[0] / "runs/demo"
    starts = {
        (run / arm / "global_0000/adapter_model.safetensors").read_bytes() for arm in ("benign", "attacked", "defended")
    }
    assert len(starts) == 1
    assert list(run.glob("attacked/*/poisoned_*"))
    assert {p.name for p in run.glob("attacked/*/poisoned_*")} == {p.name for p in run.glob("defended/*/poisoned_*")}
    assert not list(run.glob("benign/*/poisoned_*"))


def test_clients_start_each_round_from_the_servers_adapter(demo):
    """The original sends the round-0 adapter for ever; ours moves, and clients stay near what they received."""
    run = demo[0] / "runs/demo/benign"
    for index in (2, 5):
        clients = sorted((run / f"round_{index:04d}").glob("client_*"))
        received, first = run / f"global_{index - 1:04d}", run / "global_0000"
        near = open_updates(clients, reference=received).gram.diagonal().sqrt()
        far = open_updates(clients, reference=first).gram.diagonal().sqrt()
        assert bool((near < far).all())


def test_the_server_averages_what_it_received(demo):
    run = demo[0] / "runs/demo/attacked"
    clients = [run / f"round_0001/client_{k:02d}" for k in range(7)]
    received = [
        run / f"round_0001/poisoned_{k:02d}" if (run / f"round_0001/poisoned_{k:02d}").exists() else clients[k]
        for k in range(7)
    ]
    counts = [json.loads((c / "client.json").read_text())["num_samples"] for c in clients]
    result = load_file(run / "global_0001/adapter_model.safetensors")
    for name, tensor in result.items():
        rows = torch.stack([load_file(path / "adapter_model.safetensors")[name].double() for path in received])
        mean = (rows * (torch.tensor(counts).double() / sum(counts))[:, None, None]).sum(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)


def test_it_closes_with_a_table_and_the_path_of_the_report(demo):
    place, done = demo
    assert re.search(r"defended\W+5\W+0\.\d+", done.stderr)
    page = place / done.stdout.strip().splitlines()[-1]
    assert page == place / "runs/demo/report/index.html"
    text = page.read_text()
    assert text.count("data:image/svg") >= 3
    for word in ("benign", "attacked", "defended", "Kept by the server", "class='client kept ", "learning_rate"):
        assert word in text
    for metric in ("test_loss", "accuracy", "macro_f1"):
        assert (page.parent / f"{metric}.png").stat().st_size > 5_000
    summary = json.loads((place / "runs/demo/summary.json").read_text())
    assert summary["benign"]["test_loss"] == curve(place, "benign", "test_loss")[-1]
    assert summary["wall_seconds"] > 0


def test_every_adapter_loads_with_peft(demo):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = demo[0] / "runs/demo"
    config = json.loads((run / "benign/global_0005/adapter_config.json").read_text())
    for folder in [
        run / "benign/global_0005",
        run / "benign/round_0003/client_04",
        *run.glob("defended/round_0002/poisoned_*"),
    ]:
        base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
        model = PeftModel.from_pretrained(base, folder)
        saved = load_file(folder / "adapter_model.safetensors")
        loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)


README_COMMANDS = [
    line.partition("  #")[0]
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize("command", README_COMMANDS)
def test_every_command_of_the_readme_works(command, demo):
    """In a folder where `make demo` was run. What needs a GPU, the hub or a clone is checked as far as it goes."""
    place = demo[0]
    program, *rest = command.split()
    if program in ("git", "cd", "pip"):
        return
    if program == "make":
        assert subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True).returncode == 0
    elif program == "accelerate" and "scale=tiny" in rest and "recipes/pythia_pubmedqa.py" in rest:
        environment = {**os.environ, "FEDLLM_SEC_CACHE": str(place / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        words = [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            "--main_process_port",
            "0",
            *rest[1:],
        ]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    elif program == "accelerate":
        from fedllm_sec.config import resolve

        overrides = [word for word in rest if "=" in word]
        scale = next((word.partition("=")[2] for word in overrides if word.startswith("scale=")), "tiny")
        for word in rest:
            assert "/" not in word or "=" in word or (ROOT / word).exists(), word
        (recipe,) = [word for word in rest if word.endswith(".py")]
        (config,) = (ROOT / "configs").glob(f"exp*_{Path(recipe).stem}.yaml")
        resolve(config, overrides, scale)
    else:
        assert program == "fedllm-sec"
        done = subprocess.run(
            [str(Path(sys.executable).parent / "fedllm-sec"), *expand(rest, place)],
            cwd=place,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_the_python_of_the_readme_works(demo, tmp_path, monkeypatch):
    _, example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)  # the first: callbacks
    run = demo[0] / "runs/demo/benign"
    for k in range(5):
        (tmp_path / f"client_{k:02d}").symlink_to(run / f"round_0001/client_{k:02d}")
    (tmp_path / "global").symlink_to(run / "global_0000")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert load_file("new_global.safetensors").keys() == load_file("global/adapter_model.safetensors").keys()


def expand(words, place):
    """What the shell would make of `client_*`."""
    return [
        str(path.relative_to(place)) if path else word
        for word in words
        for path in (sorted(place.glob(word)) if "*" in word else [None])
    ]
