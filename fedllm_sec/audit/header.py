"""The header of a safetensors file, read with distrust: every fault by itself, where the library stops at the first.

A file is 8 bytes of length (little-endian), so many bytes of JSON, and then the tensors, back to back.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from fedllm_sec.audit.patterns import suspicious

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "C64": 64, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")
LARGEST_METADATA = 4096  # characters of one value
LARGEST_DIMENSION = 2**40


class Fault(NamedTuple):
    """What is wrong: the rule, in words, and the tensor if it is one's."""

    rule: str
    message: str
    tensor: str | None = None
    measured: Any = None
    threshold: Any = None


class TensorEntry(NamedTuple):
    """What the header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Header:
    """What a header says, and what is wrong with it.

    Attributes:
        tensors: by name; none where the header cannot be read.
        faults: in the order in which they were found.
        metadata: the free text.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether its tensors can be read: nothing is wrong but what is in the metadata."""
        return all(fault.rule == "FS004" for fault in self.faults)


def read_header(path: Path, most: int) -> Header:
    """Read and check the header of a file; never more than `most` bytes of it.

    Raises:
        OSError: if the file cannot be read at all.
    """
    header = Header()
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            return at_fault(header, "FS008", f"is {size} bytes long: no header fits")
        (length,) = struct.unpack("<Q", first)
        if length > size - 8:
            return at_fault(header, "FS008", f"its header says it is {length:,} bytes long, and the file has {size:,}")
        if length > most:
            return at_fault(header, "FS003", f"its header is {length:,} bytes long", None, length, most)
        text = file.read(length)
    doubled: list[str] = []
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: unique(pairs, doubled))
    except (ValueError, RecursionError) as error:
        return at_fault(header, "FS008", f"its header is no JSON ({type(error).__name__})")
    if not isinstance(found, dict):
        return at_fault(header, "FS008", "its header is no JSON object")
    for name in doubled:
        at_fault(header, "FS010", "is named twice in the header", name)
    check_metadata(header, found.pop("__metadata__", None))
    check_tensors(header, found, size - 8 - length)
    return header


def at_fault(header: Header, *fault: Any) -> Header:
    """The header with one fault more."""
    header.faults.append(Fault(*fault))
    return header


def unique(pairs: list[tuple[str, Any]], doubled: list[str]) -> dict[str, Any]:
    """A JSON object; keys that come again are noted."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            doubled.append(key)
        result[key] = value
    return result


def check_metadata(header: Header, metadata: Any) -> None:
    """Strings by strings, short, and nothing that looks like a secret, an address or code."""
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        at_fault(header, "FS008", "its __metadata__ is no JSON object")
        return
    header.metadata = metadata
    for key, value in metadata.items():
        where = f"metadata {key[:60]!r}"
        if not isinstance(value, str):
            at_fault(header, "FS008", f"{where} is no text")
        elif len(value) > LARGEST_METADATA:
            at_fault(header, "FS004", f"{where} is {len(value):,} characters long", None, len(value), LARGEST_METADATA)
        elif why := suspicious(f"{key} {value}"):
            at_fault(header, "FS004", f"{where} holds {why}")


def check_tensors(header: Header, found: Mapping[str, Any], data: int) -> None:
    """Types, shapes and offsets; the tensors must fill the data without holes, each by itself."""
    places: list[tuple[int, int, str]] = []
    for name, entry in found.items():
        place = place_of(header, name, entry)
        if place is not None:
            places.append((*place, name))
    if len(places) < len(found):
        return
    end = 0
    for start, stop, name in sorted(places):
        if stop > data:
            at_fault(header, "FS009", f"lies beyond the end of the file: bytes {start} to {stop} of {data}", name)
            return
        if start != end:
            kind = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            at_fault(header, "FS009", f"{kind}: bytes {start} to {stop}, expected to begin at {end}", name)
            return
        end = stop
    if end < data:
        at_fault(header, "FS011", f"has {data - end:,} bytes behind its last tensor", None, data - end, 0)


def place_of(header: Header, name: str, entry: Any) -> tuple[int, int] | None:
    """Where a tensor lies, and note what it is; None, with a fault, where that makes no sense."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        at_fault(header, "FS008", "is not described by dtype, shape and data_offsets alone", name)
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        at_fault(header, "FS017", f"is of an unknown type {str(dtype)[:40]!r}", name)
        return None
    if not naturals(shape) or not naturals(offsets) or len(offsets) != 2 or max(shape, default=0) > LARGEST_DIMENSION:
        at_fault(header, "FS008", "has a shape or offsets that are no natural numbers", name)
        return None
    if offsets[1] - offsets[0] != prod(shape) * BITS[dtype] / 8:
        text = f"of shape {shape[:8]} and type {dtype} cannot take {offsets[1] - offsets[0]} bytes"
        at_fault(header, "FS009", text, name)
        return None
    if dtype not in FLOATING:
        at_fault(header, "FS017", f"is of type {dtype}", name, dtype, list(FLOATING))
    header.tensors[name] = TensorEntry(dtype, tuple(shape))
    return offsets[0], offsets[1]


def naturals(values: Any) -> bool:
    """Whether it is a list of natural numbers, zero among them; true is none."""
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and v >= 0 for v in values)
