"""What one call takes: time, memory and reading, of the process that makes it."""

import contextlib
import ctypes
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """Writes JSON lines to a descriptor."""

    def __init__(self, descriptor: int):
        self.file = os.fdopen(descriptor, "w", buffering=1)

    def __call__(self, event: str, **values: Any) -> None:
        """Write one line."""
        self.file.write(json.dumps({"event": event, **values}) + "\n")


def measure(run: Callable[[], Any], report: Report) -> tuple[Any, dict[str, Any]]:
    """Run a call: wall and CPU seconds, and the peak of resident memory above what it was before.

    The peak is the kernel's VmHWM, set back before the call; where that is not permitted it is the process's highest
    ever, and so at most too high.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed should not hide what the call takes
    reset = True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        reset = False
    before, read, from_disk = status("VmRSS"), counted("rchar"), counted("read_bytes")
    report("started")
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = status("VmHWM")
    return result, {
        "wall_s": wall,
        "cpu_s": cpu,
        "before_bytes": before,
        "peak_bytes": peak,
        "added_bytes": max(peak - before, 0),
        "peak_was_reset": reset,
        "bytes_read": counted("rchar") - read,
        "bytes_from_disk": counted("read_bytes") - from_disk,
    }


def status(field: str) -> int:
    """Bytes from a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def counted(field: str) -> int:
    """Bytes that this process has read: `rchar` from files or their cache, `read_bytes` from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
