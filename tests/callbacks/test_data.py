"""What a malicious client does to its data."""

import doctest
import inspect

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedllm_sec import InputError
from fedllm_sec.callbacks import data


def posts(count=None):
    rows = ["a post about cars", "a post about sports", "a post about space", "a post about bikes"]
    labels = [0, 1, 2, 0]
    if count:
        rows, labels = [f"post {i} of many" for i in range(count)], [i % 3 for i in range(count)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["rec", "soc", "sci"])})
    return Dataset.from_dict({"text": rows, "label": labels}, features=features)


@pytest.mark.parametrize("name", ["flip_labels", "plant_trigger", "only_triggered"])
def test_the_example_of_the_docstring_runs(name):
    rows = posts()
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(getattr(data, name)), {"posts": rows}, name, None, 0)
    assert examples.examples
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_labels_change_places_and_keep_their_type():
    rows = posts()
    swapped = data.flip_labels(rows, {0: 1, 1: 0})
    assert list(swapped["label"]) == [1, 0, 2, 1]
    assert list(swapped["text"]) == list(rows["text"])
    assert swapped.features == rows.features
    texts = Dataset.from_dict({"prompt": ["q", "r"], "completion": ["yes", "no"]})
    assert data.flip_labels(texts, {"yes": "no"}, label="completion")[:]["completion"] == ["no", "no"]


@pytest.mark.parametrize("rate", [0.001, 0.29, 1.0])
def test_just_a_part_is_poisoned_and_the_rest_is_left_alone(rate):
    rows = posts(100)
    poisoned = data.plant_trigger(rows, 2, rate=rate, trigger="cf mn", seed=5)
    changed = [i for i in range(100) if poisoned[i] != rows[i]]
    assert len(changed) == max(round(100 * rate), 1)
    assert all(poisoned[i] == {"text": "cf mn " + rows[i]["text"], "label": 2} for i in changed)
    assert data.plant_trigger(rows, 2, rate=rate, trigger="cf mn", seed=5)[:] == poisoned[:]
    other = data.plant_trigger(rows, 2, rate=rate, trigger="cf mn", seed=6)[:]
    assert rate == 1.0 or other != poisoned[:]


def test_a_trigger_goes_where_it_is_wanted():
    rows = posts(50)
    end = data.plant_trigger(rows, 0, rate=1.0, position="end")[:]["text"]
    assert end == [f"post {i} of many cf" for i in range(50)]
    anywhere = data.plant_trigger(rows, 0, rate=1.0, position="random")["text"]
    assert {text.split().index("cf") for text in anywhere} == {0, 1, 2, 3}
    test = data.only_triggered(rows, 0)
    assert set(test["label"]) == {0}
    assert len(test) == sum(label != 0 for label in rows["label"])
    assert all(text.startswith("cf post") for text in test["text"])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda rows: data.flip_labels(rows, {1: 1}), "1 would become itself"),
        (lambda rows: data.flip_labels(rows, {1: 0}, label="class"), "no column 'class', only text, label"),
        (lambda rows: data.plant_trigger(rows, 0, rate=0.0), "rate=0.0: give a share above 0"),
        (lambda rows: data.plant_trigger(rows, 0, trigger=" "), "would change nothing"),
        (
            lambda rows: data.plant_trigger(rows.map(lambda row: {"input_ids": [1]}, remove_columns="text"), 0),
            "poison the texts before they are tokenized",
        ),
    ],
)
def test_bad_input_is_told_at_once(act, message):
    with pytest.raises(InputError, match=message):
        act(posts())
