"""Verdicts that were once wrong, and files that were once not told of: what a reviewer found."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm_sec import InputError
from tests.attacks.reconstruction.clients import look, lora_client, random_texts, recall_and_precision, tiny_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny_base(kind, folder / kind) for kind in ("bert", "llama")}


def rewritten(sent, change):
    """The same client, with other tensors."""
    path = sent.client / "adapter_model.safetensors"
    start = load_file(sent.reference / "adapter_model.safetensors")
    save_file({name: change(name, value, start[name]) for name, value in load_file(path).items()}, path)
    return sent


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_certain_while_a_weak_token_is_missing(seed, bases, tmp_path):
    """One module at rank 1: what is left of the rows is far below them, and far above their rounding."""
    texts = [[11, 44, 33, 11, 11, 22], *random_texts(1, 6, seed=seed)]
    sent = lora_client(tmp_path, bases["bert"], texts, kind="bert", r=1, targets=["key"])
    found = look(sent)
    assert not found.certain or {token.id for token in found.tokens} == sent.tokens


def test_a_token_with_a_twin_is_not_vouched_for(bases, tmp_path):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][999] = weights["model.embed_tokens.weight"][20]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    sent = lora_client(tmp_path / "client", base, [[7, 20, 30, 40, 50]], kind="llama")
    found = look(sent)
    assert {token.id for token in found.tokens} & {20, 999}
    assert not found.certain
    assert look(lora_client(tmp_path / "other", base, [[7, 21, 30, 40, 50]], kind="llama")).certain


def test_what_modules_tell_of_different_tokens_is_put_together(bases, tmp_path):
    """The query of a text's first token has no gradient in a causal model: there the value tells of it."""
    for seed in range(3):
        sent = lora_client(
            tmp_path / str(seed), bases["llama"], random_texts(1, 8, seed=seed), kind="llama", r=16, fresh=True
        )
        found = look(sent)
        assert recall_and_precision(found, sent) == (1.0, 1.0)
        assert found.certain


def test_trained_embeddings_that_a_head_may_share_are_not_read(bases, tmp_path):
    sent = lora_client(
        tmp_path, bases["bert"], random_texts(4, 8), kind="bert", saved=["word_embeddings", "classifier"]
    )
    assert "trained embeddings" in look(sent).why
    assert "trained embeddings" in look(sent, adapter={"task_type": "SEQ_CLS"}).why
    for path in (sent.client, sent.reference):
        file = path / "adapter_model.safetensors"
        save_file({name: value for name, value in load_file(file).items() if "classifier" not in name}, file)
    assert "trained embeddings" not in look(sent, adapter={"task_type": "MASKED_LM", "r": 4, "lora_alpha": 8}).why


@pytest.mark.parametrize("victim", [{}, {"optimizer": "adamw", "learning_rate": 0.5, "weight_decay": 1.0}])
def test_an_update_that_is_all_decay_tells_nothing(victim, bases, tmp_path):
    sent = lora_client(tmp_path, bases["bert"], [[5, 6, 7]], kind="bert")
    found = look(rewritten(sent, lambda name, value, start: 0.5 * start), **victim)
    assert (found.tokens, found.certain) == ((), False)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_an_update_of_zeros_tells_nothing(optimizer, bases, tmp_path):
    sent = lora_client(tmp_path, bases["bert"], [[5, 6, 7]], kind="bert")
    found = look(rewritten(sent, lambda name, value, start: start), optimizer=optimizer)
    assert (found.tokens, found.certain) == ((), False)


def test_a_base_of_another_width_is_told_of(bases, tmp_path):
    sent = lora_client(tmp_path, bases["llama"], [[5, 6, 7]], kind="llama")
    other = tiny_base("bert", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert config["hidden_size"] != 96
    names = {"model_type": "llama", "rms_norm_eps": 1e-6}
    weights = load_file(other / "model.safetensors")
    renamed = {
        "model.embed_tokens.weight": weights["bert.embeddings.word_embeddings.weight"],
        "model.layers.0.input_layernorm.weight": weights["bert.embeddings.LayerNorm.weight"],
    }
    save_file({name: value.clone() for name, value in renamed.items()}, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(names))
    with pytest.raises(InputError, match="has 192: give the base that was trained"):
        look(sent._replace(base=other))


@pytest.mark.parametrize("shape", [(8,), (2, 2, 4), (0, 192)])
def test_a_factor_of_another_form_is_told_of(shape, bases, tmp_path):
    sent = lora_client(tmp_path, bases["bert"], [[5, 6, 7]], kind="bert")
    for path in (sent.client, sent.reference):
        file = path / "adapter_model.safetensors"
        state = load_file(file)
        name = next(name for name in state if "layer.0" in name and "lora_A" in name)
        save_file(state | {name: torch.ones(shape) * (1 + (path == sent.client))}, file)
    with pytest.raises(InputError, match=r"shape|lora_A"):
        look(sent)


@pytest.mark.parametrize("index", [{}, [], {"weight_map": None}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map_is_told_of(index, bases, tmp_path):
    base = shutil.copytree(bases["bert"], tmp_path / "base")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    sent = lora_client(tmp_path / "client", bases["bert"], [[5, 6, 7]], kind="bert")
    with pytest.raises(InputError, match="has no weight_map"):
        look(sent._replace(base=base))


def test_the_names_of_berts_own_checkpoints_are_known(bases, tmp_path):
    """`gamma` and `beta`, as TensorFlow called them."""
    base = shutil.copytree(bases["bert"], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }
    save_file(old, base / "model.safetensors")
    sent = lora_client(tmp_path / "client", bases["bert"], random_texts(3, 6), kind="bert")
    assert recall_and_precision(look(sent._replace(base=base)), sent) == (1.0, 1.0)
