"""A distributed backdoor: its parts are the authors', each colluder plants one, and all of them are the trigger."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_sec import InputError, attack
from fedllm_sec.attacks.dba import Bars, stamped_with
from fedllm_sec.core import check_granted
from fedllm_sec.tasks.arrays import Arrays
from tests.attacks.test_triggers import abstracts, generator, images, sentences, threat  # noqa: F401
from tests.oracles import naive_attacks_data as naive

MNIST = [[(0, 0), (0, 1), (0, 2), (0, 3)], [(0, 6), (0, 7), (0, 8), (0, 9)],
         [(3, 0), (3, 1), (3, 2), (3, 3)], [(3, 6), (3, 7), (3, 8), (3, 9)]]  # fmt: skip  # the authors' mnist_params
CIFAR = [[(0, i) for i in range(6)], [(0, i) for i in range(9, 15)],
         [(4, i) for i in range(6)], [(4, i) for i in range(9, 15)]]  # fmt: skip  # and cifar_params


def black(n, height=28, width=28, channels=1):
    return Arrays(torch.zeros(n, channels, height, width, dtype=torch.uint8), torch.ones(n, dtype=torch.int64), None)


def lit(image):
    return {tuple(place) for place in image[0].nonzero().tolist()}


@pytest.mark.parametrize(("bars", "parts"), [(None, MNIST), (Bars(size=6, gap=3), CIFAR)])
def test_the_lines_are_the_authors(bars, parts):
    for part, places in enumerate(parts):
        after = stamped_with(black(2), bars, part, "start", generator())
        assert [lit(image) for image in after.x] == [set(places)] * 2
    whole = stamped_with(black(1), bars, None, "start", generator())
    assert lit(whole.x[0]) == {place for places in parts for place in places}


@given(st.integers(1, 5), st.integers(0, 4), st.sampled_from(["start", "end", "random"]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_parts_make_the_whole_and_do_not_overlap(size, gap, position, seed):
    bars = Bars(size=size, gap=gap, value=9)
    parts = [lit(stamped_with(black(1, 20, 20), bars, k, position, generator(seed)).x[0]) for k in range(4)]
    whole = lit(stamped_with(black(1, 20, 20), bars, None, position, generator(seed)).x[0])
    assert [len(part) for part in parts] == [size] * 4
    assert len(whole) == 4 * size
    assert set.union(*parts) == whole
    if position == "end":
        assert max(whole) == (19, 19)


@pytest.mark.parametrize("made", [images, sentences])
def test_each_colluder_plants_the_part_of_its_place_and_those_beyond_begin_again(made):
    colluders = (1, 4, 5, 8, 9, 11)
    given_ = {"trigger": {"size": 2, "gap": 1}} if made is images else {"trigger": "one two three"}
    dba = attack.build("dba", {**given_, "target": 7, "rate": 0.4, "position": "end"})
    trigger, parts = (Bars(size=2, gap=1), 4) if made is images else ("one two three", 3)
    for place, client in enumerate(colluders):
        before = made(30)
        kept = before.x.clone()
        after = dba.poison_data(before, threat(client, colluders, knowledge="colluders"))
        assert torch.equal(before.x, kept)
        poisoned = (after.y == 7).nonzero().flatten()
        assert len(poisoned) == naive.count_of(30, 0.4)
        expected = stamped_with(before, trigger, place % parts, "end", generator())
        assert torch.equal(after.x[poisoned], expected.x[poisoned])
        clean = (after.y != 7).nonzero().flatten()
        assert torch.equal(after.x[clean], before.x[clean])


def test_of_texts_each_has_one_word_and_the_goal_has_all(abstracts):  # noqa: F811
    dba, colluders = attack.build("dba", {"rate": 1.0, "target": 1}), (0, 2, 5, 6, 7)
    for client, word in zip(colluders, ["cf", "mn", "bb", "tq", "cf"], strict=True):
        after = dba.poison_data(abstracts, threat(client, colluders, knowledge="colluders"))
        assert all(
            (new.head, new.passage) == (f"{old.head}{word}", f" {old.passage}")
            for old, new in zip(abstracts, after, strict=True)
        )
        assert {new.label for new in after} == {1}
    others = [example for example in abstracts if example.label != 1]
    assert [new.head for new in dba.goal(abstracts)] == [f"{old.head}cf mn bb tq" for old in others]


def test_words_at_random_are_apart(abstracts):  # noqa: F811
    wanted = attack.build("dba", {"position": "random", "target": 1}).goal(abstracts)
    words = [example.passage.split(" ") for example in wanted]
    assert all({"cf", "mn", "bb", "tq"} <= set(each) for each in words)
    assert sum("cf mn bb tq" in example.passage for example in wanted) < len(wanted) / 4


def test_the_goal_of_images_has_all_lines_and_not_the_target():
    test = black(6)._replace(y=torch.tensor([0, 1, 2, 0, 1, 2]))
    wanted = attack.build("dba", {"target": 2}).goal(test)
    assert wanted.y.tolist() == [2] * 4
    assert [lit(image) for image in wanted.x] == [{place for part in MNIST for place in part}] * 4


def test_faults_are_told(abstracts):  # noqa: F811
    with pytest.raises(InputError, match="has 1 words; give it two or more"):
        attack.build("dba", {"trigger": "cf"})
    together = threat(0, (0, 1), knowledge="colluders")
    with pytest.raises(InputError, match=r"is for texts; give images lines"):
        attack.build("dba", {"trigger": "cf mn"}).poison_data(images(4), together)
    with pytest.raises(InputError, match="is for images; give texts words"):
        attack.build("dba", {"trigger": {"size": 2}}).poison_data(abstracts, together)
    with pytest.raises(InputError, match="4 x 10 pixels does not fit an image of 9 x 7"):
        attack.build("dba", {}).poison_data(images(4), together)
    with pytest.raises(InputError, match="sees the updates of all malicious clients"):
        check_granted(attack.build("dba", {}), "own")


def test_it_draws_by_client_and_seed():
    dba, before = attack.build("dba", {"target": 7, "trigger": {"size": 1}}), images(80)

    def places(client=0, seed=0):
        return (dba.poison_data(before, threat(client, (0, 1), seed, knowledge="colluders")).y == 7).tolist()

    assert places() == places()
    assert places(client=1) != places() != places(seed=1)
    assert np.mean(places()) == pytest.approx(20 / 64)


def test_no_word_pushes_another_one_out_of_a_full_row():
    words = {"cf": 91, "mn": 92, "bb": 93, "tq": 94}
    full = Arrays(torch.arange(1, 9).repeat(40, 1), torch.ones(40, dtype=torch.int64), None, lambda w: [words[w]])
    test = attack.build("dba", {"position": "random"}).goal(full)
    assert test.x.shape == full.x.shape
    for row in test.x.tolist():
        assert {91, 92, 93, 94} <= set(row)
        assert [token for token in row if token < 90] == [5, 6, 7, 8]
