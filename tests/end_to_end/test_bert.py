"""Experiment 8's recipe, launched: in one process and two, and under DeepSpeed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedllm_sec.config import resolve
from fedllm_sec.federation.experiment import run_experiment
from fedllm_sec.federation.world import World
from tests.launch import ROOT, assert_same_run, launch

RECIPE = ROOT / "recipes" / "bert_20news.py"


def arguments(bert):
    tiny = [f"model.path={bert}", "scale=local", "data.train=embedded", "data.test=embedded", "out=run"]
    tiny += ["data.train_limit=160", "data.test_limit=40", "federation.clients=8", "federation.rounds=2"]
    tiny += ["training.steps=2", "task.max_length=32", "model.lora.dropout=0.0"]
    tiny += ["training.optimizer=sgd", "training.learning_rate=0.1"]  # Adam flips the sign of what is next to zero
    for arm in ("attacked", "defended"):
        tiny += [f"arms.{arm}.attack_rounds.first=2", f"arms.{arm}.own_training.steps=3"]
    return tiny


def test_two_processes_write_the_bytes_of_one(bert, tmp_path, monkeypatch):
    """All three arms, with the backdoor and m-Krum; what honest clients sent in the first round was trained once."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    config = resolve(ROOT / "configs/exp08_bert_20news.yaml", [*arguments(bert), "training.batch_size=4"], "local")
    run_experiment(config, World())
    launch("cpu_2", *arguments(bert), "training.batch_size=4", cwd=tmp_path / "two", recipe=RECIPE)
    assert_same_run(tmp_path / "one/run", tmp_path / "two/run")
    first, second = (
        json.loads(path.read_text()) for path in sorted((tmp_path / "one/run/defended").glob("*/shared.json"))
    )
    assert (first["trained"], second["trained"]) == (0, 8)
    assert not (tmp_path / "one/run/shared").exists()
    summary = json.loads((tmp_path / "two/run/summary.json").read_text())
    assert {"accuracy", "macro_f1", "attack_success"} <= summary["attacked"].keys()
    assert (tmp_path / "two/run/report/index.html").is_file()


@pytest.fixture(scope="module")
def whole(bert, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    launch("cpu", *arguments(bert), "training.batch_size=8", cwd=place, recipe=RECIPE)
    return place / "run"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_trains_and_saves_the_head_whole(bert, whole, tmp_path, stage):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    launch(stage, *arguments(bert), "training.batch_size=4", cwd=tmp_path, recipe=RECIPE)
    start = load_file(whole / "benign/global_0000/adapter_model.safetensors")
    for path in sorted(whole.rglob("benign/**/adapter_model.safetensors")):
        expected, found = load_file(path), load_file(tmp_path / "run" / path.relative_to(whole))
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
        assert all(t.dtype == torch.float32 for t in found.values())
        if "global_0000" in str(path):
            continue
        head = [name for name in expected if ".lora_" not in name]
        assert len(head) == 4  # the classifier, and the pooler, which the checkpoint lacks
        for names in (head, list(expected)):
            error, update = (sum(float((x[n] - expected[n]).square().sum()) for n in names) for x in (found, start))
            assert error < 1e-4 * update, path


@pytest.mark.slow
def test_the_embedded_scale_plants_a_backdoor_and_m_krum_keeps_it_out(tmp_path):
    """The command of the README."""
    launch("cpu_2", "scale=tiny", "out=run", cwd=tmp_path, recipe=RECIPE)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["benign"]["accuracy"] > 0.75
    assert summary["attacked"]["attack_success"] > 0.5
    assert summary["defended"]["attack_success"] < 0.1
    assert summary["defended"]["accuracy"] > 0.7
