"""Examples as tokens: what the loss is on, and what happens to long texts."""

from dataclasses import replace

import pytest
import torch

from fedllm_sec import InputError
from fedllm_sec.tasks.encoding import Collator, TrainingRows, encode
from fedllm_sec.tasks.forms import WordsForm
from fedllm_sec.tasks.task import Example


class Words:
    """A tokenizer that knows words only by their length."""

    eos_token_id, bos_token_id = 0, None

    def __call__(self, texts, add_special_tokens=True):
        split = [[len(word) for word in text.split()] for text in ([texts] if isinstance(texts, str) else texts)]
        return {"input_ids": split[0] if isinstance(texts, str) else split}


EXAMPLE = Example("a bb", "ccc dddd eeeee", "ffffff", "yes it does", label=0)


def test_the_loss_is_on_the_response_alone():
    (row,) = TrainingRows([EXAMPLE], Words(), 99)
    assert row["input_ids"] == [1, 2, 3, 4, 5, 6, 3, 2, 4, 0]
    assert row["labels"] == [-100] * 6 + [3, 2, 4, 0]


def test_a_long_text_loses_the_end_of_its_passage_and_is_counted():
    encoded = encode([EXAMPLE, EXAMPLE], Words(), 8)
    assert encoded[0].prompt == [1, 2, 3, 6]
    assert encoded[0].response == [3, 2, 4, 0]
    assert encoded[0].cut == 2
    short = replace(EXAMPLE, passage="ccc")
    report = WordsForm(Words(), 8, ()).shortened([EXAMPLE, short, EXAMPLE])
    assert str(report) == "2 of 3 texts are longer than 8 tokens: the end of their passage is cut"


def test_a_text_that_does_not_fit_even_without_its_passage_is_an_error():
    with pytest.raises(InputError, match="needs 7 tokens even without its passage"):
        encode([EXAMPLE], Words(), 6)


def test_rows_are_padded_on_the_right_and_masked():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token=9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
