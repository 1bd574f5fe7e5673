"""A client's turn: from the received adapter, on its own, whatever was trained before."""

import pytest
import torch

from fedllm_sec import InputError
from fedllm_sec.settings import LoraSettings, ModelSettings, TrainingSettings
from fedllm_sec.tasks import task
from fedllm_sec.tasks.encoding import TrainingRows
from fedllm_sec.training.base_model import load_base
from fedllm_sec.training.client import train_client
from fedllm_sec.training.prepare import prepare_base
from fedllm_sec.training.schedule import factor


@pytest.fixture(scope="module")
def base(small):
    settings = ModelSettings(path=small[0].partition("=")[2], lora=LoraSettings(dropout=0.1))
    return load_base(settings, prepare_base(settings), seed=0)


@pytest.fixture(scope="module")
def rows(small, base):
    examples = task.build("pubmedqa", {"prompt": "question"}).read(small[1].partition("=")[2], "train")
    return [TrainingRows(examples[:20], base.tokenizer, 192), TrainingRows(examples[20:40], base.tokenizer, 192)]


def turn(base, rows, received, seed=1, **settings):
    training = TrainingSettings(**{"steps": 3, "batch_size": 4, "warmup": 0.0, "learning_rate": 1e-2, **settings})
    return train_client(base, rows, received, training, seed=seed, rounds_done=0, rounds=1)


def test_a_turn_depends_on_nothing_that_was_trained_before(base, rows):
    received = base.adapter()
    alone = turn(base, rows[1], received)
    turn(base, rows[0], received, seed=7)
    again = turn(base, rows[1], received)
    assert alone.adapter.keys() == received.keys()
    assert all(torch.equal(alone.adapter[name], again.adapter[name]) for name in received)
    assert any(not torch.equal(alone.adapter[name], received[name]) for name in received)
    other = turn(base, rows[1], received, seed=2)
    assert any(not torch.equal(alone.adapter[name], other.adapter[name]) for name in received)
    assert (alone.steps, alone.loss) == (3, again.loss)


def test_only_the_adapter_is_trained(base, rows):
    frozen = {name: p.clone() for name, p in base.model.named_parameters() if not p.requires_grad}
    turn(base, rows[0], base.adapter())
    assert all(torch.equal(p, frozen[name]) for name, p in base.model.named_parameters() if name in frozen)
    assert len(frozen) > len(base.parameters)


def test_with_a_frozen_only_b_is_trained_and_a_stays_in_the_adapter(small, base, rows):
    """FFA-LoRA: what is sent of A is to the bit what was received, so that its update is zero."""
    path = small[0].partition("=")[2]
    ffa = load_base(ModelSettings(path=path, lora=LoraSettings(freeze_a=True)), path, seed=0)
    received = ffa.adapter()
    assert received.keys() == base.adapter().keys()
    assert {parameter.requires_grad for name, parameter in ffa.parameters.items() if "lora_A" in name} == {False}
    result = turn(ffa, rows[0], received, steps=12, weight_decay=0.1)
    for name, value in result.adapter.items():
        assert torch.equal(value, received[name]) == ("lora_A" in name), name
    assert sum("lora_A" in name for name in received) == len(received) / 2
    again = turn(ffa, rows[0], result.adapter, steps=12)
    assert again.loss < result.loss - 0.05  # it learns all the same


def test_an_adapter_with_a_frozen_loads_in_peft(small, rows, tmp_path):
    import json

    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    path = small[0].partition("=")[2]
    ffa = load_base(ModelSettings(path=path, lora=LoraSettings(freeze_a=True)), path, seed=0)
    sent = turn(ffa, rows[0], ffa.adapter()).adapter
    save_file(sent, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(ffa.configuration()))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path)
    there = {name.replace(".default", ""): value for name, value in loaded.named_parameters() if "lora_" in name}
    assert there.keys() == sent.keys()
    assert all(torch.equal(there[name], sent[name]) for name in sent)


def test_without_learning_rate_nothing_moves(base, rows):
    received = {name: torch.randn_like(tensor) for name, tensor in base.adapter().items()}
    result = turn(base, rows[0], received, learning_rate=1e-30)
    assert all(torch.equal(result.adapter[name], received[name]) for name in received)


def test_a_training_that_diverges_says_so(base, rows):
    assert not torch.isfinite(torch.tensor(turn(base, rows[0], base.adapter(), learning_rate=1e30, steps=4).loss))


def test_adapters_begin_as_the_seed_says(small, base):
    settings = ModelSettings(path=small[0].partition("=")[2])
    torch.rand(3)
    first, second, other = (load_base(settings, settings.path, seed=seed).adapter() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_foreign_adapter_is_refused(base):
    state = base.adapter()
    name = next(iter(state))
    with pytest.raises(InputError, match="not this model's adapter"):
        base.load_adapter({**state, "extra": torch.ones(1)})
    with pytest.raises(InputError, match=r"has shape \[1, "):
        base.load_adapter({**state, name: state[name][:1]})


def test_a_broken_model_folder_is_one_error(tmp_path, small):
    import shutil

    whole = small[0].partition("=")[2]
    shutil.copytree(whole, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    shutil.copytree(whole, tmp_path / "blank")
    (tmp_path / "blank" / "config.json").write_text("{}")
    for name in ("cut", "empty", "blank"):
        settings = ModelSettings(path=str(tmp_path / name))
        with pytest.raises(InputError, match="cannot be loaded"):
            load_base(settings, prepare_base(settings), seed=0)
    with pytest.raises(InputError, match="no such file or folder"):
        prepare_base(ModelSettings(path="/nowhere/at/all"))


def test_the_schedule_spans_the_run():
    settings = TrainingSettings(warmup=0.1, schedule="linear")
    assert [round(factor(settings, p), 3) for p in (0, 0.05, 0.1, 0.55, 1)] == [0, 0.5, 1, 0.5, 0]
    assert factor(TrainingSettings(warmup=0, schedule="cosine"), 0.5) == pytest.approx(0.5)
    assert factor(TrainingSettings(warmup=0, schedule="constant"), 0.9) == 1
