"""The memory of this process: how much it ever took, and giving back what it no longer needs."""

import ctypes
import re
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes; not that of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Give memory that was freed back to the system, where it is glibc that keeps it.

    Blocks of many sizes, freed and taken by several threads, leave holes: a pass over 64 modules of 70 adapters grew
    from 0.6 to 1.7 GB although nothing of it was held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
