"""The words of a batch from adapters that real training made: of small random models here, of real ones in
`test_real_models`.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from fedllm_sec import InputError
from fedllm_sec.attacks.reconstruction.dictionary import Checkpoint, dictionary
from fedllm_sec.attacks.reconstruction.families import FAMILIES, family_of
from tests.attacks.reconstruction.clients import (
    TINY,
    VOCABULARY,
    Sent,
    adapted,
    look,
    lora_client,
    random_texts,
    recall_and_precision,
    tiny_base,
    trained,
)

KINDS = sorted(TINY)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny_base(kind, folder / kind) for kind in KINDS}


def model_of(kind):
    """A small random model of any family, and dropout off."""
    if kind in TINY:
        return TINY[kind]()
    names = {"distilbert": {"dim": 64, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}}
    usual = {"hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 1}
    usual |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    shape = names.get(kind, usual)
    return AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **shape))


def inputs_of(kind, base, ids):
    """What the first layer's reader is given, as the model itself computes it: (length, d)."""
    model = model_of(kind)
    model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    model.tie_weights()
    model.eval()
    caught = []
    reader = next(module for name, module in model.named_modules() if FAMILIES[kind].reads(name))
    reader.register_forward_pre_hook(lambda module, given: caught.append(given[0][0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    return caught[0].double()


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_atoms_are_what_the_model_itself_gives_its_first_layer(kind, tmp_path):
    """Where positions are added, inputs are combinations of the atoms of token, position, segment and bias."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_of(kind)
        for value in model.parameters():
            value.data += 0.1 * torch.randn(value.shape)  # norms and biases start at one and zero
    model.save_pretrained(tmp_path)
    ids = [7, 1999, 12, 5, 300]
    seen = inputs_of(kind, tmp_path, ids)
    atoms = dictionary(Checkpoint(tmp_path), 2**20)
    assert atoms.size == VOCABULARY
    if not len(atoms.positions):
        assert atoms.atoms(ids).numpy() == pytest.approx(seen.numpy(), abs=1e-5)
        return
    for place, (token, vector) in enumerate(zip(ids, seen, strict=True)):
        parts = torch.cat([atoms.atom(token)[None], atoms.positions[place : place + 1], atoms.constants])
        solved = torch.linalg.lstsq(parts.T, vector[:, None], driver="gelsd")  # segments may be parallel
        assert float((parts.T @ solved.solution - vector[:, None]).norm() / vector.norm()) < 1e-5
        assert float(solved.solution[0]) == pytest.approx(float(solved.solution[1]), rel=1e-3)  # one scale for both


def test_every_family_is_one_that_transformers_has():
    from transformers import CONFIG_MAPPING

    assert set(FAMILIES) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_are_found_from_a_rank_far_below_their_number(kind, bases, tmp_path):
    rate = 10.0 if kind == "bert" else 0.1  # its gradients are small here, and would be lost in the rounding of A
    sent = lora_client(tmp_path, bases[kind], random_texts(4, 8), kind=kind, r=2, rate=rate)
    found = look(sent)
    assert len(sent.tokens) > 3 * found.rank
    assert recall_and_precision(found, sent) == (1.0, 1.0)
    assert found.certain
    assert found.certificate > 1 - 1e-4
    assert found.sentences == ()


def test_memory_for_atoms_is_bounded_and_changes_nothing(bases, tmp_path):
    sent = lora_client(tmp_path, bases["llama"], random_texts(4, 8), kind="llama")
    small, large = look(sent, memory="1MiB"), look(sent)
    assert {token.id for token in small.tokens} == {token.id for token in large.tokens} == sent.tokens


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_one_step_of_adam_is_as_open_as_one_of_sgd(optimizer, bases, tmp_path):
    how = {"optimizer": optimizer, "rate": 3e-4}
    sent = lora_client(tmp_path, bases["bert"], random_texts(3, 6), kind="bert", **how)
    assert recall_and_precision(look(sent, optimizer=optimizer, learning_rate=3e-4), sent) == (1.0, 1.0)


@pytest.mark.parametrize("steps", [1, 5])
def test_weight_decay_hides_nothing_told_or_not(steps, bases, tmp_path):
    """lr * wd = 0.01: a hundredth of A itself is added in every step."""
    how = {"decay": 0.1, "steps": steps}
    sent = lora_client(tmp_path, bases["llama"], random_texts(4, 8), kind="llama", **how)
    for told in ({"weight_decay": 0.1}, {}):
        assert recall_and_precision(look(sent, steps=steps, **told), sent) == (1.0, 1.0), told


def test_decoupled_weight_decay_is_taken_out(bases, tmp_path):
    how = {"optimizer": "adamw", "rate": 3e-4, "decay": 0.1}
    sent = lora_client(tmp_path, bases["bert"], random_texts(3, 6), kind="bert", **how)
    told = look(sent, optimizer="adamw", learning_rate=3e-4, weight_decay=0.1)
    assert recall_and_precision(told, sent) == (1.0, 1.0)
    assert recall_and_precision(look(sent, optimizer="adamw", learning_rate=3e-4), sent)[0] < 0.9


def test_a_fresh_adapter_tells_by_b_as_long_as_tokens_are_fewer_than_the_rank(bases, tmp_path):
    """After one step from B = 0, A is as it was, to the bit."""
    for words, r, expected in ((7, 16, 1.0), (24, 16, 0.0)):
        texts = [random_texts(1, words, seed=words)[0][:words]]
        sent = lora_client(tmp_path / f"{words}", bases["llama"], texts, kind="llama", r=r, fresh=True)
        change = load_file(sent.client / "adapter_model.safetensors")
        start = load_file(sent.reference / "adapter_model.safetensors")
        assert all(torch.equal(change[name], start[name]) for name in change if "lora_A" in name)
        found = look(sent)
        assert recall_and_precision(found, sent) == (expected, expected), (words, r)
        assert found.certain == bool(expected)


@pytest.mark.parametrize(
    ("kind", "optimizer", "rate", "r"),
    [("bert", "sgd", 10.0, 16), ("gpt2", "sgd", 0.1, 16), ("gpt2", "adam", 3e-4, 32)],
)
def test_b_tells_tokens_to_which_positions_are_added(kind, optimizer, rate, r, bases, tmp_path):
    """A sentence has as many inputs as tokens, though tokens, positions and the bias have more atoms than the rank."""
    how = {"optimizer": optimizer, "rate": rate, "frozen": "lora_A", "r": r}
    for words, read in ((12, True), (r + 1, False)):
        texts = [random_texts(1, 2 * words, seed=words)[0][:words] + [77] * (kind == "gpt2")]
        sent = lora_client(tmp_path / f"{words}", bases[kind], texts, kind=kind, **how)
        found = look(sent, optimizer=optimizer, learning_rate=rate)
        assert recall_and_precision(found, sent) == ((1.0, 1.0) if read else (0.0, 0.0)), words
        assert found.certain == read
        assert not read or found.rank == words


def test_what_chance_may_have_brought_is_not_told(bases, tmp_path):
    """Four directions that no token uses, and the rounding of a step of Adam: more pairs pass than there are."""
    sent = lora_client(
        tmp_path,
        bases["gpt2"],
        [[*range(100, 112), 7]],
        kind="gpt2",
        r=16,
        optimizer="adam",
        rate=3e-4,
        frozen="lora_A",
    )
    found = look(sent, optimizer="adam", learning_rate=3e-4)
    print(found)
    assert (found.tokens, found.certain) == ((), False)


def test_two_steps_from_a_fresh_adapter_tell_everything(bases, tmp_path):
    sent = lora_client(tmp_path, bases["llama"], random_texts(4, 8), kind="llama", fresh=True, steps=2, rate=1.0)
    assert recall_and_precision(look(sent, steps=2), sent) == (1.0, 1.0)


def test_a_frozen_a_blocks_it(bases, tmp_path):
    """FFA-LoRA: only B is trained, and B tells of fewer tokens than the rank."""
    sent = lora_client(tmp_path, bases["llama"], random_texts(4, 8), kind="llama", steps=3, frozen="lora_A")
    found = look(sent, steps=3)
    assert (found.tokens, found.certain, found.certificate) == ((), False, 0.0)


def test_the_last_token_of_a_causal_text_is_read_by_nobody(bases, tmp_path):
    texts = random_texts(3, 6, seed=4)
    sent = lora_client(tmp_path, bases["gpt_neox"], texts, kind="gpt_neox")
    found = {token.id for token in look(sent).tokens}
    assert found == sent.tokens
    assert not found & ({text[-1] for text in texts} - sent.tokens)


def test_noise_reveals_nothing_and_another_batch_only_what_it_shares(bases, tmp_path):
    sent = lora_client(tmp_path, bases["bert"], random_texts(4, 8), kind="bert")
    other = random_texts(4, 8, seed=1)
    shared = {token for text in other for token in text} & sent.tokens
    assert {token.id for token in look(sent).tokens} & {token for text in other for token in text} == shared
    state = load_file(sent.client / "adapter_model.safetensors")
    start = load_file(sent.reference / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: start[name] + (value - start[name]).std() * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }
    save_file(noise, sent.client / "adapter_model.safetensors")
    found = look(sent)
    assert (found.tokens, found.certificate) == ((), 0.0)
    assert "nothing stands out" in found.why


def test_whole_weights_tell_as_factors_do(bases, tmp_path):
    """Full fine-tuning of the first layer's readers: more rows than tokens, so that the first step finds them all."""
    for kind in ("gpt2", "gpt_neox"):
        model = TINY[kind]()
        model.load_state_dict(load_file(bases[kind] / "model.safetensors"), strict=False)
        model.tie_weights()
        texts = random_texts(3, 8)
        for name, value in model.named_parameters():
            value.requires_grad = FAMILIES[kind].reads(name.removesuffix(".weight")) and name.endswith("weight")
        names = [name for name, value in model.named_parameters() if value.requires_grad]
        folder = tmp_path / kind
        folder.mkdir()
        save_file({name: model.state_dict()[name].clone() for name in names}, folder / "global.safetensors")
        trained(model, texts)
        save_file({name: model.state_dict()[name].clone() for name in names}, folder / "client.safetensors")
        sent = Sent(
            folder / "client.safetensors", folder / "global.safetensors", bases[kind], [text[:-1] for text in texts]
        )
        found = look(sent)
        assert recall_and_precision(found, sent) == (1.0, 1.0), kind
        assert found.rank >= len(sent.tokens)


def test_trained_embeddings_give_the_bag_away_whatever_else_is_hidden(bases, tmp_path):
    sent = lora_client(
        tmp_path, bases["bert"], random_texts(4, 8), kind="bert", fresh=True, saved=["classifier", "word_embeddings"]
    )
    found = look(sent)
    assert {token.id for token in found.tokens} == sent.tokens
    assert "trained embeddings" in found.why


def test_the_same_input_gives_the_same_answer(bases, tmp_path):
    how = {"optimizer": "adamw", "rate": 1e-4, "steps": 5}
    sent = lora_client(tmp_path, bases["llama"], random_texts(3, 6), kind="llama", **how)
    one, other = (look(sent, optimizer="adamw", learning_rate=1e-4, steps=5) for _ in range(2))
    assert (one.tokens, one.certificate) == (other.tokens, other.certificate)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda base: base / "nothing", "no such folder"),
        (lambda base: rewritten(base, {"model_type": "mamba"}), "'mamba' reads is not known"),
        (lambda base: without_weights(base), "has no model.safetensors"),
    ],
    ids=["missing", "another architecture", "no weights"],
)
def test_a_base_that_cannot_be_read_is_told_of(spoil, told, bases, tmp_path):
    sent = lora_client(tmp_path, bases["bert"], random_texts(2, 5), kind="bert")
    copy = tiny_base("bert", tmp_path / "copy")
    with pytest.raises(InputError, match=told):
        look(sent._replace(base=spoil(copy)))


def rewritten(base, fields):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | fields))
    return base


def without_weights(base):
    (base / "model.safetensors").unlink()
    return base


def test_an_adapter_elsewhere_tells_no_tokens_and_says_so(bases, tmp_path):
    model = adapted(bases["llama"], 4, ["o_proj"])
    model.save_pretrained(tmp_path / "global")
    trained(model, random_texts(2, 5))
    model.save_pretrained(tmp_path / "client")
    sent = Sent(tmp_path / "client", tmp_path / "global", bases["llama"], [])
    with pytest.raises(InputError, match="trains nothing that reads the first layer's input"):
        look(sent)
    with pytest.raises(InputError, match="give the victim its folder"):
        look(sent._replace(base=None))


def test_families_are_told_by_their_configuration():
    assert family_of({"model_type": "llama"}, "x").kind == "rms"
    with pytest.raises(InputError, match="relative_key"):
        family_of({"model_type": "bert", "position_embedding_type": "relative_key"}, "x")
