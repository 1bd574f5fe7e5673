"""One GPU: `make test-gpu`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import RECIPE, ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_run_on_a_gpu_with_a_bfloat16_base_and_the_server_on_the_gpu(small, tmp_path):
    import subprocess
    import sys

    config = str(ROOT / "configs/accelerate/gpu.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
    arguments = [*small, "model.dtype=bfloat16", "federation.device=cuda"]
    done = subprocess.run([*launcher, str(RECIPE), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    arm = tmp_path / "run/benign"
    assert "bfloat16" in json.loads((arm / "environment.json").read_text())["base"]
    losses = [json.loads(line)["test_loss"] for line in (arm / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    adapter = load_file(arm / "global_0002/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
