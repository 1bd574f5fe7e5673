"""Every server-side defense on a CUDA device gives the answer of the CPU, in both spaces; run with `make test-gpu`."""

import numpy as np
import pytest
import torch

from fedllm_sec import Round, aggregate, defense, open_updates
from tests.conftest import dense, random_states, write_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = [entry.name for entry in defense if entry.name not in ("fl_wbc", "soteria", "top_k", "update_noise")]
SHAPES = {"x.lora_A.weight": (4, 300), "x.lora_B.weight": (200, 4), "head": (70_001,)}


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("name", NAMES)
def test_the_device_does_not_matter(tmp_path, name, space):
    states = random_states(12, shapes=SHAPES)
    server = write_adapter(tmp_path / "global", states[11])
    clients = [write_adapter(tmp_path / f"client_{i:02d}", state) for i, state in enumerate(states[:11])]
    parameters = {"f": 2} if "f" in defense[name].parameters else {}

    def result(device):
        how = {"space": space, "device": device, "memory": "2MiB"}
        reference = open_updates([server], **how)
        trusted = open_updates(clients[:1], reference=server, **how)
        setting = Round(dir=tmp_path / device, reference=reference, trusted=trusted)
        setting.dir.mkdir()
        updates = open_updates(clients, reference=server, **how)
        assert next(iter(updates.blocks()))[1].device.type == device
        return dense(aggregate(updates, setting, [defense.build(name, parameters)]))

    np.testing.assert_allclose(result("cuda"), result("cpu"), rtol=1e-5, atol=1e-6)
