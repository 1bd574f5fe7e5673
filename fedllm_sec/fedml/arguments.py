"""The `args` that the papers' code hands to `init`: an object with FedML's keys as attributes, or a mapping of them."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from fedllm_sec.fedml.keys import Keys
from fedllm_sec.updates.errors import InputError


def keys_of(args: object) -> Keys:
    """FedML's keys in a namespace (`fedml.arguments.Arguments`, `argparse.Namespace`, ...) or in a mapping.

    Raises:
        InputError: if it is neither.
    """
    if isinstance(args, Mapping):
        return Keys({str(name): value for name, value in args.items()})
    try:
        return Keys(dict(vars(args)))
    except TypeError:
        raise InputError(f"args must hold FedML's keys as attributes, got {type(args).__name__}") from None


def fingerprint(keys: Keys) -> dict[str, Any]:
    """The keys that were read: two `init` calls that agree on them are one; FedML hangs other things into its args."""
    return {name: keys.values.get(name) for name in keys.used}


def client_names(count: int) -> list[str]:
    """`client_0`, `client_1`, ...: the papers' lists say nothing but the place."""
    return [f"client_{place}" for place in range(count)]


class OneOfAProcess:
    """What FedML's code asks for by `get_instance`: one object a process, made when it is first asked for."""

    _instance: ClassVar[Any] = None

    @classmethod
    def get_instance(cls) -> Self:
        """The one of this process."""
        if cls._instance is None:
            cls._instance = cls()
        instance: Self = cls._instance
        return instance
