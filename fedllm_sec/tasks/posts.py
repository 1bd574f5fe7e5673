"""20 Newsgroups as texts: read in their public forms, and stripped of what tells who wrote rather than what."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm_sec.settings import EMBEDDED
from fedllm_sec.tasks.images import classes_of
from fedllm_sec.tasks.sources import column, read_columns, warn_of_stand_in
from fedllm_sec.tasks.tiny_posts import news, words
from fedllm_sec.updates.errors import InputError

HEADERS = (re.compile(r"^From:", re.MULTILINE), re.compile(r"^Subject:", re.MULTILINE))  # every raw post has both
TWEET_IN_LEAF = 4  # a row of LEAF's x is [id, date, query, user, text]
NAMES = words(  # in the order of the labels, which is that of the alphabet
    "alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware comp.sys.mac.hardware comp.windows.x "
    "misc.forsale rec.autos rec.motorcycles rec.sport.baseball rec.sport.hockey sci.crypt sci.electronics sci.med "
    "sci.space soc.religion.christian talk.politics.guns talk.politics.mideast talk.politics.misc talk.religion.misc"
)
GROUPS = len(NAMES)
Removed = Literal["headers", "footers", "quotes"]
EVERYTHING: tuple[Removed, ...] = ("headers", "footers", "quotes")


def posts(task: str, source: str, split: str, remove: Sequence[Removed]) -> tuple[list[str], Tensor]:
    """The posts of a source and a split, and (n,) int64 their groups.

    Args:
        task: which asks.
        source: `SetFit/20_newsgroups`, rows with `text` and `label`, or `embedded`.
        split: `train` or `test`; the public forms are split by date.
        remove: by scikit-learn's rules. Posts that mostly lack the headers From and Subject have been stripped already
            (those of `SetFit/20_newsgroups` have) and stay as they are, for stripping twice takes text away.

    Raises:
        InputError: if the source cannot be read.
    """
    if source == EMBEDDED:
        warn_of_stand_in(task, "made-up posts", "SetFit/20_newsgroups")
        made, labels = news(split)
        return made, torch.tensor(labels)
    columns = read_columns(source, split)
    texts = [as_text(text, source, row) for row, text in enumerate(column(columns, ("text",), source))]
    groups = classes_of(column(columns, ("label",), source), GROUPS, source)
    if 2 * sum(map(is_raw, texts)) > len(texts):
        texts = [stripped(text, remove) for text in texts]
    return texts, groups


def as_text(value: Any, source: str, row: int) -> str:
    """The text of a row, which in LEAF's JSON is the fifth of its fields."""
    text = value[TWEET_IN_LEAF] if isinstance(value, list) and len(value) > TWEET_IN_LEAF else value
    if not isinstance(text, str):
        raise InputError(f"{source}: row {row} is {str(value)[:60]!r}, not a text")
    return text


def stripped(text: str, remove: Sequence[Removed]) -> str:
    """A raw post without its headers, signature and quotations, by scikit-learn's rules and in its order."""
    from sklearn.datasets import _twenty_newsgroups as rules

    steps: Mapping[Removed, Callable[[str], str]] = {
        "headers": rules.strip_newsgroup_header,
        "footers": rules.strip_newsgroup_footer,
        "quotes": rules.strip_newsgroup_quoting,
    }
    for name, strip in steps.items():
        if name in remove:
            text = strip(text)
    return text


def is_raw(text: str) -> bool:
    """Whether a post still has its header, the lines before the first blank one."""
    head = text.partition("\n\n")[0]
    return all(header.search(head) for header in HEADERS)
