"""PubMedQA in all its public forms, and the prompts made of it."""

import gzip
import json

import pytest

from fedllm_sec import InputError
from fedllm_sec.tasks import task

ROW = {
    "pubid": 1,
    "question": "Does it?",
    "contexts": ["One.", "Two."],
    "long_answer": "It does.",
    "final_decision": "no",
}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def read(source, **parameters):
    return task.build("pubmedqa", parameters).read(source, "train")


FORMS = {
    "jsonl": lambda folder: write(folder / "rows.jsonl", [ROW]),
    "jsonl.gz": lambda folder: write(folder / "rows.jsonl.gz", [ROW]),
    "nested": lambda folder: write(
        folder / "hub.jsonl",
        [{**{k: v for k, v in ROW.items() if k != "contexts"}, "context": {"contexts": ROW["contexts"], "labels": []}}],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_public_form_gives_the_same_example(tmp_path, form):
    (example,) = read(FORMS[form](tmp_path), prompt="question")
    assert example.head + example.passage + example.tail == "Abstract: One. Two.\nQuestion: Does it?\nAnswer:"
    assert example.response == " no. It does."
    assert example.label == 1


def test_the_official_file_and_parquet(tmp_path):
    official = {"1": {key.upper(): value for key, value in ROW.items() if key not in ("pubid", "final_decision")}}
    official["1"]["final_decision"] = "no"
    (tmp_path / "ori_pqal.json").write_text(json.dumps(official))
    import datasets

    datasets.Dataset.from_list([ROW]).to_parquet(tmp_path / "rows.parquet")
    assert list(read(str(tmp_path / "ori_pqal.json"))) == list(read(str(tmp_path / "rows.parquet")))


def test_the_original_template_and_the_choice_of_response(tmp_path):
    source = FORMS["jsonl"](tmp_path)
    (example,) = read(source)
    assert example.head.endswith("### Instruction:\nDoes it?\n\n### Input:\n")
    assert example.tail == "\n\n### Response:\n"
    assert example.response == "no. It does."
    assert read(source, response="answer")[0].response == "It does."
    assert read(source, response="decision")[0].response == "no"


def test_abstracts_without_labels_become_questions_by_their_conclusion(tmp_path):
    rows = [
        {"pmid": "1", "title": "On it", "abstract": "We looked. CONCLUSION: It does."},
        {"pmid": "2", "title": "No conclusion", "abstract": "We looked."},
    ]
    source = write(tmp_path / "abstracts.jsonl", rows)
    (example,) = read(source, response="answer")
    assert (example.passage.strip(), example.response, example.label) == ("We looked.", "It does.", None)
    with pytest.raises(InputError, match=r"row 1 has no final_decision .*task\.response=answer"):
        read(source)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "question": ""}, "row 1 has no question"),
        ({**ROW, "contexts": []}, "row 1 has no contexts"),
        ({**ROW, "final_decision": "perhaps"}, "row 1 has no final_decision"),
        ({**ROW, "long_answer": ""}, "row 1 has no long_answer"),
        ({"pubid": 1, "question": "?", "context": {"labels": []}}, "row 1 has no contexts"),
        ([1, 2], "a row is .*, not an object"),
    ],
)
def test_a_bad_row_is_told(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", b"\xff\xfe"),
        ("rows.json", b"{"),
        ("rows.json", b"3"),
        ("rows.jsonl", b"{\n"),
        ("rows.jsonl.gz", b"not gzip"),
        ("rows.parquet", b"not parquet"),
        ("rows.txt", b"hello"),
    ],
)
def test_a_file_that_holds_no_rows_is_told(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as PubMedQA rows"):
        read(str(tmp_path / name))


def test_missing_and_empty_files_are_told(tmp_path):
    with pytest.raises(InputError, match="no such data file"):
        read(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(InputError, match="has no rows"):
        read(str(tmp_path / "empty.json"))


def test_the_real_data(shared_data):
    train = read(str(shared_data / "pubmedqa" / "pqal_train.jsonl.gz"))
    test = task.build("pubmedqa", {}).read(str(shared_data / "pubmedqa" / "pqal_test.jsonl.gz"), "test")
    assert len(train) == len(test) == 500
    assert [sum(example.label == label for example in test) for label in range(3)] == [276, 169, 55]
    abstracts = read(str(shared_data / "pubmed_abstracts" / "abstracts.jsonl.gz"), response="answer")
    assert len(abstracts) == 548
