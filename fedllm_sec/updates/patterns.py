"""Regular expressions of strangers, which an adapter's configuration is full of, matched in bounded time."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex

SECONDS = 0.05  # for one match: a pattern of a stranger's may be made to take for ever
LONGEST = 2000  # characters of such a pattern


class TooSlowError(ValueError):
    """A pattern took longer than any in good faith, or is none."""


def matches(pattern: str, text: str) -> bool:
    """Whether a stranger's regular expression matches the whole of a text.

    Raises:
        TooSlowError: if it is none, is too long, or is made to take for ever.
    """
    return bounded(pattern, pattern, text, whole=True)


def matching(patterns: Iterable[str], module: str) -> str | None:
    """The first key of rank_pattern or alpha_pattern that names a module, just as PEFT reads them.

    PEFT puts the key between `(.*\\.)?(` and `)$` and matches from the beginning, which `a)|(b` breaks out of: such a
    key is no expression by itself, and is refused.

    Raises:
        TooSlowError: as `matches`.
    """
    return next((key for key in patterns if bounded(key, rf"(.*\.)?({key})$", module, whole=False)), None)


def bounded(pattern: str, put: str, text: str, *, whole: bool) -> bool:
    """Whether `put`, which contains a stranger's `pattern`, matches a text; `pattern` must be one by itself."""
    if len(pattern) > LONGEST:
        raise TooSlowError(f"a pattern of {len(pattern):,} characters")
    try:
        compiled(pattern)
        match = compiled(put).fullmatch if whole else compiled(put).match
        return match(text, timeout=SECONDS) is not None
    except regex.error as error:
        raise TooSlowError(f"{pattern[:60]!r} is no regular expression ({error})") from None
    except TimeoutError:
        raise TooSlowError(f"{pattern[:60]!r} takes more than {SECONDS} s for one name") from None


@lru_cache(maxsize=8192)
def compiled(pattern: str) -> Any:
    """A compiled pattern; one that is none raises regex.error."""
    return regex.compile(pattern)
