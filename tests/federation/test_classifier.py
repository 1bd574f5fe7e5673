"""A federation of a model that classifies: its head is a part of the update, with LoRA, and of course without."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedllm_sec import InputError, open_updates
from fedllm_sec.attacks.triggers import stamped
from fedllm_sec.config import resolve
from fedllm_sec.federation.experiment import run_experiment
from fedllm_sec.federation.world import World
from fedllm_sec.settings import LoraSettings, ModelSettings, TrainingSettings
from fedllm_sec.tasks import posts
from fedllm_sec.tasks.forms import ClassForm, around
from fedllm_sec.tasks.task import Example
from fedllm_sec.tasks.tiny_posts import news
from fedllm_sec.training.base_model import load_base
from fedllm_sec.training.client import train_client
from tests.launch import ROOT

EXP08 = ROOT / "configs/exp08_bert_20news.yaml"
HEAD = {"base_model.model.classifier.weight": (20, 96), "base_model.model.classifier.bias": (20,)}
POOLER = {"base_model.model.bert.pooler.dense.weight": (96, 96), "base_model.model.bert.pooler.dense.bias": (96,)}


@pytest.fixture
def run(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(*arguments, arms=("benign",), **how):
        short = [f"model.path={bert}", "data.train_limit=80", "data.test_limit=30", "federation.clients=4"]
        short += ["federation.rounds=1", "training.steps=2", "training.batch_size=4", "data.train=embedded"]
        short += ["data.test=embedded", "task.max_length=32"]
        config = resolve(EXP08, [*short, *arguments], "local")
        config = config.model_copy(update={"arms": {name: config.arms[name] for name in arms}})
        return run_experiment(config, World(), **how)

    return start


def mean_of(folder, name):
    """The weighted mean of what clients sent, in float64."""
    states = [load_file(path / name) for path in sorted(folder.glob("round_0001/client_*"))]
    claims = [json.loads((path / "client.json").read_text()) for path in sorted(folder.glob("round_0001/client_*"))]
    total = sum(claim["num_samples"] for claim in claims)
    return {
        key: sum(
            state[key].double() * claim["num_samples"] / total for state, claim in zip(states, claims, strict=True)
        )
        for key in states[0]
    }


def test_the_head_is_sent_averaged_and_loaded_by_peft(run, bert):
    folder = run() / "benign"
    sent = load_file(folder / "round_0001/client_02/adapter_model.safetensors")
    drawn = {**HEAD, **POOLER}  # a BERT that fills in words has no pooler
    assert {name: tuple(sent[name].shape) for name in sent if ".lora_" not in name} == drawn
    start, after = (load_file(folder / f"global_000{i}/adapter_model.safetensors") for i in (0, 1))
    expected = mean_of(folder, "adapter_model.safetensors")
    for name, value in after.items():
        assert torch.allclose(value.double(), expected[name], atol=1e-7), name
        assert not torch.equal(value, start[name]), name
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=20)
    loaded = PeftModel.from_pretrained(base, folder / "global_0001")
    head = loaded.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, after["base_model.model.classifier.weight"])
    judged = [loaded(input_ids=torch.tensor([[5, 6, 7]])).logits]
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(bert, num_labels=20), folder / "global_0001"
    )
    assert torch.equal(judged[0], again(input_ids=torch.tensor([[5, 6, 7]])).logits)  # nothing is drawn anew
    config = json.loads((folder / "global_0001/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "classifier" in config["modules_to_save"]


def test_the_same_configuration_gives_the_same_bytes_and_another_seed_another_head(run):
    one, same = run("out=one"), run("out=same")
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert len(files) == 6
    assert all((one / path).read_bytes() == (same / path).read_bytes() for path in files)
    other = run("out=other", "seed=1")
    heads = [load_file(x / "benign/global_0000/adapter_model.safetensors")[next(iter(HEAD))] for x in (one, other)]
    assert not torch.equal(*heads)


@pytest.mark.parametrize("space", ["factors", "product"])
def test_defenses_see_the_head(run, space):
    """A client whose LoRA is as all others' and whose head is huge is not kept."""
    folder = run() / "benign"
    received, clients = folder / "global_0000", sorted(folder.glob("round_0001/client_*"))
    state = load_file(clients[1] / "adapter_model.safetensors")
    state["base_model.model.classifier.bias"] += 1e3
    save_file(state, clients[1] / "adapter_model.safetensors")
    updates = open_updates(clients, reference=received, space=space)
    lengths = updates.gram.diagonal().sqrt()
    assert lengths[1] > 4000 > lengths[0]
    assert set(HEAD) < {name for name, _ in updates.layout.shapes}


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_an_update_without_the_head_or_with_another_is_refused(run, fault):
    folder = run() / "benign"
    path = folder / "round_0001/client_01/adapter_model.safetensors"
    state = load_file(path)
    name = "base_model.model.classifier.weight"
    state[name] = state[name][:10].clone()
    if fault == "missing":
        del state[name]
    save_file(state, path)
    with pytest.raises(InputError, match=r"client_01: .*classifier.weight"):
        open_updates(sorted(folder.glob("round_0001/client_*")), reference=folder / "global_0000")


def test_the_backdoor_is_trained_boosted_and_measured(run):
    """What the server receives is the boosted update of one that was trained on posts with the trigger."""
    arms = ("benign", "attacked", "defended")
    both = ["arms.attacked.attack_rounds.first=1", "arms.defended.attack_rounds.first=1", "federation.clients=8"]
    both += [f"arms.{arm}.own_training.steps=3" for arm in arms[1:]]
    folder = run(*both, "arms.defended.defenses=[{name: krum, m: 2, f: 1}]", arms=arms)
    rows = {arm: json.loads((folder / arm / "metrics.jsonl").read_text().splitlines()[1]) for arm in arms}
    assert "attack_success" in rows["attacked"]
    assert "attack_success/attacked" in rows["benign"]
    (poisoned,) = (folder / "attacked/round_0001").glob("poisoned_*")
    client = poisoned.name.removeprefix("poisoned_")
    honest, evil, start = (
        load_file(path / "adapter_model.safetensors")
        for path in (
            folder / f"benign/round_0001/client_{client}",
            folder / f"attacked/round_0001/client_{client}",
            folder / "attacked/global_0000",
        )
    )
    sent = load_file(poisoned / "adapter_model.safetensors")
    for name in HEAD:
        assert not torch.equal(honest[name], evil[name])
        assert torch.allclose(sent[name] - start[name], 8 * (evil[name] - start[name]), atol=1e-5)
    claims = json.loads((folder / f"attacked/round_0001/client_{client}/client.json").read_text())
    assert claims["steps"] == 3  # of its own
    decision = json.loads(next((folder / "defended/round_0001").glob("*/decision.json")).read_text())
    assert f"client_{client}" not in str(decision["kept"])


def test_a_model_trained_whole_is_a_folder_of_transformers(run, bert):
    folder = run("model.lora=null", "training.learning_rate=1e-4") / "benign"
    after, expected = load_file(folder / "global_0001/model.safetensors"), mean_of(folder, "model.safetensors")
    assert "bert.embeddings.word_embeddings.weight" in after
    for name, value in after.items():
        assert torch.allclose(value.double(), expected[name], atol=1e-7), name
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "global_0001")
    assert type(loaded).__name__ == "BertForSequenceClassification"
    assert loaded.config.id2label[11] == "sci.crypt"
    for name, value in loaded.named_parameters():
        assert torch.equal(value, after[name]), name


def test_a_target_that_there_is_not_is_told_before_the_folder_is_begun(run, tmp_path):
    with pytest.raises(InputError, match="there is no label 25"):
        run("arms.attacked.attack.target=25", "out=mine", arms=("benign", "attacked"))
    assert not (tmp_path / "mine").exists()
    run("arms.attacked.attack_rounds.first=1", "out=mine", arms=("benign", "attacked"))


def test_a_4_bit_base_keeps_what_its_checkpoint_lacks_in_full(bert):
    pytest.importorskip("bitsandbytes")
    settings = ModelSettings(path=str(bert), load_in_4bit=True, lora=LoraSettings(target_modules=("query",)))
    base = load_base(settings, str(bert), seed=0, classes=posts.NAMES)
    assert {parameter.dtype for parameter in base.parameters.values()} == {torch.float32}
    base.model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([3])).loss.backward()
    assert base.parameters["base_model.model.bert.pooler.dense.weight"].grad.any()


@pytest.mark.parametrize("fault", ["federation.space=product", "model.load_in_4bit=true"])
def test_what_needs_an_adapter_is_refused_without_one(run, fault):
    with pytest.raises(InputError, match=r"model\.lora=null"):
        run("model.lora=null", fault)


def test_long_posts_keep_their_head_or_their_tail_and_a_trigger_at_the_start_is_read(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    text = " ".join(news("test", 1).texts[:3])
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    example = Example("", text, "", "sci.med", 13)
    (head,), (tail,) = (ClassForm(tokenizer, 20, keep).encode([example]) for keep in ("head", "tail"))
    assert head.prompt == [cls, *plain[:18], sep]
    assert tail.prompt == [cls, *plain[-18:], sep]
    assert head.cut == len(plain) - 18
    short = ClassForm(tokenizer, 400, "tail").encode([example])[0]
    assert short.prompt == tokenizer(text)["input_ids"]
    for keep in ("head", "tail"):
        for position in ("start", "end"):
            (poisoned,) = stamped([example], "cf", position, torch.Generator())
            (item,) = ClassForm(tokenizer, 20, keep).encode([poisoned])
            assert tokenizer.decode(item.prompt).count("cf") == 1
    (row,) = ClassForm(tokenizer, 20, "head").rows([example])
    assert row == {"input_ids": head.prompt, "labels": 13}
    with pytest.raises(InputError, match=r"even without its passage, but task\.max_length is 8"):
        ClassForm(tokenizer, 8, "head").encode([Example("", "a", " ".join("bcdefghijk"), "x", 0)])


def test_a_tokenizer_that_adds_nothing_adds_nothing(small):
    tokenizer = AutoTokenizer.from_pretrained(small[0].partition("=")[2])
    assert around(tokenizer) == ([], [])


def test_scores_are_those_of_one_text_at_a_time(bert):
    """Padding and batches change nothing: against transformers' own loss, one post at a time."""
    base = load_base(ModelSettings(path=str(bert)), str(bert), seed=0, classes=posts.NAMES)
    form = ClassForm(base.tokenizer, 40, "head")
    made = news("test", 1)
    examples = [
        Example("", text[: 20 * i + 5], "", posts.NAMES[i], i)
        for i, text in zip(made.labels[:7], made.texts, strict=False)
    ]
    encoded = form.encode(examples)
    base.model.eval()
    scores = form.score(base.model, encoded)
    for example, item, score in zip(examples, encoded, scores, strict=True):
        one = base.model(input_ids=torch.tensor([item.prompt]), labels=torch.tensor([example.label]))
        assert score.nll == pytest.approx(one.loss.item(), rel=1e-5)
        assert max(range(20), key=score.labels.__getitem__) == int(one.logits.argmax())
    measured = form.metrics(scores, encoded)
    assert measured.keys() == {"test_loss", "accuracy", "macro_f1", "majority_accuracy"}


def test_two_halves_of_a_batch_train_what_the_whole_trains(bert):
    """`Trainer` takes a classifier's mean loss for a part of a sum: the halves would count twice."""
    settings = ModelSettings(path=str(bert), lora=LoraSettings(dropout=0.0))
    base = load_base(settings, str(bert), seed=0, classes=posts.NAMES)
    form, made, start = ClassForm(base.tokenizer, 16, "head"), news("test", 1), base.adapter()
    rows = form.rows([Example("", made.texts[i], "", posts.NAMES[i], i) for i in range(8)])
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": None, "schedule": "constant", "warmup": 0.0}
    changes = []
    for size, parts in ((8, 1), (4, 2)):
        how = TrainingSettings(steps=1, batch_size=size, gradient_accumulation=parts, **sgd)
        turn = train_client(base, rows, start, how, seed=5, rounds_done=0, rounds=1)
        changes.append(torch.cat([(turn.adapter[name] - start[name]).flatten() for name in start]))
    assert float(changes[0].norm()) > 1e-3
    assert float((changes[0] - changes[1]).norm()) < 1e-4 * float(changes[0].norm())


def test_a_head_beside_a_bfloat16_base_is_trained_in_float32(bert, monkeypatch):
    from fedllm_sec.training import base_model

    monkeypatch.setattr(base_model, "load_dtype", lambda settings: torch.bfloat16)
    settings = ModelSettings(path=str(bert), lora=LoraSettings(target_modules=("query",)))
    base = load_base(settings, str(bert), seed=0, classes=posts.NAMES)
    assert base.model.base_model.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in base.parameters.values()} == {torch.float32}
    base.model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([3])).loss.backward()
    head = base.parameters["base_model.model.classifier.weight"]
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


def test_a_checkpoint_with_other_classes_is_an_error(bert, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(ModelSettings(path=str(tmp_path)), str(tmp_path), seed=0, classes=posts.NAMES)


def test_real_posts_have_the_names_of_their_groups(shared_data):
    from fedllm_sec.tasks.readers import file_columns

    columns = file_columns(shared_data / "20newsgroups/20news-bydate-test.parquet")
    assert {posts.NAMES[label] for label in columns["label"]} == set(posts.NAMES)
    assert all(
        posts.NAMES[label] == name.removeprefix("20news-bydate-test/")
        for label, name in zip(columns["label"], columns["group"], strict=True)
    )
