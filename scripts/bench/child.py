"""A child process: makes one system ready, runs one call, and reports what it took.

    python -m bench.child JOB    (JSON; started by `bench.launch`)

It reports JSON lines to the descriptor named in the job: `started`, then `done` with what was measured, or `failed`.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import WARM_CLIENTS, WARM_SHAPES
from bench.files import draw_update, write_update
from bench.measure import Report, measure
from bench.systems import prepare
from bench.whole import KINDS

SKETCH = 4096  # coordinates of a result that are reported, to compare systems by


def call(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """One method of one system, after the same method has run on tiny updates."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"client_{i}.safetensors" for i in range(WARM_CLIENTS)]
        for i, path in enumerate(paths):
            write_update(path, WARM_SHAPES, draw_update(WARM_SHAPES, WARM_CLIENTS, 1, i))
        with contextlib.suppress(Exception):  # a call that fails will tell so below
            prepare(job["system"], job["warm_call"], paths, job["peer"], Path(folder) / "out.safetensors").run()
    out = Path(job["out"])
    prepared = prepare(job["system"], job["call"], [Path(path) for path in job["paths"]], job["peer"], out)
    result, measured = measure(prepared.run, report)
    vector = prepared.vector(result)
    at = np.linspace(0, len(vector) - 1, min(SKETCH, len(vector))).astype(np.int64)
    out.unlink(missing_ok=True)
    finite = bool(np.isfinite(vector).all())
    return {**measured, "parts": prepared.parts, "finite": finite, "sketch": vector[at].astype(float).tolist()}


def main() -> None:
    """Do the job; what systems print goes nowhere (some print whole vectors)."""
    job = json.loads(sys.argv[1])
    report = Report(job["report"])
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        done = call(job, report) if job["kind"] == "call" else KINDS[job["kind"]](job, report)
    except Exception as error:
        report("failed", error=f"{type(error).__name__}: {error}"[:400])
    else:
        report("done", **done)


if __name__ == "__main__":
    main()
