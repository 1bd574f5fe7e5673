"""Names in a configuration -> factories in code. A factory's signature is its schema."""

import difflib
import importlib.metadata
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import pydantic

from fedllm_sec.core import Attack, Defense
from fedllm_sec.updates.errors import InputError

R = TypeVar("R")
PLUGINS = "fedllm_sec.plugins"  # an entry point of this group is a module whose import registers methods


class Entry(NamedTuple):
    """A registered method."""

    name: str
    factory: Callable[..., Any]
    paper: str

    @property
    def summary(self) -> str:
        """The first line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The factory's parameters, by name."""
        return inspect.signature(self.factory).parameters


class Registry(Generic[R]):
    """Methods of one kind by name; plug-ins are looked up when a name is first asked for."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._plugins_loaded = False

    def __call__(self, name: str, *, paper: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Decorate a factory: keyword-only, typed parameters, each with the paper's default where it has one."""

        def register(factory: Callable[..., R]) -> Callable[..., R]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, factory, paper)
            return factory

        return register

    def __iter__(self) -> Iterator[Entry]:
        self._load_plugins()
        return iter(sorted(self._entries.values()))

    def __getitem__(self, name: str) -> Entry:
        self._load_plugins()
        if name not in self._entries:
            raise InputError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def build(self, name: str, parameters: Mapping[str, Any]) -> R:
        """Make a method from its name and parameters, which are checked against the factory's signature.

        Raises:
            InputError: for an unknown name or parameter (with the nearest known one), or a value of the wrong type.
        """
        entry = self[name]
        for given in parameters:
            if given not in entry.parameters:
                raise InputError(f"{name} has no parameter {given!r}{did_you_mean(given, entry.parameters)}")
        try:
            made: R = pydantic.validate_call(entry.factory)(**parameters)
        except pydantic.ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InputError(f"{name}({signature_text(entry)}): {faults}") from None
        return made

    def _load_plugins(self) -> None:
        if not self._plugins_loaded:
            self._plugins_loaded = True
            for plugin in importlib.metadata.entry_points(group=PLUGINS):
                plugin.load()


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A hint: the nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)) or 'none'}"


def signature_text(entry: Entry) -> str:
    """`f, m=1`: the parameters with their defaults."""
    return ", ".join(
        name if parameter.default is parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in entry.parameters.items()
    )


attack: Registry[Attack] = Registry("attack")
defense: Registry[Defense] = Registry("defense")
