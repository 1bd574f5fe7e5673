"""Callbacks with a stock `Trainer`: against closed forms, and against trainings without them."""

import doctest
import inspect
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, Trainer

from fedllm_sec import InputError, callbacks, open_updates
from fedllm_sec.callbacks import (
    AddNoise,
    ClipUpdate,
    FlWbcNoise,
    FreezeA,
    MaskGradient,
    NoTraining,
    ProjectUpdate,
    ReplaceModel,
    SubmitUpdate,
)
from fedllm_sec.training.base_model import peft_key
from fedllm_sec.training.sharded import full_value
from tests.callbacks.clients import RATE, arguments, classifier, data, labelled, length, model, trained
from tests.launch import ROOT

EVERY = [each for _, each in inspect.getmembers(callbacks, inspect.isclass)]


def quiet(**how):
    """A stock `Trainer` that prints no results: they would be taken for those of the example."""
    trainer = Trainer(**how)
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_the_example_of_the_docstring_runs(kind, tmp_path):
    """As it stands there, with a model, arguments, data and a folder."""
    made = model()
    known = {
        "Trainer": quiet,
        "model": made,
        "arguments": arguments(tmp_path / "out"),
        "data": data(),
    }
    made.get_base_model().save_pretrained(tmp_path / "base")
    known |= {"base": tmp_path / "base", "classifier": classifier(), "labelled": labelled()}
    known["saving"] = arguments(tmp_path / "saved", save_strategy="steps", save_steps=2)
    known |= {"folder": tmp_path, "last_change": {peft_key(n): p.detach() for n, p in made.named_parameters()}}
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(kind), known, kind.__name__, None, 0)
    assert examples.examples
    quiet(model=made, args=known["arguments"], train_dataset=known["data"])  # the first one prints an empty line
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_the_page_names_every_callback_and_its_example_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs/callbacks.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)) == sorted(kind.__name__ for kind in EVERY)
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    known = {"model": model(), "arguments": arguments(tmp_path / "out"), "data": data()}
    exec(example, known)
    assert (tmp_path / "client_00/client.json").is_file()


def test_the_ball_is_kept_at_the_end_and_at_every_step(tmp_path):
    before, free = trained(tmp_path, [])
    assert length(before, free) > 0.02
    clip = ClipUpdate(norm=0.01)
    _, after = trained(tmp_path, [clip])
    assert clip.length == pytest.approx(length(before, free), rel=1e-6)
    expected = {name: before[name] + 0.01 / clip.length * (free[name] - before[name]) for name in free}
    assert all(after[name] == pytest.approx(expected[name], abs=1e-7) for name in free)
    _, near = trained(tmp_path, [ProjectUpdate(epsilon=0.01)])
    assert length(before, near) == pytest.approx(0.01, rel=1e-5)
    assert length(near, after) > 1e-5  # the two are not the same
    _, large = trained(tmp_path, [ClipUpdate(norm=10.0)])
    assert length(large, free) == 0


def test_clipping_by_the_step_is_projected_descent(tmp_path):
    """One step of SGD at a time: project, and go on from there."""
    made = model()
    start = {name: value.detach().clone() for name, value in made.named_parameters() if "lora" in name}
    _, after = trained(tmp_path, [ClipUpdate(norm=0.01, when="step")], made, max_steps=2)
    naive = model()
    parameters = {name: value for name, value in naive.named_parameters() if "lora" in name}
    batches = list(Trainer(model=naive, args=arguments(tmp_path), train_dataset=data()).get_train_dataloader())
    naive.train()
    torch.manual_seed(0)
    for batch in batches[:2]:
        grads = torch.autograd.grad(naive(**batch).loss, list(parameters.values()))
        with torch.no_grad():
            for value, grad in zip(parameters.values(), grads, strict=True):
                value -= RATE * grad
            far = length(start, parameters)
            for name, value in parameters.items():
                value.copy_(start[name] + min(1.0, 0.01 / far) * (value - start[name]))
    assert all(after[name] == pytest.approx(parameters[name].detach(), abs=1e-6) for name in after)


def test_noise_has_its_deviation_and_depends_on_the_seed_alone(tmp_path):
    _, free = trained(tmp_path, [])
    _, one = trained(tmp_path, [AddNoise(std=0.02, seed=1)])
    _, same = trained(tmp_path, [AddNoise(std=0.02, seed=1)])
    _, other = trained(tmp_path, [AddNoise(std=0.02, seed=2)])
    noise = torch.cat([(one[name] - free[name]).flatten() for name in free])
    assert float(noise.std()) == pytest.approx(0.02, rel=0.1)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.003)
    assert length(one, same) == 0
    assert length(one, other) > 0


def test_a_is_frozen_in_time_or_not_at_all(tmp_path):
    before, after = trained(tmp_path, [FreezeA()], optim="adamw_torch", weight_decay=0.1)
    assert all(torch.equal(after[name], before[name]) for name in after if "lora_A" in name)
    assert all(not torch.equal(after[name], before[name]) for name in after if "lora_B" in name)
    trainer = Trainer(model=model(), args=arguments(tmp_path), train_dataset=data())
    trainer.add_callback(FreezeA())
    with pytest.raises(InputError, match="constructor"):
        trainer.train()


def test_fl_wbc_perturbs_only_where_gradients_hardly_change(tmp_path):
    """After one step there is no previous gradient; after two, noise Y lies where |g_2 - g_1| <= |Y|."""
    _, free = trained(tmp_path, [], max_steps=1)
    _, once = trained(tmp_path, [FlWbcNoise(scale=1e-3, seed=1)], max_steps=1)
    assert length(free, once) == 0
    _, free = trained(tmp_path, [], max_steps=2)
    _, twice = trained(tmp_path, [FlWbcNoise(scale=1e-3, seed=1)], max_steps=2)
    noise = torch.cat([(twice[name] - free[name]).flatten() / RATE for name in free])
    touched = noise.abs() > 1e-6
    assert 0.02 < float(touched.float().mean()) < 0.98
    _, more = trained(tmp_path, [FlWbcNoise(scale=1.0, seed=1)], max_steps=2)
    every = torch.cat([(more[name] - free[name]).flatten() / RATE for name in free])
    assert float((every.abs() > 1e-6).float().mean()) > 0.95  # the loss is flat against so much noise


def test_replacement_scales_what_was_learnt(tmp_path):
    before, free = trained(tmp_path, [])
    _, after = trained(tmp_path, [ReplaceModel(gamma=7.0)])
    assert all(
        after[name] - before[name] == pytest.approx((7 * (free[name] - before[name])), abs=1e-5) for name in after
    )


def test_only_the_coordinates_that_moved_least_are_trained(tmp_path):
    made = model()
    generator = torch.Generator().manual_seed(0)
    names = {name: peft_key(name) for name, value in made.named_parameters() if "lora" in name}
    change = {peft_key(name): torch.randn(value.shape, generator=generator) for name, value in made.named_parameters()}
    before, after = trained(tmp_path, [MaskGradient(change, ratio=0.3)], made)
    moved = torch.cat([(after[name] != before[name]).flatten() for name in names])
    sizes = torch.cat([change[file].abs().flatten() for file in names.values()])
    limit = sizes.kthvalue(int(0.3 * len(sizes))).values
    assert not moved[sizes > limit].any()
    assert float(moved[sizes <= limit].float().mean()) > 0.95


def test_a_free_rider_sends_what_it_received_or_noise(tmp_path):
    before, after = trained(tmp_path, [NoTraining()])
    assert length(before, after) == 0
    before, after = trained(tmp_path, [NoTraining(mode="disguised", std=0.01, seed=3)])
    noise = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float(noise.std()) == pytest.approx(0.01, rel=0.1)


def test_what_is_submitted_is_what_the_server_reads(tmp_path):
    made = model()
    made.save_pretrained(tmp_path / "global")
    submit = SubmitUpdate(tmp_path / "client_00", received=tmp_path / "global", difference=True)
    before, after = trained(tmp_path, [ClipUpdate(norm=0.01), submit], made, logging_steps=1)
    rows = open_updates([tmp_path / "client_00"], reference=tmp_path / "global")
    assert float(rows.gram.sum() ** 0.5) == pytest.approx(0.01, rel=1e-5)
    claims = json.loads((tmp_path / "client_00" / "client.json").read_text())
    assert claims["num_samples"] == 16
    assert claims["steps"] == 4
    assert claims["update_norm"] == pytest.approx(0.01, rel=1e-5)
    assert 3 < claims["loss"] < 5
    saved = load_file(tmp_path / "client_00" / "adapter_model.safetensors")
    change = load_file(tmp_path / "client_00" / "update.safetensors")
    for name in after:
        assert torch.equal(saved[peft_key(name)], after[name])
        assert torch.equal(change[peft_key(name)], after[name] - before[name])
    assert saved.keys() == load_file(tmp_path / "global" / "adapter_model.safetensors").keys()


def test_a_head_that_is_trained_beside_the_adapter_is_submitted_too(tmp_path):
    made = model(modules_to_save=["lm_head"])
    made.save_pretrained(tmp_path / "global")
    trained(tmp_path, [ClipUpdate(norm=0.01), SubmitUpdate(tmp_path / "client_00")], made)
    rows = open_updates([tmp_path / "client_00"], reference=tmp_path / "global")
    assert float(rows.gram.sum() ** 0.5) == pytest.approx(0.01, rel=1e-4)
    assert any("lm_head" in name for name in rows.layout.sizes)


@pytest.mark.parametrize("how", [{"gradient_accumulation_steps": 2}, {"optim": "adamw_torch"}, {"max_grad_norm": 0.5}])
def test_all_of_them_together_in_other_trainings(how, tmp_path):
    made = model()
    made.save_pretrained(tmp_path / "global")
    every = [FreezeA(), FlWbcNoise(1e-3, seed=1), ClipUpdate(0.05, "step"), AddNoise(1e-3, seed=1)]
    trained(tmp_path, [*every, SubmitUpdate(tmp_path / "client_00")], made, **how)
    rows = open_updates([tmp_path / "client_00"], reference=tmp_path / "global")
    assert 0.01 < float(rows.gram.sum() ** 0.5) < 0.1


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: ClipUpdate(norm=0), "norm=0: give a positive number"),
        (lambda folder: AddNoise(std=float("nan"), seed=0), "std=nan"),
        (lambda folder: NoTraining(mode="disguised"), "it needs its deviation"),
        (lambda folder: NoTraining(std=0.1), "only disguised has noise"),
        (lambda folder: MaskGradient({}, ratio=2), "ratio=2"),
        (lambda folder: MaskGradient({}), "has no tensor"),
        (lambda folder: ClipUpdate(1.0, received={}), "is not this model's adapter"),
        (lambda folder: ClipUpdate(1.0, received=folder / "nowhere"), "nowhere"),
        (lambda folder: SubmitUpdate(folder), "is there already"),
    ],
)
def test_bad_input_is_told_of_before_the_first_step(make, told, tmp_path):
    made = model()
    before = {name: value.detach().clone() for name, value in made.named_parameters()}

    def run():
        Trainer(model=made, args=arguments(tmp_path), train_dataset=data(), callbacks=[make(tmp_path)]).train()

    with pytest.raises(InputError, match=told):
        run()
    assert all(torch.equal(value, before[name]) for name, value in made.named_parameters())


def test_a_resumed_training_has_to_be_told_what_was_received(tmp_path):
    made = model()
    made.save_pretrained(tmp_path / "global")
    how = arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    Trainer(model=made, args=how, train_dataset=data()).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")

    def resume(**given):
        again = model()
        clip = ClipUpdate(norm=0.01, **given)
        Trainer(model=again, args=how, train_dataset=data(), callbacks=[clip]).train(resume_from_checkpoint=checkpoint)
        return again

    with pytest.raises(InputError, match="resumed at step 1"):
        resume()
    again = resume(received=tmp_path / "global")
    start = load_file(tmp_path / "global" / "adapter_model.safetensors")
    after = {peft_key(name): full_value(value) for name, value in again.named_parameters() if "lora" in name}
    assert length(start, after) == pytest.approx(0.01, rel=1e-5)
