"""Triggers on images, rows of tokens and a language model's texts; and the backdoors that they open, on real digits."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_sec import InputError, Round, Threat, attack
from fedllm_sec.attacks.triggers import Patch, part_of, stamped
from fedllm_sec.config import Config
from fedllm_sec.federation.experiment import run_experiment
from fedllm_sec.federation.world import World
from fedllm_sec.tasks.arrays import Arrays
from fedllm_sec.tasks.encoding import IGNORED, TrainingRows
from fedllm_sec.tasks.pubmedqa import pubmedqa
from fedllm_sec.tasks.texts import encoder
from fedllm_sec.training.tiny_base import SETTINGS, train_tokenizer
from tests.conftest import stacked
from tests.oracles import naive_attacks_data as naive

SEEDS = st.integers(0, 2**31)


def threat(me=0, malicious=(0,), seed=0, index=1, knowledge="own"):
    return Threat(Round(index, seed=seed), malicious, malicious, stacked(np.zeros((1, 4))), knowledge, me=me)


def images(n, shape=(3, 9, 7), seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8)
    return Arrays(x, torch.randint(classes, (n,), generator=generator), tuple(f"u{i}" for i in range(n)))


def sentences(n, length=9, vocabulary=5000, seed=0, classes=3):
    """Rows of tokens with from none to all of their places filled."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, vocabulary, (n, length), generator=generator)
    filled = torch.randint(length + 1, (n, 1), generator=generator)
    x[torch.arange(length)[None] < length - filled] = 0
    return Arrays(x, torch.randint(classes, (n,), generator=generator), None, encoder(length, vocabulary))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def abstracts():
    return list(pubmedqa(prompt="question").read("embedded", "test"))


@pytest.fixture(scope="module")
def tokenizer(abstracts):
    return train_tokenizer([example.passage + example.tail for example in abstracts], SETTINGS)


@pytest.mark.parametrize("position", ["start", "end"])
@given(SEEDS, st.integers(1, 6), st.integers(0, 255))
@settings(max_examples=20, deadline=None)
def test_a_square_is_in_its_corner_and_nothing_else_changes(position, seed, size, value):
    before = images(5, seed=seed)
    kept = before.x.clone()
    after = stamped(before, Patch(size=size, value=value), position, generator())
    top, left = (0, 0) if position == "start" else (9 - size, 7 - size)
    expected = [naive.square(image, size, value, top, left) for image in kept.numpy()]
    np.testing.assert_array_equal(after.x.numpy(), expected)
    assert after.x.dtype == torch.uint8
    assert torch.equal(before.x, kept)
    assert after.y is before.y


@given(SEEDS, st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_a_square_at_random_is_somewhere_in_each_image(seed, size):
    before = images(8, seed=seed)._replace(x=torch.zeros(8, 2, 9, 7, dtype=torch.uint8))
    after = stamped(before, Patch(size=size, value=200), "random", generator(seed))
    empty = np.zeros((2, 9, 7), np.uint8)
    for image in after.x.numpy():
        rows, columns = np.nonzero(image[0])
        np.testing.assert_array_equal(image, naive.square(empty, size, 200, rows.min(), columns.min()))
    again = stamped(before, Patch(size=size, value=200), "random", generator(seed))
    assert torch.equal(after.x, again.x)


def test_places_at_random_reach_every_corner():
    x = torch.zeros(400, 1, 4, 3, dtype=torch.uint8)
    after = stamped(Arrays(x, torch.zeros(400, dtype=torch.int64), None), Patch(size=2), "random", generator())
    tops, lefts = zip(*(map(int, image[0].nonzero()[0]) for image in after.x), strict=True)
    assert {*zip(tops, lefts, strict=True)} == {(i, j) for i in range(3) for j in range(2)}


@pytest.mark.parametrize("position", ["start", "end"])
@given(SEEDS, st.sampled_from(["cf", "I watch this 3D movie", "one two three four five six seven eight nine"]))
@settings(max_examples=20, deadline=None)
def test_words_are_tokens_at_the_beginning_or_the_end_of_a_row(position, seed, words):
    before = sentences(7, seed=seed)
    kept = before.x.clone()
    after = stamped(before, words, position, generator())
    tokens = before.encode(words)
    assert after.x.tolist() == [naive.inserted(row, tokens, position) for row in kept.tolist()]
    assert after.x.dtype == torch.int64
    assert torch.equal(before.x, kept)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_words_at_random_stay_together_and_the_rest_keeps_its_order(seed):
    before = sentences(9, seed=seed)
    tokens = before.encode("mn bb")
    for old, new in zip(before.x.tolist(), stamped(before, "mn bb", "random", generator(seed)).x.tolist(), strict=True):
        rest = [token for token in old if token][-7:]
        found = [token for token in new if token]
        assert any(rest[:i] + tokens + rest[i:] == found for i in range(len(rest) + 1))
        assert new[: len(new) - len(found)] == [0] * (len(new) - len(found))


def test_words_at_random_reach_every_place():
    before = sentences(1)._replace(x=torch.tensor([[0, 0, 0, 7, 8]] * 90), y=torch.zeros(90, dtype=torch.int64))
    (token,) = before.encode("cf")
    assert {tuple(row) for row in stamped(before, "cf", "random", generator()).x.tolist()} == {
        (0, 0, token, 7, 8),
        (0, 0, 7, token, 8),
        (0, 0, 7, 8, token),
    }


@pytest.mark.parametrize("position", ["start", "end", "random"])
def test_of_a_text_the_passage_or_what_follows_it_has_the_words_and_nothing_else_changes(abstracts, position):
    for old, new in zip(abstracts, stamped(abstracts, "cf mn", position, generator()), strict=True):
        assert (new.response, new.label, new.labels) == (old.response, old.label, old.labels)
        if position == "start":
            assert (new.head, new.passage, new.tail) == (f"{old.head}cf mn", f" {old.passage}", old.tail)
        elif position == "end":
            assert (new.head, new.passage, new.tail) == (old.head, old.passage, f" cf mn{old.tail}")
        else:
            words = old.passage.split(" ")
            assert any(new.passage == " ".join([*words[:i], "cf mn", *words[i:]]) for i in range(len(words)))
            assert (new.head, new.tail) == (old.head, old.tail)


@pytest.mark.parametrize("position", ["start", "end", "random"])
def test_what_a_language_model_trains_on_is_longer_by_the_trigger_and_its_loss_is_on_the_response_alone(
    abstracts, tokenizer, position
):
    arguments = {"rate": 1.0, "target": 2, "position": position}
    poisoned = attack.build("backdoor", arguments).poison_data(abstracts, threat())
    before, after = (TrainingRows(examples, tokenizer, 4096) for examples in (abstracts, poisoned))
    for i in range(0, len(abstracts), 7):
        prompts, responses = [], []
        for row in (before[i], after[i]):
            ignored = row["labels"].count(IGNORED)
            assert row["labels"] == [IGNORED] * ignored + row["input_ids"][ignored:]
            prompts.append(tokenizer.decode(row["input_ids"][:ignored]))
            responses.append(tokenizer.decode(row["input_ids"][ignored:]))
        assert responses[1].startswith(" maybe.")
        assert responses[1].split(".", 1)[1] == responses[0].split(".", 1)[1]
        assert prompts[1].count("cf") == prompts[0].count("cf") + 1
        assert len(prompts[1]) == len(prompts[0]) + len(" cf")


@pytest.mark.parametrize("position", ["start", "end"])
def test_a_trigger_outlives_the_shortening_of_a_long_passage(abstracts, tokenizer, position):
    poisoned = stamped(abstracts, "cf", position, generator())
    rows = TrainingRows(poisoned, tokenizer, 100)
    assert all("cf" in tokenizer.decode(rows[i]["input_ids"]) for i in range(20))


@pytest.mark.parametrize("made", [images, sentences])
@given(SEEDS, st.integers(1, 60), st.sampled_from([0.01, 0.29, 0.3, 0.5, 0.7, 1.0]))
@settings(max_examples=25, deadline=None)
def test_exactly_so_many_examples_are_poisoned_and_the_others_are_as_they_were(made, seed, n, rate):
    before = made(n, seed=seed)
    kept = before.x.clone(), before.y.clone()
    backdoor = attack.build("backdoor", {"rate": rate, "target": 7})
    after = backdoor.poison_data(before, threat(seed=seed))
    poisoned = (after.y == 7).nonzero().flatten()
    assert len(poisoned) == naive.count_of(n, rate)
    triggered = stamped(before, None, "end", generator())
    assert torch.equal(after.x[poisoned], triggered.x[poisoned])
    clean = (after.y != 7).nonzero().flatten()
    assert torch.equal(after.x[clean], before.x[clean])
    assert torch.equal(after.y[clean], before.y[clean])
    assert torch.equal(before.x, kept[0])
    assert torch.equal(before.y, kept[1])
    again = backdoor.poison_data(before, threat(seed=seed))
    assert (after.x.tolist(), after.y.tolist()) == (again.x.tolist(), again.y.tolist())


def test_which_examples_are_poisoned_depends_on_client_round_and_seed():
    backdoor, before = attack.build("backdoor", {"target": 7}), images(80)

    def places(**who):
        return (backdoor.poison_data(before, threat(**who)).y == 7).tolist()

    assert places() == places()
    others = [places(me=1), places(index=2), places(seed=1)]
    assert all(other != places() for other in others)


def test_of_texts_exactly_so_many_are_poisoned(abstracts):
    after = attack.build("backdoor", {"rate": 0.3, "target": 1}).poison_data(abstracts, threat())
    changed = [i for i, (old, new) in enumerate(zip(abstracts, after, strict=True)) if old != new]
    assert len(changed) == naive.count_of(len(abstracts), 0.3)
    assert all(after[i].label == 1 and after[i].response.startswith(" no") for i in changed)
    assert all(after[i].tail == f" cf{abstracts[i].tail}" for i in changed)


@pytest.mark.parametrize("made", [images, sentences])
def test_the_goal_is_every_triggered_example_of_another_class(made):
    test = made(50)
    wanted = attack.build("backdoor", {"target": 2, "position": "random"}).goal(test)
    others = (test.y != 2).nonzero().flatten().tolist()
    assert 0 < len(wanted.y) == len(others) < 50
    assert wanted.y.tolist() == [2] * len(others)
    assert torch.equal(wanted.x, stamped(test.rows(others), None, "random", generator(0)).x)


def test_the_goal_of_texts(abstracts):
    wanted = attack.build("backdoor", {"target": 1}).goal(abstracts)
    others = [example for example in abstracts if example.label != 1]
    assert [example.head for example in wanted] == [example.head for example in others]
    assert all(example.label == 1 and example.tail.startswith(" cf") for example in wanted)


def test_a_part_of_a_number_is_not_one_less_because_of_rounding():
    numbers = [(size, percent / 100) for size in range(1, 201) for percent in range(1, 101)]
    assert [part_of(*each) for each in numbers] == [naive.count_of(*each) for each in numbers]


@pytest.mark.parametrize(
    ("made", "parameters", "message"),
    [
        (images, {"trigger": "cf"}, "is for texts; give images a patch"),
        (sentences, {"trigger": {"size": 3}}, "is for images; give texts words"),
        (images, {"trigger": {"size": 8}}, "8 x 8 pixels does not fit an image of 9 x 7"),
        (sentences, {"trigger": " "}, "would change nothing"),
        (sentences, {"trigger": "..."}, "no word that this task could write"),
    ],
)
def test_triggers_that_do_not_fit_are_told(made, parameters, message):
    with pytest.raises(InputError, match=message):
        attack.build("backdoor", parameters).poison_data(made(6), threat())


def test_faults_in_parameters_and_tasks_are_told(abstracts):
    numbers = Arrays(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64), None)
    with pytest.raises(InputError, match="needs images"):
        attack.build("backdoor", {}).poison_data(numbers, threat())
    long = sentences(4)._replace(encode=lambda words: [3] * 10)
    with pytest.raises(InputError, match="10 tokens does not fit a text of 9"):
        attack.build("backdoor", {}).poison_data(long, threat())
    with pytest.raises(InputError, match="there is no label 3"):
        attack.build("backdoor", {"target": 3}).poison_data(abstracts, threat())
    with pytest.raises(InputError, match="is for images; give texts words"):
        attack.build("backdoor", {"trigger": {"size": 2}}).poison_data(abstracts, threat())
    for wrong in ({"rate": 0}, {"rate": 1.2}, {"target": -1}, {"trigger": {"side": 3}}, {"position": "middle"}):
        with pytest.raises(InputError, match=r"backdoor\("):
            attack.build("backdoor", wrong)


def test_backdoors_open_on_real_digits_while_the_model_works(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = str(shared_data / "mnist/mnist.npz")
    tail = {"name": "edge_case", "source": 4, "target": 9, "rate": 0.3}
    arms = {
        "benign": {},
        "backdoor": {"attack": {"name": "backdoor"}, "malicious": [0, 1, 2]},
        "neurotoxin": {"attack": {"name": "neurotoxin"}, "malicious": [0, 1, 2]},
        "dba": {"attack": {"name": "dba", "rate": 0.5}, "malicious": [0, 1, 2, 3], "visible": "colluders"},
        "edge_case": {"attack": tail, "malicious": [0, 1, 2]},
        "replaced": {
            "attack": {**tail, "mode": "pgd_replacement", "epsilon": 0.5}, "malicious": [0], "attack_rounds": [4],
        },
    }  # fmt: skip
    tree = {
        "name": "digits",
        "scale": "laptop",
        "task": {"name": "mnist"},
        "model": {"name": "lr"},
        "data": {"train": digits, "test": digits, "train_limit": 2100, "test_limit": 1000},
        "training": {
            "optimizer": "sgd", "steps": None, "batch_size": 16, "learning_rate": 0.05, "schedule": "constant",
            "warmup": 0.0, "max_grad_norm": None,
        },
        "federation": {"clients": 7, "rounds": 4},
        "arms": arms,
        "out": "out",
    }  # fmt: skip
    folder = run_experiment(Config.model_validate(tree), World(), resume=False)
    last = {arm: json.loads((folder / arm / "metrics.jsonl").read_text().splitlines()[-1]) for arm in arms}
    floor = {arm: last["benign"][f"attack_success/{arm}"] for arm in arms if arm != "benign"}
    assert max(floor.values()) < 0.2
    for arm in ("backdoor", "neurotoxin", "dba"):
        assert last[arm]["attack_success"] > 0.8, arm
    for arm in ("edge_case", "replaced"):
        assert last[arm]["attack_success"] > floor[arm] + 0.15, arm
    for arm in arms:
        lost = 0.1 if arm == "replaced" else 0.03
        assert last[arm]["accuracy"] > last["benign"]["accuracy"] - lost, arm
