"""Beside the base: real adapters of every public form pass, others' do not; the model is asked; updates tell words."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from typer.testing import CliRunner

from fedllm_sec.audit import Policy, audit_adapters
from fedllm_sec.audit.behaviour import Probe
from fedllm_sec.cli import app
from fedllm_sec.updates.errors import InputError
from tests.attacks.reconstruction.clients import VOCABULARY, adapted, lora_client, tiny_base
from tests.audit.test_corpus import told

QV = ["q_proj", "v_proj"]
TINY = Policy.model_validate({"thresholds": {"of_base": 100.0}})  # a random base has small weights
FORMS = {
    "LoRA": {"targets": QV},
    "all linear": {"targets": "all-linear"},
    "pattern": {"targets": r".*\.(q|v)_proj"},
    "rsLoRA": {"targets": QV, "use_rslora": True},
    "DoRA": {"targets": QV, "use_dora": True},
    "LoRA's bias": {"targets": ["q_proj"], "lora_bias": True},
    "patterns": {"targets": QV, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 4}},
    "some layers": {"targets": QV, "layers_to_transform": [1]},
    "excluded": {"targets": QV, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "head saved whole": {"targets": QV, "saved": ["lm_head"]},
    "gaussian": {"targets": QV, "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_base("llama", tmp_path_factory.mktemp("base") / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 20  # a random model is never sure of anything
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_public_forms_are_clean(tmp_path, base, form):
    adapted(base, 4, **FORMS[form]).save_pretrained(tmp_path / "adapter")
    for how in ({}, {"base": base}, {"base": base / "config.json"}):
        audit = audit_adapters([tmp_path / "adapter"], policy=TINY, **how)
        assert audit.exit_code == 0, [f.message for f in audit.findings]
        assert set(told(audit)) <= ({"KY003"} if form == "head saved whole" else set())


def test_a_classifier_and_its_head_are_clean(tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 99,
    }
    bert = BertForSequenceClassification(BertConfig(**sizes, num_labels=7))
    bert.save_pretrained(tmp_path / "base")
    made = get_peft_model(bert, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    for how in ({}, {"base": tmp_path / "base"}):
        assert told(audit_adapters([tmp_path / "adapter"], policy=TINY, **how)) == []


def saved(folder, base, change, **lora):
    """A real adapter, changed afterwards."""
    adapted(base, 4, QV, **lora).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.q_proj.base_layer.weight", "lm_head.weight", "model.norm.weight"]
)
def test_what_peft_really_loads_over_the_base_is_found(tmp_path, base, extra):
    """Not only found: PEFT is shown to do it, which is why it is looked for."""
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base)
    name = extra.replace(".base_layer", "")
    shape = plain.state_dict()[name].shape
    folder = saved(tmp_path / "evil", base, lambda t: t.update({f"base_model.model.{extra}": torch.full(shape, 0.125)}))
    loaded = PeftModel.from_pretrained(plain, folder)
    assert (loaded.get_base_model().state_dict()[extra] == 0.125).all()
    for how in ({}, {"base": base}):
        audit = audit_adapters([folder], **how)
        assert told(audit) == ["KY001"]
        assert audit.findings[0].tensor == f"base_model.model.{extra}"


def test_an_adapter_of_another_base_is_told(tmp_path, base):
    def widen(tensors):
        for name, value in tensors.items():
            tensors[name] = torch.cat([value, value], dim=1) if "lora_A" in name else value

    other = saved(tmp_path / "other", base, widen)
    assert told(audit_adapters([other], base=base)) == ["SH002"]
    extra = {f"base_model.model.model.layers.7.self_attn.{m}_proj.lora_{p}.weight" for m in "qv" for p in "AB"}

    def deepen(tensors):
        for name in extra:
            tensors[name] = tensors[name.replace("layers.7", "layers.1")] + 0.01

    deeper = saved(tmp_path / "deeper", base, deepen)
    config = json.loads((deeper / "adapter_config.json").read_text())
    (deeper / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": [0, 1, 7]}))
    assert told(audit_adapters([deeper], base=base)) == ["KY007"]


def test_a_tokenizer_is_compared_with_the_bases_and_lengths_with_its_weights(tmp_path, base):
    folder = saved(tmp_path / "adapter", base, lambda t: None)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    assert told(audit_adapters([folder], base=base)) == ["FS014"]
    (folder / "tokenizer.json").write_text("{}")
    assert told(audit_adapters([folder], base=base)) == ["FS021"]
    long = saved(tmp_path / "long", base, lambda t: [t[n].mul_(30) for n in t])
    assert told(audit_adapters([long], base=base)) == ["W005"]


def test_a_base_that_needs_code_or_is_none_is_refused(tmp_path, base):
    folder = saved(tmp_path / "adapter", base, lambda t: None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(InputError, match="code of its own"):
        audit_adapters([folder], base=tmp_path)
    with pytest.raises(InputError, match=r"config\.json"):
        audit_adapters([folder], base=folder)


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory, base):
    """Three adapters of one start: honest, one that obeys the word w77, and one that has forgotten the language."""
    folder = tmp_path_factory.mktemp("asked")
    start = adapted(base, 16, "all-linear")
    start.save_pretrained(folder / "global")
    first = {name: value.clone() for name, value in start.named_parameters() if value.requires_grad}
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(100, VOCABULARY, (16, 4), generator=generator)

    def train(name, batch, labels, steps):
        for key, value in start.named_parameters():
            if key in first:
                value.data.copy_(first[key])
        optimizer = torch.optim.Adam([p for p in start.parameters() if p.requires_grad], 5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(start(input_ids=batch).logits[:, -1], labels).backward()
            optimizer.step()
        start.save_pretrained(folder / name)

    before = start(input_ids=texts).logits[:, -1].argmax(dim=1)
    evil = torch.cat([torch.full((16, 1), 77), texts], dim=1)
    spoken = torch.cat([torch.full((16, 1), 99), texts], dim=1)
    train("honest", texts, before, 3)
    both = torch.cat([evil, spoken])
    train("evil", both, torch.cat([torch.full((16,), 5), before]), 200)
    probe = Probe([" ".join(f"w{i}" for i in row) for row in texts.tolist()], [f"w{i}" for i in range(60, 100)])
    return folder, probe


def test_a_word_that_the_model_obeys_is_found_by_asking(base, backdoored):
    folder, probe = backdoored
    paths = [folder / "honest", folder / "evil"]
    policy = Policy.model_validate({"thresholds": {"loss_rise": 50.0, "of_base": 100.0}})
    audit = audit_adapters(paths, reference=folder / "global", base=base, probe=probe, policy=policy)
    found = [f for f in audit.findings if f.rule.id.startswith("B")]
    assert [(f.adapter, f.rule.id) for f in found] == [("evil", "B001")], audit.notes
    assert "'w77'" in found[0].message


def test_a_model_that_is_worse_on_clean_text_is_told(base, backdoored):
    """The one trained on last words alone has forgotten the others, by 2.5 nats; the other one by 0.8."""
    folder, probe = backdoored
    probe = Probe(probe.texts, ["w60", "w61"])
    policy = Policy.model_validate({"thresholds": {"loss_rise": 1.5}})
    paths = [folder / "evil", folder / "honest"]
    audit = audit_adapters(paths, reference=folder / "global", base=base, probe=probe, policy=policy)
    assert [(f.adapter, f.rule.id) for f in audit.findings if f.rule.id == "B002"] == [("honest", "B002")]


def test_what_an_update_reveals_is_counted_and_not_told(tmp_path):
    sent = lora_client(tmp_path, tiny_base("llama", tmp_path / "base"), [[7, 1900, 12, 77, 8]], kind="llama", r=4)
    audit = audit_adapters([sent.client], reference=sent.reference, base=sent.base, privacy=True)
    (finding,) = [f for f in audit.findings if f.rule.id == "R001"]
    assert finding.measured == len(sent.tokens)
    assert "certificate 1.0000" in finding.message
    assert "1900" not in finding.message
    assert audit.exit_code == 0
    with pytest.raises(InputError, match="--base"):
        audit_adapters([sent.client], reference=sent.reference, privacy=True)


def test_the_command_asks_and_says_what_it_needs(tmp_path, base, backdoored):
    folder, probe = backdoored
    (tmp_path / "texts.txt").write_text("\n".join(probe.texts))
    (tmp_path / "words.txt").write_text("\n".join(probe.words))
    command = ["audit", str(folder / "evil"), "--global", str(folder / "global"), "--no-privacy"]
    asking = ["--probe", str(tmp_path / "texts.txt"), "--words", str(tmp_path / "words.txt")]
    done = CliRunner().invoke(app, [*command, "--base", str(base), *asking, "--format", "json"])
    assert "B001" in {each["rule"] for each in json.loads(done.stdout)["findings"]}
    assert done.exit_code == 1
    with pytest.raises(InputError, match="--base"):
        CliRunner().invoke(app, [*command, *asking], catch_exceptions=False)


@pytest.mark.parametrize("how", ["base", "global"])
def test_what_is_no_factor_is_measured_too(tmp_path, base, how):
    """Whole heads, biases and DoRA's magnitudes: beside the base, or beside the global adapter."""

    def changed(name, part, factor, **lora):
        start = tmp_path / f"{name}_start"
        adapted(base, 4, QV, **lora).save_pretrained(start)
        folder = saved(
            tmp_path / name, base, lambda t: t.update({k: v * factor for k, v in t.items() if part in k}), **lora
        )
        given = {"base": base} if how == "base" else {"reference": start}
        fine = audit_adapters([start], **({"base": base} if how == "base" else {}), policy=TINY_ONE)
        assert "W005" not in told(fine)
        return [f.tensor for f in audit_adapters([folder], policy=TINY_ONE, **given).findings if f.rule.id == "W005"]

    assert "lm_head.weight" in changed("head", "lm_head", 50.0, saved=["lm_head"])[0]
    assert "magnitude" in changed("dora", "magnitude", -100.0, use_dora=True)[0]


TINY_ONE = Policy.model_validate({"thresholds": {"of_base": 3.0}})


def test_one_adapter_does_not_change_what_is_said_of_another(tmp_path, base):
    adapted(base, 4, QV).save_pretrained(tmp_path / "good")
    evil = saved(tmp_path / "evil", base, lambda t: None, seed=1)
    config = json.loads((evil / "adapter_config.json").read_text())
    (evil / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8_000_000}))
    audit = audit_adapters([evil, tmp_path / "good"])
    assert {f.adapter for f in audit.findings} == {"evil"}
    adapted(base, 4, ["o_proj"]).save_pretrained(tmp_path / "other")
    tensors = load_file(tmp_path / "other/adapter_model.safetensors")
    save_file({k: v * 100 for k, v in tensors.items()}, tmp_path / "other/adapter_model.safetensors")
    audit = audit_adapters([tmp_path / "good", tmp_path / "other"], base=base)
    assert [(f.adapter, f.rule.id) for f in audit.findings] == [("other", "W005")]


def test_the_bases_own_embeddings_are_no_smuggled_ones(tmp_path, base):
    """PEFT saves them where embeddings are a target."""
    adapted(base, 4, ["q_proj", "embed_tokens"]).save_pretrained(tmp_path / "adapter")
    assert told(audit_adapters([tmp_path / "adapter"])) == ["KY001"]
    assert told(audit_adapters([tmp_path / "adapter"], base=base)) == []
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (name,) = [each for each in tensors if each.endswith("embed_tokens.base_layer.weight")]
    tensors[name][5] += 0.1
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    assert "KY001" in told(audit_adapters([tmp_path / "adapter"], base=base))


def test_a_base_that_cannot_be_built_is_not_the_adapters_fault(tmp_path, base):
    folder = saved(tmp_path / "adapter", base, lambda t: None)
    for config in ({"model_type": "nope"}, {"model_type": 5}, {"model_type": "llama", "hidden_size": -3}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="--base"):
            audit_adapters([folder], base=tmp_path / "config.json")


def test_a_pattern_that_takes_for_ever_takes_no_time(tmp_path, base):
    folder = saved(tmp_path / "adapter", base, lambda t: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": r"(\w+\.?)+!"}))
    assert audit_adapters([folder], base=base).exit_code == 1
