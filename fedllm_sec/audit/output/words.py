"""Words of strangers made harmless: whatever comes from an adapter is cleaned for the place where it is shown."""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from html import escape
from typing import Any

import numpy as np

NAME, SENTENCE, EXACT = 120, 600, 10_000  # characters: of a name, of a message, and of what machines read
HIDDEN = frozenset(
    ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
)  # controls, bidi overrides, lone surrogates, and the like
MEANING = re.compile(r"""[&<>|`*_\[\](){}~\\@#:!$^"'+=]|(?<=www)\.""", re.IGNORECASE)  # in Markdown and HTML
CALLS = re.compile(r"&#(64|35);")  # @somebody and #123 become links after the Markdown was read
DEEP, MANY = 12, 4  # how deep values are followed; how many of a list are shown to people
WIDE_BITS = 1024  # a wider integer is no float


def plain(text: str, limit: int = NAME) -> str:
    """One line without anything invisible: controls are shown as escapes, the middle of what is long is left out."""
    text = str(text)
    if len(text) <= limit:
        return revealed(text)[: 2 * limit]
    head, tail = limit * 2 // 3, limit // 3
    shown = revealed(text[:head])[:head], revealed(text[-tail:])[-tail:]  # do not walk through 100 kB of a name
    return f"{shown[0]}… {len(text):,} characters …{shown[1]}"


def revealed(text: str) -> str:
    """The same with escapes for what cannot be seen."""
    return "".join(char if char.isascii() and char.isprintable() else visible(char) for char in text)


@lru_cache(4096)
def visible(char: str) -> str:
    """The character, or the escape of one that shows nothing."""
    hidden = unicodedata.category(char) in HIDDEN
    return char.encode("unicode_escape").decode() if hidden else char


def html(text: str, limit: int = NAME) -> str:
    """For a page."""
    return escape(plain(text, limit))


def markdown(text: str, limit: int = NAME) -> str:
    """Prose for Markdown, in a table or out: no markup, no HTML, no link; nobody is called by `@`."""
    inert = MEANING.sub(lambda found: f"&#{ord(found[0])};", plain(text, limit))
    return CALLS.sub(r"&#\1;&#8203;", inert)


def markdown_code(text: str, limit: int = NAME) -> str:
    """A name for Markdown; GitHub makes no links of what is in `<code>`."""
    inert = MEANING.sub(lambda found: f"&#{ord(found[0])};", plain(text, limit))
    return f"<code>{inert}</code>"


def plotted(text: str, limit: int = 28) -> str:
    """For a matplotlib figure: short, no mathematics, and only what its font can draw."""
    text = str(text)
    if len(text) > limit:
        text = f"{text[: limit - 11]}…{text[-10:]}"
    return "".join(char if drawable(char) else "?" for char in text)


def drawable(char: str) -> bool:
    """Whether matplotlib's own font has a character, and it is no sign of mathematics."""
    return char == "…" or (char.isprintable() and ord(char) < 0x500 and char != "$")


def exact(text: str, limit: int = EXACT) -> str:
    """For machines: the same text, but valid Unicode, and not endless."""
    text = str(text)
    if len(text) > limit:
        text = f"{text[: limit // 2]}… {len(text) - limit // 2:,} more characters"
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def jsonable(value: Any, depth: int = DEEP) -> Any:
    """As JSON without NaN and infinity (null instead); arrays are lists; what is too deep is an ellipsis."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, int):
        return value if value.bit_length() <= WIDE_BITS else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth == 0 and isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return "…"
    if isinstance(value, Mapping):
        return {exact(key): jsonable(each, depth - 1) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [jsonable(each, depth - 1) for each in value]
    return exact(value if isinstance(value, str) else str(value))


def number(value: Any) -> str:
    """A measured value for people: `12.3`, `4, 8, 16`; '' for None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None:
        return ""
    if isinstance(value, bool | str | Enum):
        return plain(str(value))
    if isinstance(value, int):
        return f"{value:,}" if value.bit_length() <= 50 else plain(str(jsonable(value)), 30)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, bytes) and all(not is_nested(each) for each in value):
        more = f" and {len(value) - MANY} more" if len(value) > MANY else ""
        return ", ".join(number(each) for each in value[:MANY]) + more
    return plain(json.dumps(jsonable(value), ensure_ascii=False))


def is_nested(value: Any) -> bool:
    """Whether a value holds others."""
    return isinstance(value, Mapping | Sequence | np.ndarray) and not isinstance(value, str)
