"""How a task's examples become a model's input, and its output a judgement: of words that follow, or of a class."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch.utils.data import Dataset

from fedllm_sec.tasks.encoding import Encoded, Shortened, TrainingRows, count_cut, encode, padded
from fedllm_sec.tasks.evaluation import Score, metrics, score
from fedllm_sec.tasks.task import Classification, Example, Task
from fedllm_sec.updates.errors import InputError

Row = dict[str, Any]


class Form(Protocol):
    """What training and evaluation know of a task."""

    @property
    def causal(self) -> bool:
        """Whether a token is read from those before it alone."""

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as tokens; raises InputError for one that does not fit."""

    def shortened(self, examples: Sequence[Example]) -> Shortened:
        """How many are cut."""

    def rows(self, examples: Sequence[Example]) -> Dataset[Row]:
        """Rows for `transformers.Trainer`."""

    def score(self, model: Any, batch: Sequence[Encoded]) -> list[Score]:
        """How a model in evaluation mode judges a batch."""

    def metrics(self, scores: Sequence[Score], encoded: Sequence[Encoded]) -> dict[str, float]:
        """What the scores of all come to."""


@dataclass(frozen=True)
class WordsForm:
    """A causal language model's: the loss is on the response, and labels are judged by their likelihood.

    Attributes:
        tokenizer: with a padding token.
        limit: the longest text, in tokens.
        labels: the texts whose likelihoods are compared.
    """

    tokenizer: Any
    limit: int
    labels: tuple[str, ...]
    causal: bool = field(default=True, init=False)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Prompt and response."""
        return encode(examples, self.tokenizer, self.limit)

    def shortened(self, examples: Sequence[Example]) -> Shortened:
        """The end of the passage is cut."""
        return Shortened(len(examples), count_cut(examples, self.encode), self.limit)

    def rows(self, examples: Sequence[Example]) -> Dataset[Row]:
        """The loss is on the response alone."""
        return TrainingRows(examples, self.tokenizer, self.limit)

    def score(self, model: Any, batch: Sequence[Encoded]) -> list[Score]:
        """By log-likelihoods."""
        tokens = [self.tokenizer(label, add_special_tokens=False)["input_ids"] for label in self.labels]
        return score(model, batch, tokens, self.tokenizer.pad_token_id)

    def metrics(self, scores: Sequence[Score], encoded: Sequence[Encoded]) -> dict[str, float]:
        """Loss and perplexity of responses, accuracy and macro-F1 of labels."""
        return metrics(scores, encoded)


@dataclass(frozen=True)
class ClassForm:
    """That of a model which classifies texts.

    Attributes:
        tokenizer: with a padding token.
        limit: the longest text, in tokens, the tokenizer's own at both ends among them.
        keep: which end of a long text is kept.
    """

    tokenizer: Any
    limit: int
    keep: Literal["head", "tail"]
    causal: bool = field(default=False, init=False)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """The prompt is the text between the tokenizer's own tokens; there is no response."""
        parts = [
            self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for texts in zip(*((example.head, example.passage, example.tail) for example in examples), strict=True)
        ]
        start, end = around(self.tokenizer)
        encoded = []
        for example, head, passage, tail in zip(examples, *parts, strict=True):
            room = self.limit - len(start) - len(head) - len(tail) - len(end)
            if room < 0:
                raise InputError(
                    f"a text needs {self.limit - room} tokens even without its passage, but task.max_length is "
                    f"{self.limit}: {(example.head + example.tail)[:60]!r}"
                )
            cut = max(len(passage) - room, 0)
            kept = passage[:room] if self.keep == "head" else passage[cut:]
            encoded.append(Encoded(start + head + kept + tail + end, [], example.label, cut))
        return encoded

    def shortened(self, examples: Sequence[Example]) -> Shortened:
        """The end of the passage is cut, or its beginning."""
        part = "end" if self.keep == "head" else "beginning"
        return Shortened(len(examples), count_cut(examples, self.encode), self.limit, part)

    def rows(self, examples: Sequence[Example]) -> Dataset[Row]:
        """A text, and the number of its class."""
        return ClassRows(examples, self)

    @torch.no_grad()
    def score(self, model: Any, batch: Sequence[Encoded]) -> list[Score]:
        """By the logits of the classes; the loss is the cross entropy, in nats."""
        inputs = padded([item.prompt for item in batch], self.tokenizer.pad_token_id)
        logits = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits
        likelihoods = torch.log_softmax(logits.double(), dim=-1).tolist()
        scores = []
        for item, row in zip(batch, likelihoods, strict=True):
            assert item.label is not None  # of a classification every example has one
            scores.append(Score(-row[item.label], 1, tuple(row), exact=max(row) == row[item.label]))
        return scores

    def metrics(self, scores: Sequence[Score], encoded: Sequence[Encoded]) -> dict[str, float]:
        """Cross entropy, accuracy and macro-F1."""
        measured = metrics(scores, encoded)
        del measured["perplexity"]
        return measured


class ClassRows(Dataset[Row]):
    """Texts with their classes, encoded when they are asked for."""

    def __init__(self, examples: Sequence[Example], form: ClassForm):
        self.examples, self.form = examples, form

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Row:
        (item,) = self.form.encode([self.examples[index]])
        return {"input_ids": item.prompt, "labels": item.label}


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before a text and behind it: [CLS] and [SEP], nothing, or others.

    Raises:
        InputError: if it does something else.
    """
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    first = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
    if first is None:
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} changes a text when it puts its own tokens around it"
        )
    return whole[:first], whole[first + len(bare) :]


def form_of(work: Task | Classification, tokenizer: Any, limit: int) -> Form:
    """How a task's examples are read with a tokenizer, at most `limit` tokens of each."""
    if isinstance(work, Classification):
        return ClassForm(tokenizer, limit, work.keep)
    return WordsForm(tokenizer, limit, work.labels)
