"""A peer's parts without its `__init__`."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def stand_in(package: str, peer: str | None) -> ModuleType:
    """A module in the place of a package whose own `__init__` needs more than its parts do."""
    if package in sys.modules:
        return sys.modules[package]
    if peer is None:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{package} is not installed")
        where = list(spec.submodule_search_locations)
    else:
        where = [str(Path(peer) / package)]
        sys.path.append(peer)
    module = ModuleType(package)
    module.__path__ = where
    sys.modules[package] = module
    return module
