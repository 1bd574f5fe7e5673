"""The recipe for TRL's users, with TRL itself, which is installed for this test alone: `make test-slow`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm_sec import open_updates
from fedllm_sec.tasks.tiny_world import records
from fedllm_sec.training.tiny_base import SETTINGS, train_tokenizer
from tests.launch import ROOT, environment


@pytest.mark.slow
def test_an_sft_trainer_submits_an_update_that_a_server_admits(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    if subprocess.run([*install, "trl>=1,<2"], check=False).returncode:
        pytest.skip("TRL cannot be installed here")
    rows = records(40, seed=5)
    tokenizer = train_tokenizer([row["question"] + " " + " ".join(row["contexts"]) for row in rows], SETTINGS)
    tokenizer.save_pretrained(tmp_path / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).save_pretrained(tmp_path / "base")
    lines = [json.dumps({"prompt": row["question"], "completion": " " + row["long_answer"]}) for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    script = [sys.executable, str(ROOT / "recipes/trl_client.py"), "base", "data.jsonl", "client_00"]
    paths = os.pathsep.join([str(ROOT), str(tmp_path / "packages")])
    done = subprocess.run(
        [*script, "--steps", "3", "--norm", "0.001"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "leakage/token_recall" in done.stdout
    claims = json.loads((tmp_path / "client_00/client.json").read_text())
    assert (claims["num_samples"], claims["steps"]) == (40, 3)
    assert claims["update_norm"] == pytest.approx(0.001, rel=1e-3)
    state = load_file(tmp_path / "client_00/adapter_model.safetensors")
    assert all(".lora_" in name for name in state)
    assert len(open_updates([tmp_path / "client_00"])) == 1
