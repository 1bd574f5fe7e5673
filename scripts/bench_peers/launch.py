"""Run one system in a fresh process, in its own interpreter, and take down what it measured."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.launch import environment

from bench_peers.cases import System
from bench_peers.given import read_state

TAIL = 600  # characters of a failed process's last words


def launch(system: System, job: dict[str, Any], python: str, folder: Path, limit: float) -> dict[str, Any]:
    """Run a job.

    Args:
        system: who does it.
        job: `given`, `config` and `threads`.
        python: the peers' interpreter.
        folder: for the run's files; deleted again.
        limit: seconds.

    Returns:
        What the child measured, with `process_seconds` from start to end, the `final` state dict, and `outcome` = `ok`;
        or only an `outcome` that says in words why there is nothing.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        paths = {name: Path(place) / name for name in ("job.json", "result.json", "final.npz", "log")}
        whole = {**job, **system.options, "module": system.module}
        whole |= {"out": str(Path(place) / "run"), "final": str(paths["final.npz"])}
        paths["job.json"].write_text(json.dumps(whole))
        command = [python if system.peer else sys.executable, "-m", "bench_peers.child"]
        command += [str(paths["job.json"]), str(paths["result.json"])]
        began = time.perf_counter()
        code = wait_for(command, surroundings(system, whole["threads"]), paths["log"], limit)
        seconds = time.perf_counter() - began
        if code is None:
            return {"outcome": f"longer than {limit:g} s"}
        if code or not paths["result.json"].exists() or not paths["final.npz"].exists():
            return {"outcome": f"failed: {paths['log'].read_text(errors='replace')[-TAIL:]}"}
        measured = json.loads(paths["result.json"].read_text())
        return {**measured, "outcome": "ok", "process_seconds": seconds, "final": read_state(paths["final.npz"])}


def wait_for(command: list[str], variables: dict[str, str], log: Path, limit: float) -> int | None:
    """The exit code, or None if it took too long; the process goes with all that it started."""
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def surroundings(system: System, threads: int) -> dict[str, str]:
    """The child's environment: Flower's actors have one core and one thread each, everybody else all cores."""
    own = 1 if system.module == "flower_server" else threads
    return {**environment(own), "RAY_USAGE_STATS_ENABLED": "0"}
