"""Sentiment140 and 20 Newsgroups: public forms, hashing, stripping, and the real sets."""

import json
import re
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import _twenty_newsgroups as rules

from fedllm_sec import InputError
from fedllm_sec.tasks import sources, task, train_and_test
from fedllm_sec.tasks.posts import stripped
from fedllm_sec.tasks.texts import hashed

POST = "From: a@b.c (A)\nSubject: Re: cars\n\nJoe writes:\n> old\nnew words\n\n-- \nA, The Institute\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(name, source, split="train", **parameters):
    return task.build(name, parameters).read(source, split)


def naive(text, length, vocabulary):
    words = re.findall(r"[\w']+|[!?]", text.lower())[:length]
    ids = [1 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % (vocabulary - 1) for word in words]
    return [0] * (length - len(ids)) + ids


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.integers(1, 9), st.integers(2, 999))
def test_hashing_is_the_documented_one(texts, length, vocabulary):
    tokens = hashed(texts, length, vocabulary)
    assert tokens.tolist() == [naive(text, length, vocabulary) for text in texts]
    assert tokens.dtype == torch.int64


def test_a_word_is_the_same_token_on_every_machine_and_whatever_else_is_there():
    assert hashed(["Hello!"], 2, 16384).tolist() == [[1 + 0x3610A686 % 16383, 1 + zlib.crc32(b"!") % 16383]]
    assert hashed(["unseen", "hello"], 1, 16384)[1].tolist() == hashed(["hello"], 1, 16384)[0].tolist()


TWEETS = [("bad day", 0, "u"), ("good day!", 4, "v"), ("a day", 2, "u"), ("fine", 4, "u")]
FORMS = {
    "hub": [{"text": t, "date": "", "user": u, "sentiment": s, "query": "NO_QUERY"} for t, s, u in TWEETS],
    "label": [{"text": t, "label": min(s, 1), "user": u} for t, s, u in TWEETS if s != 2],
    "by user": [
        {"user": "u", "text": ["bad day", "fine"], "label": [0, 1]},
        {"user": "v", "text": ["good day!"], "label": [1]},
    ],
}


@pytest.mark.parametrize("form", [*FORMS, "LEAF"])
def test_every_public_form_gives_the_same_tweets(tmp_path, form):
    if form == "LEAF":
        data = {}
        for text, sentiment, user in TWEETS:
            if sentiment != 2:
                own = data.setdefault(user, {"x": [], "y": []})
                own["x"].append(["1467", "Mon Apr 06", "NO_QUERY", user, text])
                own["y"].append(min(sentiment, 1))
        (tmp_path / "a.json").write_text(json.dumps({"users": list(data), "user_data": data}))
        source = str(tmp_path / "a.json")
    else:
        source = write(tmp_path / "a.jsonl", FORMS[form])
    arrays = read("sentiment140", source, length=4, vocabulary=50)
    rows = {(tuple(x.tolist()), int(y), u) for x, y, u in zip(arrays.x, arrays.y, arrays.users, strict=True)}
    assert rows == {(tuple(naive(t, 4, 50)), min(s, 1), u) for t, s, u in TWEETS if s != 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 1, "user": None}, "row 0 has no user"),
        ({"text": "a", "label": 3}, "row 0 has sentiment 3; 0 is negative, 2 neutral, 1 or 4 positive"),
        ({"text": "a", "label": 0.5}, "row 0 has sentiment 0.5"),
        ({"text": "a", "label": "good"}, "row 0 has sentiment 'good'"),
        ({"text": "a", "label": None}, "row 0 has sentiment None"),
        ({"text": None, "label": 1}, "row 0 is 'None', not a text"),
        ({"text": ["a"], "label": [0, 1]}, "row 0 has not as many texts as labels"),
        ({"text": "a", "label": [0]}, "row 0 has not as many texts as labels"),
        ({"text": "a", "label": 2}, "has neither negative nor positive tweets"),
        ({"words": "a", "label": 2}, "has no column text or x; it has words, label"),
        ({"text": "a"}, "has no column sentiment or label or y"),
    ],
)
def test_rows_that_are_no_tweets_are_told(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read("sentiment140", write(tmp_path / "a.jsonl", [row]))


def test_posts_are_stripped_by_sklearns_rules_in_its_order():
    expected = rules.strip_newsgroup_quoting(rules.strip_newsgroup_footer(rules.strip_newsgroup_header(POST)))
    assert stripped(POST, ("headers", "footers", "quotes")) == expected == "new words\n"
    assert stripped(POST, ()) == POST
    assert stripped(POST, ("headers",)) == rules.strip_newsgroup_header(POST)
    assert stripped(POST, ("quotes",)) == rules.strip_newsgroup_quoting(POST)


def test_posts_that_were_stripped_are_not_stripped_again(tmp_path):
    """SetFit's rows have neither headers nor signatures; twice stripped they would lose paragraphs."""
    bodies = ["Note: the first.\n\nThe second.\n\nThe last.", "From: a\nSubject: forwarded\n\nMore.", "Short."]
    source = write(tmp_path / "a.jsonl", [{"text": body, "label": 0} for body in bodies])
    assert read("20news", source, length=9).x.tolist() == [naive(body, 9, 32768) for body in bodies]


def test_remove_is_a_parameter(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": POST, "label": 7, "label_text": "rec.autos"}])
    clean = read("20news", source, length=5, vocabulary=99)
    whole = read("20news", source, length=5, vocabulary=99, remove=[])
    assert clean.x.tolist() == [naive("new words", 5, 99)]
    assert whole.x.tolist() == [naive("From a b c A", 5, 99)]
    assert clean.y.tolist() == [7]
    assert clean.users is None
    with pytest.raises(InputError, match="remove"):
        read("20news", source, remove=["signatures"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 20}, "row 0 has label 20, but classes are 0 to 19"),
        ({"text": "a", "label": "rec.autos"}, "labels are not whole numbers"),
        ({"text": 3, "label": 1}, "row 0 is '3', not a text"),
        ({"text": "a"}, "has no column label"),
    ],
)
def test_rows_that_are_no_posts_are_told(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read("20news", write(tmp_path / "a.jsonl", [row]))


@pytest.mark.parametrize(("name", "classes"), [("sentiment140", 2), ("20news", 20)])
def test_the_embedded_texts_can_be_learned_and_are_not_trivial(caplog, name, classes):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    sources.warn_of_stand_in.cache_clear()
    train, test = train_and_test(task.build(name, {}), "embedded", "embedded")
    assert len(caplog.records) == 1
    assert set(train.y.tolist()) == set(test.y.tolist()) == set(range(classes))
    assert (train.users is None) == (name == "20news")
    counter = CountVectorizer(analyzer=lambda row: [token for token in row.tolist() if token])
    judge = MultinomialNB().fit(counter.fit_transform(train.x), train.y)
    accuracy = judge.score(counter.transform(test.x), test.y)
    assert accuracy > 0.8
    assert accuracy < 1 or name == "20news"
    assert torch.equal(train_and_test(task.build(name, {}), "embedded", None)[0].x, train.x)


def test_the_real_tweets(shared_data):
    source = str(shared_data / "sent140_leaf" / "sent140_test_by_user.jsonl.gz")
    arrays = read("sentiment140", source)
    assert len(arrays.x) == 16_025
    assert len(set(arrays.users)) == 2_875
    assert set(arrays.y.tolist()) == {0, 1}
    assert (arrays.x[:, -1] == 0).float().mean() < 0.01  # hardly a tweet is without words
    kept, held = train_and_test(task.build("sentiment140", {}), source, None)
    assert len(kept.x) + len(held.x) == 16_025
    assert set(held.users) <= set(kept.users)


def test_the_real_newsgroups(shared_data):
    work = task.build("20news", {})
    train, test = train_and_test(work, str(shared_data / "20newsgroups"), None)
    assert (len(train.x), len(test.x)) == (11_314, 7_532)
    known = [480, 584, 591, 590, 578, 593, 585, 594, 598, 597, 600, 595, 591, 594, 593, 599, 546, 564, 465, 377]
    assert torch.bincount(train.y).tolist() == known  # scikit-learn's
    assert 0.01 < float((test.x == 0).all(dim=1).float().mean()) < 0.05  # posts of quotations alone are empty


def test_every_real_post_is_seen_to_be_raw(shared_data):
    from fedllm_sec.tasks.posts import is_raw

    folder = shared_data / "20newsgroups"
    for split in ("train", "test"):
        texts = sources.read_columns(str(folder), split)["text"]
        assert all(map(is_raw, texts))
        clean = [stripped(text, ("headers", "footers", "quotes")) for text in texts]
        assert sum(map(is_raw, clean)) < 0.01 * len(clean)  # posts that quote another one's header
