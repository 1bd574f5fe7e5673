"""Examples as tokens: prompt and response apart, so that the loss can be on the response alone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedllm_sec.tasks.task import Example
from fedllm_sec.updates.errors import InputError

TOGETHER = 1000  # texts encoded at once
IGNORED = -100  # a label that carries no loss, by torch's convention


class Encoded(NamedTuple):
    """The tokens of one example.

    Attributes:
        prompt: what the model is given.
        response: what it should say, with the end-of-text token.
        label: index into the task's labels, or None.
        cut: how many tokens of the passage had to go.
    """

    prompt: list[int]
    response: list[int]
    label: int | None
    cut: int


class Shortened(NamedTuple):
    """How many of some texts were longer than the model's context."""

    texts: int
    cut: int
    limit: int
    part: str = "end"

    def __str__(self) -> str:
        longer = f"{self.cut} of {self.texts} texts are longer than {self.limit} tokens"
        return f"{longer}: the {self.part} of their passage is cut"


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Tokenise examples; a text longer than `max_length` loses the end of its passage, never its question or response.

    Raises:
        InputError: if an example does not fit even without its passage.
    """
    parts = [
        tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for texts in (
            [example.head for example in examples],
            [example.passage for example in examples],
            [example.tail for example in examples],
            [example.response for example in examples],
        )
    ]
    start, end = first_tokens(tokenizer), [tokenizer.eos_token_id]
    encoded = []
    for example, head, passage, tail, response in zip(examples, *parts, strict=True):
        room = max_length - len(start) - len(head) - len(tail) - len(response) - len(end)
        if room < 0:
            raise InputError(
                f"the text with response {example.response[:60]!r}... needs {max_length - room} tokens even without "
                f"its passage, but task.max_length is {max_length}"
            )
        prompt = start + head + passage[:room] + tail
        encoded.append(Encoded(prompt, response + end, example.label, max(len(passage) - room, 0)))
    return encoded


def first_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one before every text."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def count_cut(examples: Sequence[Example], encode: Callable[[Sequence[Example]], list[Encoded]]) -> int:
    """Encode all texts once, to count those that are cut and to fail early on those that do not fit; keep nothing."""
    parts = (examples[start : start + TOGETHER] for start in range(0, len(examples), TOGETHER))
    return sum(item.cut > 0 for part in parts for item in encode(part))


class TrainingRows(Dataset[dict[str, list[int]]]):
    """Rows for `transformers.Trainer`: the loss is on the response only.

    A text is encoded when it is asked for: a round looks at a few of the many that a client may have.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Any, max_length: int):
        self.examples, self.tokenizer, self.max_length = examples, tokenizer, max_length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        (item,) = encode([self.examples[index]], self.tokenizer, self.max_length)
        return {"input_ids": item.prompt + item.response, "labels": [IGNORED] * len(item.prompt) + item.response}


class Collator:
    """Pad rows on the right to the longest of the batch."""

    def __init__(self, pad_token: int):
        self.pad_token = pad_token

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`: (batch, longest) int64, or (batch,) labels of texts."""
        batch = padded([row["input_ids"] for row in rows], self.pad_token)
        labels = [row["labels"] for row in rows]
        of_tokens = isinstance(labels[0], list)
        batch["labels"] = padded(labels, IGNORED)["input_ids"] if of_tokens else torch.tensor(labels)
        return batch


def padded(rows: Sequence[list[int]], fill: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (n, longest) int64: rows filled up on the right."""
    longest = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": torch.tensor([row + [fill] * (longest - len(row)) for row in rows]),
        "attention_mask": (torch.arange(longest)[None] < lengths[:, None]).long(),
    }
