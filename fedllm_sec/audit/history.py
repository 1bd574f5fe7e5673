"""Clients' earlier updates: whether one turned suddenly away from what it sent before."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm_sec.updates.admit import open_updates
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.sources import ADAPTER_FILE

EARLIER = 3  # rounds that are compared
GLOBALS = ("global", "received")  # what a round's folder may call the adapter that its clients got


def turns(
    history: Path, current: Mapping[str, Path], reference: Path | None, memory: str | int
) -> tuple[NDArray[np.float64], list[str]]:
    """The cosine of each client's update with the mean of its last ones; NaN where it has none.

    Args:
        history: a folder of earlier rounds, each with a folder for each client (`round_0003/client_01`), and, where
            updates are to be told from adapters, what the clients got: `round_0003/global`, or beside the rounds
            `global_0002`, as a run of ours leaves it.
        current: the adapters, by the clients' names.
        reference: what they started from.
        memory: for blocks.

    Returns:
        (n,), and what was left out and why.

    Raises:
        InputError: if the folder does not exist.
    """
    if not history.is_dir():
        raise InputError(f"--history {history}: no such folder")
    found, notes = np.full(len(current), np.nan), []
    rounds = [path for path in sorted(history.iterdir()) if path.is_dir() and not is_adapter(path)]
    for row, (name, path) in enumerate(current.items()):
        earlier = [each for each in rounds if is_adapter(each / name) and (each / name).resolve() != path.resolve()]
        try:
            if earlier:
                found[row] = turn(
                    path, reference, [(each / name, received(each)) for each in earlier[-EARLIER:]], memory
                )
        except InputError as error:
            notes.append(f"history of {name}: {str(error)[:200]}")
    if not np.isfinite(found).any():
        notes.append(f"history {history}: no earlier update of these clients was found")
    return found, notes


def turn(path: Path, reference: Path | None, earlier: Sequence[tuple[Path, Path | None]], memory: str | int) -> float:
    """The cosine of an update with the mean direction of earlier ones, in the space of products."""
    now = open_updates([path], reference=reference, space="product", memory=memory)
    for before, start in earlier:
        now = now.concat(open_updates([before], reference=start, space="product", memory=memory))
    lengths = now.gram.diagonal().clamp(min=0).sqrt()
    if not lengths[0] > 0 or not (lengths[1:] > 0).any():
        return float("nan")
    unit = now.gram / torch.where(lengths > 0, lengths, torch.inf)[:, None]
    unit = unit / torch.where(lengths > 0, lengths, torch.inf)[None, :]
    mean = unit[1:, 1:].sum().clamp(min=0).sqrt()
    return float(unit[0, 1:].sum() / mean) if mean > 0 else float("nan")


def received(round_folder: Path) -> Path | None:
    """The global adapter that the clients of a round started from; None where it is not there."""
    inside = next((round_folder / name for name in GLOBALS if is_adapter(round_folder / name)), None)
    number = round_folder.name.rpartition("_")[2]
    beside = round_folder.parent / f"global_{int(number) - 1:04d}" if number.isdecimal() else None
    return inside or (beside if beside is not None and is_adapter(beside) else None)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (path / ADAPTER_FILE).is_file()
