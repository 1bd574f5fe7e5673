"""DeepSpeed on two CPU processes, and a 4-bit base. Minutes: `make test-slow`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import launch

pytestmark = pytest.mark.slow
LONGER = [
    "federation.clients=4",
    "model.lora.dropout=0.0",
    "training.learning_rate=1e-3",
]  # 35 rows a client: no epoch ends


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """One process that does in one batch what two sharded ones do in two halves."""
    place = tmp_path_factory.mktemp("whole")
    launch("cpu", *small, *LONGER, "training.batch_size=8", cwd=place)
    return place / "run"


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_trains_what_one_process_trains_and_saves_it_whole(small, whole, tmp_path, stage):
    from tests.launch import ROOT

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    launch(stage, *small, *LONGER, "training.batch_size=4", cwd=tmp_path)
    sharded = tmp_path / "run"
    assert json.loads((sharded / "benign/environment.json").read_text())["sharded"] is True
    files = sorted(whole.rglob("benign/**/adapter_model.safetensors"))
    assert len(files) == 3 + 2 * 4
    for path in files:
        expected, found = load_file(path), load_file(sharded / path.relative_to(whole))
        start = load_file(whole / "benign/global_0000/adapter_model.safetensors")
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
        assert all(t.dtype == torch.float32 for t in found.values())
        if "global_0000" not in str(path):
            error = sum(float((found[n] - expected[n]).square().sum()) for n in expected)
            update = sum(float((expected[n] - start[n]).square().sum()) for n in expected)
            assert error < 1e-4 * update, path
    for arm in ("benign", "attacked", "defended"):
        losses = [
            [json.loads(line)["test_loss"] for line in (run / arm / "metrics.jsonl").read_text().splitlines()]
            for run in (whole, sharded)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_4_bit_base_trains_and_its_adapters_load(small, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    launch("cpu", *small, "model.load_in_4bit=true", cwd=tmp_path)
    run = tmp_path / "run"
    assert "4-bit" in json.loads((run / "benign/environment.json").read_text())["base"]
    losses = [json.loads(line)["test_loss"] for line in (run / "benign/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(small[0].partition("=")[2])
    loaded = PeftModel.from_pretrained(base, run / "benign/global_0002")
    weights = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if "lora_" in n}
    saved = load_file(run / "benign/global_0002/adapter_model.safetensors")
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
