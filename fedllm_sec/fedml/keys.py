"""FedML's keys: read from YAML, flattened as FedML does it, and remembered with what is wrong about them.

FedML pours every family (`train_args`, `attack_args`, ...) into one namespace, in the order of the file, and the last
one wins. So the family of a key says nothing about who reads it, and two families can overwrite one another in silence.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fedllm_sec.registry import did_you_mean
from fedllm_sec.updates.errors import InputError

T = TypeVar("T")
NOWHERE = ""  # the family of a key that came in a namespace


@dataclass
class Keys:
    """Flattened keys, who they came from, and which of them were used.

    Attributes:
        values: by name; the last family wins.
        families: the family that won each key.
        origin: the file, or whatever holds the keys; errors begin with it.
        warnings: what FedML does otherwise, a line each.
        used: keys that were looked at.
    """

    values: Mapping[str, Any]
    families: Mapping[str, str] = field(default_factory=dict)
    origin: str = "args"
    warnings: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def raw(self, name: str) -> Any:
        """A value as it is, or None; it counts as used."""
        self.used.add(name)
        return self.values.get(name)

    def get(self, name: str, kind: Callable[[Any], T], default: T) -> T:
        """A value of a kind (`count`, `number`, ...), or the default where it is missing or null.

        Raises:
            InputError: if it is of another kind.
        """
        return default if self.raw(name) is None else self.read(name, kind)

    def read(self, name: str, kind: Callable[[Any], T]) -> T:
        """A value of a kind, which is there."""
        value = self.raw(name)
        try:
            return kind(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"{self.place(name)}: {error}, got {value!r}") from None

    def need(self, name: str, kind: Callable[[Any], T], why: str) -> T:
        """A value that must be there.

        Raises:
            InputError: if it is not, saying what it is for.
        """
        if name not in self:
            raise InputError(f"{self.origin}: {name} is missing: {why}")
        return self.read(name, kind)

    def choose(self, name: str, known: Mapping[str, T], default: str | None = None, why: str = "") -> tuple[str, T]:
        """A string that is one of those known (in upper or lower case), and what it stands for.

        Raises:
            InputError: for an unknown one, with the nearest known one.
        """
        given = self.need(name, text, why) if default is None else self.get(name, text, default)
        found = {key.lower(): key for key in known}.get(given.lower())
        if found is None:
            raise InputError(f"{self.place(name)}: unknown {given!r}{did_you_mean(given, known)}")
        return found, known[found]

    def place(self, name: str) -> str:
        """Where a key stands, in full."""
        return f"{self.origin}: {self.label(name)}"

    def label(self, name: str) -> str:
        """`family.key`."""
        family = self.families.get(name, NOWHERE)
        return f"{family}.{name}" if family else name

    def warn(self, name: str, message: str) -> None:
        """Note what becomes of a key; it counts as used."""
        self.used.add(name)
        self.remark(f"{self.label(name)}: {message}")

    def remark(self, message: str) -> None:
        """Note anything, once."""
        if message not in self.warnings:
            self.warnings.append(message)


def read_keys(path: Path) -> Keys:
    """Read FedML's YAML and flatten it.

    Raises:
        InputError: if the file is missing, is not YAML, or is not families of keys.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such FedML configuration file")
    try:
        content = path.read_text(encoding="utf-8")
        families, root = yaml.safe_load(content), yaml.compose(content, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = " ".join(str(error).split())
        raise InputError(f"{path}: is not YAML ({first})") from None
    if not isinstance(families, dict) or not families:
        raise InputError(f"{path}: holds no families of keys (common_args, train_args, ...)")
    keys = flattened(families, str(path))
    for label in repeated(root):
        keys.remark(f"{label}: is written twice there; YAML keeps the last and so do we")
    return keys


def flattened(families: Mapping[Any, Any], origin: str) -> Keys:
    """Pour families into one namespace, in order; the last wins, and what it overwrites is told."""
    values: dict[str, Any] = {}
    winners: dict[str, str] = {}
    keys = Keys(values, winners, origin)
    for family, members in families.items():
        if members is None:
            keys.remark(f"{family}: is empty, which FedML crashes on; left out")
            continue
        if not isinstance(members, Mapping):
            raise InputError(
                f"{origin}: {family} is no family of keys, got {members!r}; write it as `{family}: {{...}}`"
            )
        for name, value in members.items():
            if not isinstance(name, str):
                raise InputError(f"{origin}: {family}: the key {name!r} is no text; put it in quotes")
            if name in values and values[name] != value:
                keys.remark(
                    f"{name}: is {values[name]!r} in {winners[name]} and {value!r} in {family}; "
                    "FedML and we take the last"
                )
            values[name], winners[name] = value, str(family)
    return keys


def repeated(node: yaml.Node | None, path: str = "") -> Iterator[str]:
    """The places of keys that a mapping holds twice; YAML parsers keep the last without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = f"{path}.{key.value}" if path else str(key.value)
            if name in seen:
                yield name
            seen.add(name)
            if not path:
                yield from repeated(value, name)


def text(value: Any) -> str:
    """A string, without blanks around it.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, str):
        raise TypeError("should be a text")
    return value.strip()


def count(value: Any) -> int:
    """A whole number that is not negative, perhaps as text.

    Raises:
        ValueError: if it is none.
    """
    exact = number(value)
    if exact != int(exact) or exact < 0:
        raise ValueError("should be a whole number, not negative")
    return int(exact)


def number(value: Any) -> float:
    """A finite number; YAML reads `1e-4` as text, so text will do.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("should be a number")
    try:
        exact = float(value)
    except ValueError:
        raise ValueError("should be a number") from None
    if not math.isfinite(exact):
        raise ValueError("should be a finite number")
    return exact


def positive(value: Any) -> float:
    """A number greater than 0.

    Raises:
        ValueError: if it is none.
    """
    exact = number(value)
    if exact <= 0:
        raise ValueError("should be a number greater than 0")
    return exact


def not_negative(value: Any) -> float:
    """A number of 0 or more.

    Raises:
        ValueError: if it is none.
    """
    exact = number(value)
    if exact < 0:
        raise ValueError("should be a number, not negative")
    return exact


def some(value: Any) -> int:
    """A whole number of 1 or more.

    Raises:
        ValueError: if it is none.
    """
    exact = count(value)
    if not exact:
        raise ValueError("should be a whole number, 1 or more")
    return exact


def switch(value: Any) -> bool:
    """What FedGKT takes for true: 1, and true.

    Raises:
        ValueError: if it is text.
    """
    return flag(value) and value == 1


def share(value: Any) -> float:
    """A number from 0 to 1.

    Raises:
        ValueError: if it is none.
    """
    exact = number(value)
    if not 0 <= exact <= 1:
        raise ValueError("should be a number from 0 to 1")
    return exact


def flag(value: Any) -> bool:
    """What FedML takes for true: its truth in Python, so that the text `false` would be true.

    Raises:
        ValueError: if it is text, which FedML would take for true whatever it says.
    """
    if isinstance(value, bool | int):
        return bool(value)
    raise ValueError("should be true or false, without quotes")


def counts(value: Any) -> list[int]:
    """A list of whole numbers.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, list | tuple):
        raise ValueError("should be a list of whole numbers, like [3, 2]")
    return [count(item) for item in value]
