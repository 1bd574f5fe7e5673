"""Pickles, which are scanned by picklescan and never loaded; that a scan finds nothing lets none of them pass."""

import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from picklescan.scanner import SafetyLevel, scan_file_path

SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".data")
SHOWN = 4  # names of what a pickle calls


def is_pickle(name: str, beginning: bytes) -> bool:
    """Whether somebody would unpickle a file: by its name, or by its first bytes (protocol 2 and up)."""
    return name.lower().endswith(SUFFIXES) or (beginning[:1] == b"\x80" and beginning[1:2] in b"\x02\x03\x04\x05")


def dangers(path: Path, most: int) -> tuple[list[str], str]:
    """What a pickle calls that can run code, and, in words, what the scan was worth.

    Args:
        path: of a regular file.
        most: bytes; a larger file, or an archive of more, is not scanned.
    """
    size = unpacked(path)
    if size > most:
        return [], f"not scanned: {size:,} bytes are more than {most:,}"
    with quiet():
        try:
            result = scan_file_path(str(path))
        except Exception as error:  # whatever a scanner of hostile bytes stumbles over
            return [], f"the scanner gave up ({type(error).__name__})"
    bad = sorted(f"{each.module}.{each.name}"[:80] for each in result.globals if each.safety is SafetyLevel.Dangerous)
    odd = sorted(f"{each.module}.{each.name}"[:80] for each in result.globals if each.safety is SafetyLevel.Suspicious)
    if result.scan_err:
        return bad, "it breaks off in the middle"
    return bad, f"it calls {', '.join(odd[:SHOWN])}" if odd else "the scanner found nothing, which proves nothing"


def unpacked(path: Path) -> int:
    """The size of a file, or of all that an archive says it holds."""
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return max(size, sum(entry.file_size for entry in archive.infolist()))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        pass
    return size


@contextmanager
def quiet() -> Iterator[None]:
    """The scanner tells of its own findings, at length; ours are findings."""
    logger = logging.getLogger("picklescan")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
