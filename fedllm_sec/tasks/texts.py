"""Text classification for small models: Sentiment140 and 20 Newsgroups as rows of hashed words."""

import logging
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedllm_sec.settings import EMBEDDED
from fedllm_sec.tasks.arrays import Arrays, ArrayTask
from fedllm_sec.tasks.posts import EVERYTHING, GROUPS, Removed, as_text, posts
from fedllm_sec.tasks.sources import column, read_columns, users_of, warn_of_stand_in
from fedllm_sec.tasks.task import task
from fedllm_sec.tasks.tiny_posts import tweets
from fedllm_sec.updates.errors import InputError

logger = logging.getLogger(__name__)

WORD = re.compile(r"[\w']+|[!?]")
SENTIMENTS = {0: 0, 1: 1, 4: 1}  # LEAF's positive is 1, the original's 4
NEUTRAL = 2
Length = Annotated[int, Field(ge=1)]
Vocabulary = Annotated[int, Field(ge=2)]


@task("sentiment140", paper="Go et al. 2009 (report, Stanford); Caldas et al. 2018, arXiv:1812.01097")
def sentiment140(*, length: Length = 32, vocabulary: Vocabulary = 16384) -> ArrayTask:
    """Tell negative (0) from positive (1) tweets.

    Words are hashed (`hashed`), so that the vocabulary depends on no data. Neutral tweets, which only the official test
    set has, are left out and counted. Users are the tweets' authors.

    Sources: `stanfordnlp/sentiment140`, LEAF's JSON folder, or rows with `text` and `sentiment` or `label` (a row may
    hold the lists of all of a `user`).
    """

    def read(source: str, split: str) -> Arrays:
        if source == EMBEDDED:
            warn_of_stand_in("sentiment140", "made-up tweets", "stanfordnlp/sentiment140")
            texts, labels, users = tweets(split)
            return Arrays(hashed(texts, length, vocabulary), torch.tensor(labels), users, encoder(length, vocabulary))
        tweeted = read_tweets(source, split, lambda texts: hashed(texts, length, vocabulary))
        return tweeted._replace(encode=encoder(length, vocabulary))

    return ArrayTask(read, 2, (length,), vocabulary, lambda x: x)


@task("20news", paper="Lang 1995, doi:10.1016/B978-1-55860-377-6.50048-7")
def newsgroups(
    *,
    length: Length = 128,
    vocabulary: Vocabulary = 32768,
    remove: tuple[Removed, ...] = EVERYTHING,
) -> ArrayTask:
    """Tell from which of 20 newsgroups a post is.

    `remove` is scikit-learn's: without it a model learns who wrote rather than what. Words are hashed (`hashed`). There
    are no users. A BERT's task is `newsgroups`.

    Sources: those of `posts`.
    """

    def read(source: str, split: str) -> Arrays:
        texts, y = posts("20news", source, split, remove)
        return Arrays(hashed(texts, length, vocabulary), y, None, encoder(length, vocabulary))

    return ArrayTask(read, GROUPS, (length,), vocabulary, lambda x: x)


def hashed(texts: Sequence[str], length: int, vocabulary: int) -> Tensor:
    """Words as tokens: 1 + crc32(word in UTF-8) mod (vocabulary - 1), the hashing trick (Weinberger et al. 2009,
    arXiv:0902.2206) with a hash that is the same on every machine.

    A word is a run of letters, digits, underscores and apostrophes in lower case, or one of ! and ?. The first `length`
    words count; shorter texts are padded with 0 on the left, so that a recurrent model ends on a word.

    Returns:
        (n, length) int64.
    """
    ids: dict[str, int] = {}
    tokens = np.zeros((len(texts), length), np.int64)
    for row, text in enumerate(texts):
        words = [match.group() for match, _ in zip(WORD.finditer(text.lower()), range(length), strict=False)]
        for word in words:
            if word not in ids:
                ids[word] = 1 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % (vocabulary - 1)
        if words:
            tokens[row, -len(words) :] = [ids[word] for word in words]
    return torch.from_numpy(tokens)


def encoder(length: int, vocabulary: int) -> Callable[[str], list[int]]:
    """Writes a few words as the task does."""
    return lambda words: [int(token) for token in hashed([words], length, vocabulary)[0] if token]


def read_tweets(source: str, split: str, tokens: Callable[[Sequence[str]], Tensor]) -> Arrays:
    """Tweets in any of their public forms.

    Raises:
        InputError: for a row that is no tweet, or a label that is no sentiment.
    """
    columns = read_columns(source, split)
    texts = column(columns, ("text", "x"), source)
    labels = column(columns, ("sentiment", "label", "y"), source)
    users = users_of(columns, source)
    if any(isinstance(value, list) for value in labels):
        texts, labels, users = flattened(texts, labels, users, source)
    sentiments = [sentiment_of(label, source, row) for row, label in enumerate(labels)]
    kept = [row for row, sentiment in enumerate(sentiments) if sentiment is not None]
    if not kept:
        raise InputError(f"data.{split}={source}: has neither negative nor positive tweets")
    if len(kept) < len(texts):
        logger.info("data.%s=%s: %d neutral tweets are left out", split, source, len(texts) - len(kept))
    chosen = [as_text(texts[row], source, row) for row in kept]
    y = torch.tensor([sentiments[row] for row in kept], dtype=torch.int64)
    return Arrays(tokens(chosen), y, None if users is None else tuple(users[row] for row in kept))


def flattened(
    texts: Sequence[Any], labels: Sequence[Any], users: Sequence[str] | None, source: str
) -> tuple[list[Any], list[Any], tuple[str, ...] | None]:
    """Rows that hold all of a user's tweets as rows of one tweet.

    Raises:
        InputError: if a row has not as many texts as labels.
    """
    for row, (own, said) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(own, list) or not isinstance(said, list) or len(own) != len(said):
            raise InputError(f"{source}: row {row} has not as many texts as labels")
    named = None
    if users is not None:
        named = tuple(user for user, own in zip(users, texts, strict=True) for _ in own)
    return [text for own in texts for text in own], [label for said in labels for label in said], named


def sentiment_of(label: Any, source: str, row: int) -> int | None:
    """0 for a negative tweet, 1 for a positive one, None for a neutral one."""
    try:
        number = int(label) if int(label) == float(label) else -1
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number != NEUTRAL and number not in SENTIMENTS:
        raise InputError(f"{source}: row {row} has sentiment {label!r}; 0 is negative, 2 neutral, 1 or 4 positive")
    return SENTIMENTS.get(number)
