"""Where blocks are computed, and how large they may be."""

import re
from dataclasses import dataclass, field

import torch

from fedllm_sec.updates.errors import InputError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TILE = 2**16  # columns; blocks are whole tiles where they can be, so that noise drawn by tile is drawn once
LARGEST_BLOCK = 2**20  # columns; past this a block only leaves the caches
SMALLEST = 2**20  # bytes; below, blocks are so narrow that opening files takes all the time
COPIES = 4  # a block, what is derived from it, and their float64 forms may live at once


@dataclass(frozen=True)
class Budget:
    """The memory that the blocks of a computation may take together, and the device that they live on."""

    memory: int = 2**30
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, memory: str | int, device: str | torch.device = "cpu") -> "Budget":
        """Read `memory` as a number of bytes or a text such as `1GiB`, and check that the device is there."""
        try:
            place = torch.device(device)
        except RuntimeError:
            raise InputError(f"unknown device {device!r}; use cpu or cuda") from None
        if place.type not in ("cpu", "cuda"):
            raise InputError(f"unknown device {device!r}; use cpu or cuda")
        if place.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device {str(device)!r} asked for, but torch sees no CUDA device; use cpu")
        amount = parse_bytes(memory)
        if amount < SMALLEST:
            raise InputError(f"memory={memory}: give the blocks at least 1 MiB")
        return cls(amount, place)

    def block_columns(self, files: int, itemsize: int) -> int:
        """How many columns to read at once from `files` files (the files, not the rows derived from them)."""
        columns = min(self.memory // (max(files, 1) * itemsize * COPIES), LARGEST_BLOCK)
        return max(columns - columns % TILE if columns >= TILE else columns, 1)


def parse_bytes(text: str | int) -> int:
    """`"1GiB"` -> 1073741824; a bare number is bytes."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].upper() or "B") if match else None
    if match is None or unit is None:
        raise InputError(f"cannot read {text!r} as an amount of memory; write for example 512MiB or 2GiB")
    return int(float(match[1]) * unit)
