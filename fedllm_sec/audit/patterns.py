"""Texts and numbers from strangers: what should not be in them."""

from typing import Any

import regex

LARGEST_NUMBER = 1e18  # of a configuration

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
