"""Texts from strangers: what should not be in them, and matching them in bounded time."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex

SECONDS = 0.05  # for one match: a pattern of a stranger's may be made to take for ever
LARGEST_NUMBER = 1e18  # of a configuration
LONGEST = 2000  # characters of such a pattern

SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "what looks like an access token": r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|AKIA[0-9A-Z]{16}|xox[baprs]-[A-Za-z0-9-]{10,}|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,})",
    "a password": r"(?i)\b(password|passwd|api_?key|secret)\b\s*[:=]",
}
CODE = {
    "what looks like code": r"(?i)(__import__|__builtins__|__class__|\beval\s*\(|\bexec\s*\(|os\.system|subprocess"
    r"|<script|powershell|/bin/(ba)?sh\b|base64\s*(-d|\.b64decode))",
    "an address": r"(?i)\b(https?|ftp|file)://",
}
TEMPLATE = r"__\w+__|\bimport\b|\bos\.|\bpopen\b|\bsubprocess\b|\battr\s*\(|\bcycler\b|\bjoiner\b|\blipsum\b|\bself\._"


def suspicious(text: str) -> str | None:
    """What a piece of free text holds that it should not, in words."""
    return next((what for what, pattern in {**SECRETS, **CODE}.items() if regex.search(pattern, text)), None)


def hostile_template(text: str) -> str | None:
    """What in a Jinja template reaches for Python's internals; None where nothing does."""
    inside = regex.findall(r"\{[\{%].*?[\}%]\}", text, flags=regex.DOTALL)
    found = (regex.search(TEMPLATE, regex.sub(r"'[^']*'|\"[^\"]*\"", "''", each)) for each in inside)
    named = (regex.search(r"\[\s*['\"]__\w+__['\"]\s*\]|attr\s*\(\s*['\"]_", each) for each in inside)
    return next((match[0] for match in (*found, *named) if match), None)


def is_positive(value: Any) -> bool:
    """Whether it is a number above zero with which one can reckon."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST_NUMBER


class TooSlowError(ValueError):
    """A pattern took longer than any in good faith, or is none."""


def matches(pattern: str, text: str) -> bool:
    """Whether a stranger's regular expression matches the whole of a text.

    Raises:
        TooSlowError: if it is none, is too long, or is made to take for ever.
    """
    return matched(pattern, "", "", text)


def matched(pattern: str, before: str, behind: str, text: str) -> bool:
    """Whether a pattern between two pieces of one matches a text from its beginning to its end.

    Raises:
        TooSlowError: likewise.
    """
    if len(pattern) > LONGEST:
        raise TooSlowError(f"a pattern of {len(pattern):,} characters")
    try:
        compiled(pattern)
        whole = compiled(before + pattern + behind)
        found = whole.match(text, timeout=SECONDS) if behind else whole.fullmatch(text, timeout=SECONDS)
        return found is not None
    except regex.error as error:
        raise TooSlowError(f"{pattern[:60]!r} is no regular expression ({error})") from None
    except TimeoutError:
        raise TooSlowError(f"{pattern[:60]!r} takes more than {SECONDS} s for one name") from None


@lru_cache(maxsize=8192)
def compiled(pattern: str) -> Any:
    """A compiled pattern; one that is none raises regex.error."""
    return regex.compile(pattern)


def matching(patterns: Iterable[str], module: str) -> str | None:
    """The first key of rank_pattern or alpha_pattern that names a module, just as PEFT reads them.

    PEFT puts the key between `(.*\\.)?(` and `)$`, which a key can break out of: `a)|(b`.
    """
    return next((pattern for pattern in patterns if matched(pattern, r"(.*\.)?(", ")$", module)), None)
