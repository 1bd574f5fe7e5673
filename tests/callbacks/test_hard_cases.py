"""Adapters, data and endings that are not the usual ones."""

import json
import logging
import re
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from fedllm_sec import InputError
from fedllm_sec.callbacks import (
    AddNoise,
    AuditOnSave,
    ClipUpdate,
    FreezeA,
    HideRepresentation,
    LeakageProbe,
    MaskGradient,
    SubmitUpdate,
)
from fedllm_sec.callbacks import data as transforms
from fedllm_sec.callbacks.submit import digest_of_config
from tests.callbacks.clients import arguments, classifier, data, labelled, model


def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, **sizes))


def lora(name="default", **how):
    return get_peft_model(base(), LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, **how}), adapter_name=name)


def train(made, callbacks, folder, rows=None, **how):
    Trainer(model=made, args=arguments(folder, **how), train_dataset=rows or data(), callbacks=callbacks).train()


Q = {"target_modules": ["q_proj"]}


def test_an_adapter_may_have_any_name_and_another_one_stays_private(tmp_path):
    made = lora("client", **Q)
    made.add_adapter("private", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    look = AuditOnSave()
    train(made, [SubmitUpdate(tmp_path / "sent"), look], tmp_path, save_strategy="no")
    sent = load_file(tmp_path / "sent/adapter_model.safetensors")
    train(lora(**Q), [SubmitUpdate(tmp_path / "usual")], tmp_path)
    usual = load_file(tmp_path / "usual/adapter_model.safetensors")
    assert {name: value.shape for name, value in sent.items()} == {n: v.shape for n, v in usual.items()}
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(base(), tmp_path / "sent")
    assert any(parameter.any() for name, parameter in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    "how",
    [
        {"use_dora": True, **Q},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"use_rslora": True, **Q},
        {"task_type": None, **Q},
        {"modules_to_save": ["lm_head"], **Q},
        {"bias": "lora_only", **Q},
    ],
    ids=["dora", "embeddings", "rslora", "no task", "head", "bias"],
)
def test_every_kind_of_adapter_is_audited_clean_and_starts_from_its_folder(tmp_path, how):
    made = lora(**how)
    made.save_pretrained(tmp_path / "received")
    look, submit = AuditOnSave(), SubmitUpdate(tmp_path / "sent", received=tmp_path / "received")
    train(made, [look, submit], tmp_path, save_strategy="steps", save_steps=4)
    if "embed_tokens" in how.get("target_modules", ()):  # PEFT saves the base's embeddings too: no server takes these
        ((told,),) = look.findings.values()
        assert re.match(r"KY001: tensor '.*embed_tokens.base_layer.weight'", told)
    else:
        assert look.findings == {4: []}
    saved = load_file(tmp_path / "checkpoint-4/adapter_model.safetensors")
    sent = load_file(tmp_path / "sent/adapter_model.safetensors")
    assert sent.keys() == {name for name in saved if not name.endswith(".base_layer.weight")}
    assert all(torch.equal(sent[name], saved[name]) for name in sent)


def test_a_whole_model_with_frozen_embeddings_is_audited_clean(tmp_path):
    made = base()
    made.model.embed_tokens.requires_grad_(False)
    look = AuditOnSave()
    train(made, [look], tmp_path, save_strategy="steps", save_steps=4)
    assert look.findings == {4: []}


def test_a_training_that_diverged_is_told_by_tensor_and_nothing_is_sent(tmp_path):
    with pytest.raises(InputError, match=r"SubmitUpdate: training diverged: tensor '.*lora_.*' holds NaN"):
        train(model(), [SubmitUpdate(tmp_path / "sent")], tmp_path, learning_rate=1e30)
    assert not (tmp_path / "sent").exists()
    with pytest.raises(InputError, match="ClipUpdate: training diverged"):
        train(model(), [ClipUpdate(1.0)], tmp_path, learning_rate=1e30)


def test_a_probe_that_cannot_read_refuses_at_once_or_lets_the_training_be(tmp_path, caplog):
    base().save_pretrained(tmp_path / "base")
    blind = lora(target_modules=["o_proj"])
    with pytest.raises(InputError, match="trains nothing that reads the first layer's input"):
        train(blind, [LeakageProbe(base=tmp_path / "base")], tmp_path)

    class Spoil(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.data.fill_(float("nan"))

    probe = LeakageProbe(base=tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        train(lora(**Q), [Spoil(), probe], tmp_path)
    assert probe.history == []
    assert "step 4 cannot be looked at" in caplog.text


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyError("broken")


def test_a_broken_training_leaves_nothing_on_the_model_for_the_next_use(tmp_path):
    made, hide = classifier(), HideRepresentation(50)
    with pytest.raises(KeyError):
        train(made, [hide, Break()], tmp_path, labelled())
    layer = made.base_model.model.classifier.modules_to_save["default"]
    assert layer._forward_pre_hooks
    train(made, [hide], tmp_path, labelled())
    assert not layer._forward_pre_hooks
    with pytest.raises(KeyError):
        train(made, [HideRepresentation(50), Break()], tmp_path, labelled())
    import gc

    gc.collect()
    assert not layer._forward_pre_hooks


def test_noise_is_new_in_each_training_and_the_same_in_a_repetition(tmp_path):
    def drawn(noise):
        made = model()
        before = {name: value.clone() for name, value in made.state_dict().items()}
        train(made, [noise], tmp_path, learning_rate=1e-12)
        return torch.cat([(value - before[name]).flatten() for name, value in made.state_dict().items()])

    one = AddNoise(0.1, seed=5)
    first, second, again = drawn(one), drawn(one), drawn(AddNoise(0.1, seed=5))
    assert torch.allclose(first, again, atol=1e-6)
    assert float((first - second).norm()) > 0.5 * float(first.norm())


def test_frozen_too_late_is_told_for_embeddings_too(tmp_path):
    trainer = Trainer(model=lora(target_modules=["embed_tokens"]), args=arguments(tmp_path), train_dataset=data())
    trainer.add_callback(FreezeA())
    with pytest.raises(InputError, match="give it to Trainer's constructor"):
        trainer.train()


def test_examples_that_cannot_be_counted_must_be_told(tmp_path):
    rows = data().to_iterable_dataset()
    with pytest.raises(InputError, match="give num_samples="):
        train(model(), [SubmitUpdate(tmp_path / "sent")], tmp_path, rows)
    with pytest.raises(InputError, match="num_samples=0"):
        train(model(), [SubmitUpdate(tmp_path / "sent", num_samples=0)], tmp_path)
    train(model(), [SubmitUpdate(tmp_path / "sent", num_samples=7)], tmp_path, rows)


def test_the_hash_of_a_base_is_that_of_what_it_is(tmp_path):
    one, other = base().config, base().config
    other.use_cache, other.dtype = False, torch.bfloat16
    assert digest_of_config(one) == digest_of_config(other)
    other.hidden_size = 64
    assert digest_of_config(one) != digest_of_config(other)


def test_the_files_of_a_base_are_hashed_where_there_are_any(tmp_path):
    claims = []
    for name in ("one", "same", "other"):
        made = base()
        if name == "other":
            made.model.norm.weight.data += 1
        made.save_pretrained(tmp_path / name)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / name)
        adapted = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", r=2, **Q))
        train(adapted, [SubmitUpdate(tmp_path / f"sent_{name}")], tmp_path)
        claims.append(json.loads((tmp_path / f"sent_{name}/client.json").read_text()))
    one, same, other = (claim["base_sha256"] for claim in claims)
    assert one == same != other
    assert len({claim["base_config_sha256"] for claim in claims}) == 1
    train(model(), [SubmitUpdate(tmp_path / "sent")], tmp_path)
    assert json.loads((tmp_path / "sent/client.json").read_text())["base_sha256"] is None


def test_a_mask_of_another_shape_is_refused(tmp_path):
    made = model()
    change = {
        name.replace(".default", ""): torch.ones(value.shape[-1])
        for name, value in made.named_parameters()
        if "lora_" in name
    }
    with pytest.raises(InputError, match=r"of shape \[32\], expected \[2, 32\]"):
        train(made, [MaskGradient(change)], tmp_path)


def test_a_file_that_goes_missing_while_it_is_looked_at_is_a_finding(tmp_path):
    class Lose(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            shutil.rmtree(tmp_path / f"checkpoint-{state.global_step}")

    look = AuditOnSave()
    train(model(), [Lose(), look], tmp_path, save_strategy="steps", save_steps=4)
    assert "no such file or folder" in look.findings[4][0]


NAMES = Features({"text": Value("string"), "label": ClassLabel(names=["sports", "space", "med"])})


def named(texts=("a", "b", "c", "d")):
    return Dataset.from_dict({"text": list(texts), "label": [0, 1, 2, 0]}, features=NAMES)


def test_labels_may_be_called_by_their_names_and_formats_stay():
    rows = named()
    assert transforms.flip_labels(rows, {"sports": "space"})[:]["label"] == [1, 1, 2, 1]
    assert len(transforms.only_triggered(rows, "sports")) == 2
    assert set(transforms.plant_trigger(rows, "med", rate=1.0)[:]["label"]) == {2}
    formatted = transforms.flip_labels(rows.with_format("torch", columns=["label"]), {0: 1})
    assert formatted[:]["label"].tolist() == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: transforms.flip_labels(named(), {"golf": "space"}), "no label 'golf' among sports, space, med"),
        (lambda: transforms.plant_trigger(named(), 3), "no label 3 among"),
        (lambda: transforms.flip_labels(named().select([0, 3]), {1: 2}), "no example has the label 1"),
        (lambda: transforms.plant_trigger(DatasetDict({"train": named()}), 0), "is a DatasetDict; give one split"),
        (lambda: transforms.plant_trigger(named(), 0, position="begin"), "position='begin': one of start, end, random"),
        (lambda: transforms.plant_trigger(named(["a", None, "c", "d"]), 0, rate=1.0), "a text is None"),
    ],
)
def test_what_would_poison_nothing_is_told(act, message):
    with pytest.raises(InputError, match=message):
        act()
