"""The embedded base: the same bytes each time, and nothing left behind in torch's own state."""

from dataclasses import replace

import torch

from fedllm_sec.tasks.tiny_world import articles, records
from fedllm_sec.training import tiny_base
from fedllm_sec.training.cache import cached


def build(folder, monkeypatch):
    few = replace(tiny_base.SETTINGS, steps=3, train_articles=300, held_out_articles=20, tokenizer_articles=200)
    monkeypatch.setattr(tiny_base, "SETTINGS", few)
    folder.mkdir()
    heard = []
    tiny_base.build_tiny_base(folder, on_step=lambda *told: heard.append(told))
    assert [(step, steps) for step, steps, _ in heard] == [(1, 3), (2, 3), (3, 3)]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_have_the_same_bytes_and_leave_torch_as_it_was(tmp_path, monkeypatch):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = build(tmp_path / "first", monkeypatch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.rand(5)
    assert build(tmp_path / "second", monkeypatch) == first
    assert {"model.safetensors", "config.json", "tokenizer.json", "training.json"} <= first.keys()


def test_the_small_world_is_the_same_for_a_seed_and_answers_can_be_read_from_it():
    rows = records(2000, seed=3)
    assert rows == records(2000, seed=3)
    assert rows[:50] != records(50, seed=4)
    assert not {row["question"] for row in rows[:200]} <= {row["question"] for row in records(200, seed=1)}
    shares = [sum(row["final_decision"] == label for row in rows) / 2000 for label in ("yes", "no", "maybe")]
    assert all(abs(share - expected) < 0.04 for share, expected in zip(shares, (0.55, 0.34, 0.11), strict=True))
    for row in rows[:300]:  # where nothing else is reported, the p-value decides
        results = row["contexts"][2]
        if results.count("(p = ") == 1 and results.count(". ") == 0:
            p = float(results.split("(p = ")[1].split(")")[0])
            assert row["final_decision"] == ("yes" if p < 0.05 else "no" if p > 0.3 else "maybe")
    assert not any("Answer:" in text for text in articles(200, seed=3))  # the prompt is new to the base


def test_the_cache_makes_a_thing_once_and_never_half(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_SEC_CACHE", str(tmp_path))
    made = []

    def make(folder):
        made.append(folder)
        (folder / "thing").write_text("whole")

    def fail(folder):
        (folder / "thing").write_text("half")
        raise RuntimeError

    try:
        cached("other", fail)
    except RuntimeError:
        assert list(tmp_path.iterdir()) == []
    assert (cached("thing", make) / "thing").read_text() == "whole"
    cached("thing", make)
    assert len(made) == 1
