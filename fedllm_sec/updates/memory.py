"""How much memory this process ever took."""

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
