"""What end-to-end tests run on: a base of a few thousand random weights, and rows of the project's own world."""

import json

import pytest
import torch

from fedllm_sec.tasks.tiny_world import records


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Arguments of a run that takes seconds: a random GPT-NeoX folder, 140 training and 20 test rows, 2 rounds."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

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
