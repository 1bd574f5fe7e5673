"""The embedded BERT: the masking of the paper, the same bytes every time, and that it has learned something."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedllm_sec.tasks.tiny_posts import SUBJECTS, news
from fedllm_sec.training import tiny_bert


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_bert.make_tokenizer(news("pretraining", 20).texts, tiny_bert.SETTINGS.context)


def test_one_token_in_seven_is_asked_for_and_most_of_those_are_hidden(tokenizer):
    """Devlin et al. 2019, section 3.1: 15 %, of which 80 % [MASK], 10 % another token, 10 % as they were."""
    rows = tokenizer(news("pretraining", 20).texts, padding=True, return_tensors="pt").input_ids
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs, labels = tiny_bert.masked(rows, tokenizer)
    special = torch.isin(rows, torch.tensor(tokenizer.all_special_ids))
    asked = labels != tiny_bert.IGNORED
    assert not (asked & special).any()
    assert torch.equal(inputs[~asked], rows[~asked])
    assert torch.equal(labels[asked], rows[asked])
    assert float(asked.sum() / (~special).sum()) == pytest.approx(0.15, abs=0.01)
    hidden = inputs[asked] == tokenizer.mask_token_id
    same = inputs[asked] == rows[asked]
    assert float(hidden.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(same.float().mean()) == pytest.approx(0.1, abs=0.02)


def test_every_word_of_the_posts_is_a_token_and_any_trigger_can_be_spelt(tokenizer):
    unknown = tokenizer.unk_token_id
    words = [word for subject in SUBJECTS for word in subject]
    assert all(tokenizer.convert_ids_to_tokens(tokenizer(word)["input_ids"])[1:-1] == [word] for word in words)
    assert tokenizer.tokenize("CF mn3!") == ["c", "##f", "m", "##n", "##3", "!"]
    assert unknown not in tokenizer("cf mn bb tq")["input_ids"]


def test_the_same_bytes_every_time_and_transformers_loads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_bert, "SETTINGS", replace(tiny_bert.SETTINGS, posts=4, steps=3))
    heard = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tiny_bert.build_tiny_bert(tmp_path / name, on_step=lambda *told: heard.append(told))
    assert [told[:2] for told in heard] == [(1, 3), (2, 3), (3, 3)] * 2
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"model.safetensors", "tokenizer.json", "training.json"} <= set(files)
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", num_labels=20)
    assert AutoTokenizer.from_pretrained(tmp_path / "one").model_max_length == 128


def test_no_client_and_no_test_has_its_posts():
    pretraining = set(news("pretraining", 400).texts)
    assert not pretraining & {*news("train").texts, *news("test").texts}


@pytest.mark.slow
def test_it_learns_which_words_go_together(tmp_path):
    """Below the entropy of single words (5.3 nats): what a model that looks at no neighbour would pay."""
    tiny_bert.build_tiny_bert(tmp_path)
    assert json.loads((tmp_path / "training.json").read_text())["loss_at_the_end"] < 4.7
