"""20 Newsgroups for a model that classifies texts: from which of 20 groups is a post?"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedllm_sec.tasks.posts import EVERYTHING, NAMES, Removed, posts
from fedllm_sec.tasks.task import Classification, Example, task


@task("newsgroups", paper="Lang 1995, doi:10.1016/B978-1-55860-377-6.50048-7")
def newsgroups(
    *,
    max_length: Annotated[int, Field(ge=8)] = 128,
    keep: Literal["head", "tail"] = "head",
    remove: tuple[Removed, ...] = EVERYTHING,
) -> Classification:
    """Tell from which of 20 newsgroups a post is, with a BERT or another model that classifies texts.

    The public forms are split by date: what is tested on was written after what is trained on. `remove` is
    scikit-learn's: without it a model learns who wrote rather than what. Of a post that is longer than `max_length`
    tokens the beginning (`keep=head`) or the end (`keep=tail`) is read.

    Sources: `SetFit/20_newsgroups`, or rows with `text` and `label`, raw or stripped.
    """

    def read(source: str, split: str) -> Sequence[Example]:
        texts, groups = posts("newsgroups", source, split, remove)
        return [
            Example("", text, "", NAMES[group], group, tuple(NAMES))
            for text, group in zip(texts, groups.tolist(), strict=True)
        ]

    return Classification(read, tuple(NAMES), max_length, keep)
