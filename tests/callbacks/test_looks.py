"""Callbacks that look: at what is saved, at what leaks; and the one that hides a representation."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from fedllm_sec import InputError
from fedllm_sec.callbacks import AddNoise, AuditOnSave, FreezeA, HideRepresentation, LeakageProbe
from fedllm_sec.callbacks.audit import audit
from fedllm_sec.training.base_model import adapter_config, peft_key
from tests.callbacks.clients import arguments, classifier, data, labelled, model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, what was received, and the adapter's configuration."""
    folder, made = tmp_path_factory.mktemp("saved"), model()
    received = {peft_key(name): value.detach().clone() for name, value in made.named_parameters() if "lora_" in name}
    look = AuditOnSave()
    trainer = Trainer(
        model=made,
        args=arguments(folder, save_strategy="steps", save_steps=2),
        train_dataset=data(),
        callbacks=[look],
    )
    trainer.train()
    assert look.findings == {2: [], 4: []}
    assert [entry["audit/findings"] for entry in trainer.state.log_history if "audit/findings" in entry] == [0, 0]
    return folder / "checkpoint-4", received, adapter_config(made)


NAME = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def rewrite(change):
    def harm(folder):
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return harm


def reconfigure(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 10_000}))


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("harm", "finding"),
    [
        (rewrite(lambda state: state.update({NAME: state[NAME] * float("nan")})), f"tensor {NAME!r} holds NaN"),
        (rewrite(lambda state: state.pop(NAME)), f"tensor {NAME!r} is missing"),
        (rewrite(lambda state: state.update({NAME: state[NAME][:, :1].clone()})), "another LoRA rank"),
        (rewrite(lambda state: state.update({"lm_head.weight": torch.ones(2)})), "'lm_head.weight' does not belong"),
        (rewrite(lambda state: state.update({NAME: state[NAME].bfloat16()})), "bfloat16, which loses a small update"),
        (rewrite(lambda state: state.update({NAME: state[NAME] + 100})), "long, and the limit is 1"),
        (reconfigure, "differs from the model's in 'lora_alpha'"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (truncate, "is not a whole safetensors file"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "extra.pkl").write_bytes(b"\x80"), "extra.pkl: is a pickle"),
    ],
)
def test_each_harm_is_found_and_it_alone(saved, tmp_path, harm, finding):
    folder, received, config = saved
    copied = shutil.copytree(folder, tmp_path / "checkpoint")
    assert audit(copied, received, config, 1.0) == []
    harm(copied)
    (found,) = audit(copied, received, config, 1.0)
    assert finding in found


def test_what_was_not_trained_is_found(saved, tmp_path):
    folder, received, config = saved
    copied = shutil.copytree(folder, tmp_path / "checkpoint")
    save_file(received, copied / "adapter_model.safetensors")
    assert audit(copied, received, config) == ["the adapter is what was received: nothing was trained"]


def test_training_ends_with_a_finding_where_that_is_wanted(tmp_path):
    look = AuditOnSave(norm=1e-6, stop=True)
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = Trainer(model=model(), args=args, train_dataset=data(), callbacks=[look])
    trainer.train()
    assert trainer.state.global_step == 1
    assert "long, and the limit is 1e-06" in look.findings[1][0]


def probed(tmp_path, callbacks, probe, made=None, count=16, **how):
    made = made or model()
    made.get_base_model().save_pretrained(tmp_path / "base")
    probe.base = tmp_path / "base"
    args = arguments(tmp_path, **{"max_steps": 1, "learning_rate": 0.1, **how})
    trainer = Trainer(model=made, args=args, train_dataset=data(count), callbacks=callbacks)
    trainer.train()
    return trainer


def test_one_step_of_sgd_tells_its_tokens_and_noise_hides_them(tmp_path):
    """The truth is what went through the model in that step; A of rank 16 tells the 12 tokens of two short texts."""
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_pre_hook(lambda _, a, kw: seen.extend(kw["input_ids"].tolist()), with_kwargs=True)

    probe, after = LeakageProbe(), LeakageProbe()
    big = model(hidden=64, r=16)
    after.base = tmp_path / "base"
    trainer = probed(
        tmp_path, [Watch(), probe, AddNoise(0.05, seed=1), after], probe, big, per_device_train_batch_size=2
    )
    (look,), (hidden,) = probe.history, after.history
    assert look["leakage/tokens"] == len({token for text in seen for token in text[:-1]})
    assert look["leakage/token_recall"] >= 0.9
    assert look["leakage/token_precision"] >= 0.9
    assert hidden["leakage/token_recall"] < 0.5
    logged = [entry for entry in trainer.state.log_history if "leakage/token_recall" in entry]
    assert [entry["step"] for entry in logged] == [1, 1]


def test_the_numbers_go_where_they_are_sent(tmp_path):
    """With `trainer.log` they reach every tracker."""
    probe, told = LeakageProbe(every=2), []
    probe.log = told.append
    trainer = probed(tmp_path, [probe], probe, max_steps=5)
    assert [look["step"] for look in probe.history] == [2, 4, 5]
    assert len(told) == 3
    assert told[0].keys() == {
        f"leakage/{x}" for x in ("token_recall", "token_precision", "tokens", "certificate", "seconds")
    }
    assert not any("leakage/seconds" in entry for entry in trainer.state.log_history)
    assert not trainer.model._forward_pre_hooks


def test_a_probe_changes_nothing_of_the_training(tmp_path):
    one, other = model(), model()
    probed(tmp_path / "a", [probe := LeakageProbe(every=1)], probe, one, max_steps=4)
    Trainer(model=other, args=arguments(tmp_path / "b", learning_rate=0.1), train_dataset=data(), callbacks=[]).train()
    for (name, value), (_, same) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(value, same), name


def test_ffa_lora_leaves_the_probe_less(tmp_path):
    """A of the first layer tells nothing where it is frozen."""
    open_probe, frozen = LeakageProbe(), LeakageProbe()
    probed(tmp_path / "a", [open_probe], open_probe, model(hidden=64, r=16))
    probed(tmp_path / "b", [FreezeA(), frozen], frozen, model(hidden=64, r=16))
    assert frozen.history[0]["leakage/token_recall"] < open_probe.history[0]["leakage/token_recall"]


def test_without_the_bases_files_the_probe_refuses_before_any_step(tmp_path):
    trainer = Trainer(model=model(), args=arguments(tmp_path), train_dataset=data(), callbacks=[LeakageProbe()])
    with pytest.raises(InputError, match="give base=FOLDER"):
        trainer.train()
    assert trainer.state.global_step == 0


def naive_soteria(made, batch, percentile):
    """(l,) 1 for the entries that stay: Sun et al. 2021, equation 8, by one jacobian of each example, in float64."""
    made = made.double()
    bert, kept = made.get_base_model().bert, []
    vectors = bert.embeddings(batch)

    def vector(embedded):
        return bert.pooler(bert.encoder(embedded[None])[0])[0]

    total = 0.0
    for embedded in vectors:
        jacobian = torch.autograd.functional.jacobian(vector, embedded.detach())
        value = vector(embedded).detach()
        total = total + (value / jacobian.flatten(1).norm(dim=1)).square().numpy()
        kept.append(value)
    order = np.argsort(-np.sqrt(total))
    keep = np.ones(len(order), dtype=bool)
    keep[order[: int(np.ceil(percentile * (len(order) - 1) / 100))]] = False
    return keep


@pytest.mark.parametrize("chunk", [1, 8])
def test_the_entries_that_tell_most_leave_no_trace_in_the_heads_gradient(tmp_path, chunk):
    """One step of SGD: columns of the removed entries did not move; everything else moved as without the defense."""

    def one_step(callbacks):
        made = classifier()
        start = {name: value.detach().clone() for name, value in made.named_parameters()}
        trainer = Trainer(
            model=made, args=arguments(tmp_path, max_steps=1), train_dataset=labelled(), callbacks=callbacks
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.train()
        return {name: value.detach() - start[name] for name, value in made.named_parameters()}, batch

    hide = HideRepresentation(percentile=30, chunk=chunk)
    (hidden, batch), (free, _) = one_step([hide]), one_step([])
    head = next(name for name in free if name.endswith("classifier.modules_to_save.default.weight"))
    assert free[head].abs().min() > 0
    moved = (hidden[head] != 0).all(dim=0).numpy()
    assert (moved == naive_soteria(classifier(), batch["input_ids"], 30)).all()
    assert hide.removed == 10 == (~moved).sum()
    assert torch.equal(hidden[head][:, moved], free[head][:, moved])
    assert all(torch.allclose(hidden[name], free[name], atol=1e-8) for name in free if name != head)


def test_each_batch_of_an_accumulated_step_has_a_mask_of_its_own(tmp_path):
    """The gradient of two batches is the sum of two masked ones."""
    masks, gradients = [], []

    class Keep(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            masks.append(hide.keep.clone())

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            masks.append(hide.keep.clone())
            gradients.append(model.base_model.model.classifier.modules_to_save["default"].weight.grad.clone())

    hide = HideRepresentation(percentile=30)
    how = {"max_steps": 1, "gradient_accumulation_steps": 2}
    trainer = Trainer(
        model=classifier(), args=arguments(tmp_path, **how), train_dataset=labelled(), callbacks=[hide, Keep()]
    )
    trainer.train()
    assert len(masks) == 2
    assert not torch.equal(*masks)
    untouched = (gradients[0] == 0).all(dim=0)
    assert torch.equal(untouched, ~masks[0] & ~masks[1])


def test_where_it_does_not_apply_it_says_so(tmp_path):
    def train(made, rows, callback, **how):
        Trainer(model=made, args=arguments(tmp_path, **how), train_dataset=rows, callbacks=[callback]).train()

    with pytest.raises(InputError, match="no trained linear layer is called classifier:"):
        train(model(), data(), HideRepresentation(10))
    with pytest.raises(InputError, match="gradient checkpointing"):
        train(classifier(), labelled(), HideRepresentation(10), gradient_checkpointing=True)
    with pytest.raises(InputError, match="percentile=200"):
        HideRepresentation(200)
    with pytest.raises(InputError, match=r"the layer reads \(4, 8, 32\), not one vector"):
        train(model(), data(), HideRepresentation(10, layer="v_proj.lora_A.default"))
