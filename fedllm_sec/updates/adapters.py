"""Adapter folders as they are found: the server's, which counts, and the clients', which are only compared with it."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json
from fedllm_sec.updates.layout import and_more
from fedllm_sec.updates.smuggling import smuggled
from fedllm_sec.updates.sources import ADAPTER_CONFIG, Row, RowOfFile, SafetensorsFile, Source, adapter_file, version

logger = logging.getLogger(__name__)

LARGEST_CONFIG = 2**20  # bytes of an adapter_config.json


def open_reference(path: Path) -> SafetensorsFile:
    """Open the server's own adapter, which passes the same gate."""
    try:
        source = SafetensorsFile(adapter_file(path))
    except InputError as error:
        raise InputError(f"the global adapter {path}: {error}") from None
    return source


def open_client(address: Path | Row, expected_config: dict[str, Any] | None, *, binds: bool = False) -> Source:
    """Open a client's adapter; its adapter_config is only compared with the server's, which is the one that counts.

    Args:
        address: its folder, its file, or its row in a file of many.
        expected_config: the server's; None: it has none.
        binds: whether there is no adapter of the server's that says which tensors belong there.

    Raises:
        InputError: if it cannot be opened, or would overwrite the base.
    """
    if isinstance(address, Row):
        return RowOfFile(whole_file(address.path, version(address.path.stat())), address.number)
    folder = address
    source = SafetensorsFile(adapter_file(folder))
    if binds:
        refuse_smuggled(source, adapter_config(folder))
    if expected_config is not None:
        found = adapter_config(folder) or expected_config
        keys = expected_config.keys() | found.keys()
        if fields := sorted(key for key in keys if expected_config.get(key) != found.get(key)):
            some = ", ".join(repr(field)[:40] for field in fields[:5]) + and_more(fields[4:])
            logger.warning("%s: its adapter_config differs in %s; the server's is used", folder, some)
    return source


def refuse_smuggled(source: SafetensorsFile, config: dict[str, Any] | None) -> None:
    """Refuse an adapter that would overwrite the base, before anything else is looked at.

    Raises:
        InputError: naming the tensor.
    """
    if strange := smuggled(source.layout.sizes, config):
        raise InputError(
            f"tensor {strange[0]!r} is no part of a LoRA adapter{and_more(strange)}: PEFT would load it over "
            "the base's weight of that name; never load this file"
        )


@lru_cache(maxsize=4)
def whole_file(path: Path, stamp: tuple[int, int, int]) -> SafetensorsFile:
    """A file of many rows, whose header is read once for all of them as long as the file is the same."""
    return SafetensorsFile(path)


def adapter_config(folder: Path) -> dict[str, Any] | None:
    """The adapter configuration of a PEFT folder, or None where there is none.

    Raises:
        InputError: if it is not a JSON object of a sane size.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    if path.stat().st_size > LARGEST_CONFIG:
        raise InputError(f"{path}: is {path.stat().st_size:,} bytes long, which no adapter configuration is")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object")
    return config


def client_names(addresses: Sequence[Path | Row]) -> list[str]:
    """Short names: the folder's or the file's own, the whole path where that is not unique."""
    paths = [Path(str(address)) for address in addresses]
    short = [path.name if path.is_dir() or not path.suffix else path.stem for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
