"""A task is text to learn from, and how to tell whether it was learned; a small model's task is in `arrays`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedllm_sec.registry import Registry
from fedllm_sec.tasks.arrays import ArrayTask


@dataclass(frozen=True)
class Example:
    """One text: a prompt around a passage that may be shortened, and the response that is learned.

    Of a text to classify the response is the name of its class, which no model is shown.

    Attributes:
        head: the prompt before the passage.
        passage: what is cut from its end if the whole is longer than the model's context.
        tail: the prompt after the passage.
        response: what the loss is on; for a task with labels it begins with the label.
        label: index into the task's labels, where the task has them.
        labels: how the task's labels are written at the beginning of responses, where they are.
    """

    head: str
    passage: str
    tail: str
    response: str
    label: int | None = None
    labels: tuple[str, ...] = ()


class Task(NamedTuple):
    """A causal language model's task.

    Attributes:
        read: gives the examples of a source (a hub id, a file, or `embedded`) and a split (`train` or `test`).
        labels: the texts whose likelihoods are compared to classify; none: the loss is the only metric.
        max_length: in tokens; longer texts are cut, counted and reported.
    """

    read: Callable[[str, str], Sequence[Example]]
    labels: tuple[str, ...]
    max_length: int


class Classification(NamedTuple):
    """The task of a model that classifies texts.

    Attributes:
        read: as a `Task`'s; every example has a label.
        labels: what the classes are called.
        max_length: in tokens; longer texts are cut, counted and reported.
        keep: which end of a long text is kept.
    """

    read: Callable[[str, str], Sequence[Example]]
    labels: tuple[str, ...]
    max_length: int
    keep: Literal["head", "tail"] = "head"


task: Registry[Task | Classification | ArrayTask] = Registry("task")
