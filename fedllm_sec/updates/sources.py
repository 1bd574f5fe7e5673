"""Where rows come from: safetensors files, read range by range, and state dicts in memory.

Files are read with `readinto` at an offset and never mapped: mapped pages stay in the resident set while the file is
open, so that seventy adapters would count whole. Nothing is ever unpickled.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedllm_sec.updates.errors import InputError, not_finite
from fedllm_sec.updates.layout import Layout, Span

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILE = "model.safetensors"  # a whole model's, as transformers calls it
MODEL_CONFIG = "config.json"  # likewise
LARGEST = 2.0**110  # of a value, about 1e33; adapters travel in float32, and rounds add them up
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source(Protocol):
    """One row: the tensors of one client, readable by range."""

    @property
    def layout(self) -> Layout:
        """Names and shapes of its tensors."""

    @property
    def on_disk(self) -> bool:
        """Whether loading is reading."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype in which each tensor is stored."""

    def advise(self, span: Span) -> None:
        """Say that a run of columns will be loaded soon."""

    def load(self, span: Span, into: Tensor | None = None) -> Tensor:
        """Return a run of columns in its stored dtype, on the CPU: read into `into` if that is of this dtype.

        Nothing is computed, so that it can be done in a thread beside a computation.
        """


class Entry(NamedTuple):
    """A tensor inside a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """A safetensors file whose header has been checked; its data is read only when asked for.

    Raises:
        InputError: if the file is missing, truncated, malformed, or holds a tensor that is not floating point.
    """

    on_disk = True

    def __init__(self, path: Path):
        self.path = path
        self.entries = read_header(path)
        self.version = version(path.stat())
        self.layout = Layout.of({name: entry.shape for name, entry in self.entries.items()})
        self.dtypes = {name: entry.dtype for name, entry in self.entries.items()}

    def advise(self, span: Span) -> None:
        """Have the system read a run of columns meanwhile, where it can be told so."""
        if hasattr(os, "posix_fadvise") and self.path.exists():
            entry, size = self.entries[span.tensor], self.entries[span.tensor].dtype.itemsize
            with self.path.open("rb", buffering=0) as file:
                length = (span.stop - span.start) * size
                os.posix_fadvise(file.fileno(), entry.offset + span.start * size, length, os.POSIX_FADV_WILLNEED)

    def load(self, span: Span, into: Tensor | None = None) -> Tensor:
        """Return a run of columns, straight from the file."""
        entry = self.entries[span.tensor]
        fits = into is not None and into.dtype == entry.dtype
        out = into if fits and into is not None else torch.empty(span.stop - span.start, dtype=entry.dtype)
        view = memoryview(out.view(torch.uint8).numpy().data)
        try:
            with self.path.open("rb", buffering=0) as file:
                if version(os.fstat(file.fileno())) != self.version:
                    raise InputError(f"{self.path}: was changed after it had been checked; start again")
                file.seek(entry.offset + span.start * entry.dtype.itemsize)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise InputError(f"{self.path}: was cut off while it was read; start again")
                    done += count
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read any more ({error.strerror}); start again") from None
        return out


def version(stat: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file does; not the time of its status, which changes when somebody links to it."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class Row(NamedTuple):
    """Where one row lies in a file that holds those of many clients: each tensor has an axis more, the first."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}[{self.number}]"


class RowOfFile:
    """One row of a file of many.

    Raises:
        InputError: if there is no such row.
    """

    on_disk = True

    def __init__(self, file: SafetensorsFile, index: int):
        self.file, self.index = file, index
        for name, entry in file.entries.items():
            if not entry.shape or not 0 <= index < entry.shape[0]:
                raise InputError(f"{file.path}: tensor {name!r} of shape {list(entry.shape)} has no row {index}")
        self.layout = Layout.of({name: entry.shape[1:] for name, entry in file.entries.items()})
        self.dtypes = file.dtypes

    def place(self, span: Span) -> Span:
        """The same columns in the file."""
        start = self.index * self.layout.sizes[span.tensor]
        return Span(span.tensor, start + span.start, start + span.stop)

    def advise(self, span: Span) -> None:
        """Have the system read a run of columns meanwhile."""
        self.file.advise(self.place(span))

    def load(self, span: Span, into: Tensor | None = None) -> Tensor:
        """Return a run of columns, straight from the file."""
        return self.file.load(self.place(span), into)


class StateDict:
    """A row that is already in memory; its tensors are not copied, and must be left alone.

    Raises:
        InputError: if a tensor is not floating point, or holds NaN or a value beyond `LARGEST`.
    """

    on_disk = False

    def __init__(self, state: Mapping[str, Tensor]):
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS.values():
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise InputError(f"tensor {name!r} is {kind}: only floating-point tensors can be updates")
        self.flat = {name: tensor.detach().reshape(-1).cpu() for name, tensor in state.items()}
        for name, tensor in self.flat.items():
            if not all_finite(tensor):
                raise InputError(not_finite(name))
        self.layout = Layout.of({name: tuple(tensor.shape) for name, tensor in state.items()})
        self.dtypes = {name: tensor.dtype for name, tensor in state.items()}

    def advise(self, span: Span) -> None:
        """It is at hand."""

    def load(self, span: Span, into: Tensor | None = None) -> Tensor:
        """Return a run of columns, not copied."""
        return self.flat[span.tensor][span.start : span.stop]


def all_finite(values: Tensor, most: float = LARGEST) -> bool:
    """Whether all values are numbers of at most `most`: then sums of any number of them are finite in float32."""
    if not values.numel():
        return True
    smallest, largest = torch.aminmax(values)
    return smallest.item() >= -most and largest.item() <= most  # false for NaN too


def adapter_file(path: Path) -> Path:
    """Return the safetensors file of a PEFT adapter's or a model's folder, or the `.safetensors` file itself.

    Raises:
        InputError: if there is none; a pickled `adapter_model.bin` is named and not opened.
    """
    if path.is_dir():
        for name in (ADAPTER_FILE, MODEL_FILE):
            if (path / name).is_file():
                return path / name
        if (path / "adapter_model.bin").exists():
            raise InputError(f"{path}: has only a pickled adapter_model.bin, which is never opened; save safetensors")
        raise InputError(f"{path}: has no {ADAPTER_FILE}")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: is neither a PEFT adapter folder nor a .safetensors file")
    return path


def read_header(path: Path) -> dict[str, Entry]:
    """Check a safetensors file (by its own library: sizes, overlaps, holes) and return where each tensor lies."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, struct.error, json.JSONDecodeError) as error:
        raise InputError(f"{path}: is not a whole safetensors file ({error}); have the client send it again") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in FLOATS:
            raise InputError(f"{path}: tensor {name!r} is {entry['dtype']}; updates must be one of {list(FLOATS)}")
    return {
        name: Entry(FLOATS[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
