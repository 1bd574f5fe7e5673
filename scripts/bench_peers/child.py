"""A child process: runs one system on what it was given.

python -m bench_peers.child JOB RESULT    (JSON files; started by `bench_peers.launch`)
"""

import importlib
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("fedllm-sec", "torch", "numpy", "flwr", "ray", "byzfl")


def main() -> None:
    """Do the job, and write what it took."""
    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    done = importlib.import_module(f"bench_peers.{job['module']}").run(job)
    result_file.write_text(json.dumps({**done, "versions": versions()}))


def versions() -> dict[str, str]:
    """Of what is installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
