"""What an audit of many adapters costs: time beside reading their bytes, passes, and memory of a fresh process.

python scripts/bench_audit.py [--adapters 70] [--rank 16] [--folder FOLDER]

The adapters are LoRA on all four linear maps of the 16 layers of Pythia-1B (33.6 MB each in float32 at rank 16), with
random values around a global one. They are made first and left in the folder.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from safetensors.torch import save_file

LAYERS, WIDTH = 16, 2048
MAPS = {
    "attention.query_key_value": (WIDTH, 3 * WIDTH),
    "attention.dense": (WIDTH, WIDTH),
    "mlp.dense_h_to_4h": (WIDTH, 4 * WIDTH),
    "mlp.dense_4h_to_h": (4 * WIDTH, WIDTH),
}
CHUNK = 2**24  # bytes
PLACE = Path(tempfile.gettempdir()) / "bench_audit"
AUDIT = """
import json, sys
from pathlib import Path
from fedllm_sec.audit import audit_adapters
folder = Path(sys.argv[1])
audit = audit_adapters(sorted(folder.glob("client_*")), reference=folder / "global", memory=sys.argv[2])
print(json.dumps({**audit.cost, "findings": len(audit.findings), "adapters": len(audit.statistics.adapters)}))
"""


def main(
    adapters: Annotated[int, typer.Option(help="How many.")] = 70,
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 16,
    folder: Annotated[Path, typer.Option(help="Where they are made.")] = PLACE,
    memory: Annotated[str, typer.Option(help="As of `fedllm-sec audit`.")] = "512MiB",
    repeats: Annotated[int, typer.Option(help="Of each measurement; the median counts.")] = 3,
) -> None:
    """Make the adapters if they are not there, and measure."""
    make(folder, adapters, rank)
    files = sorted(folder.glob("client_*/*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    reads, audits, peaks = [], [], []
    for _ in range(repeats):
        reads.append(read_all(files))
        done = subprocess.run(
            [sys.executable, "-c", AUDIT, str(folder), memory], check=True, capture_output=True, text=True
        )
        cost = json.loads(done.stdout.splitlines()[-1])
        audits.append(cost["seconds"])
        peaks.append(cost["peak_memory"] / 2**20)
    read, audit = statistics.median(reads), statistics.median(audits)
    print(f"{adapters} adapters, {size / 2**20:,.0f} MiB; {cost['findings']:.0f} findings")
    print(f"plain read {read:.2f} s; audit {audit:.2f} s = {audit / read:.1f} times; {cost['passes']:g} passes")
    print(f"peak memory {max(peaks):,.0f} MiB (memory={memory})")


def make(folder: Path, count: int, rank: int) -> None:
    """Write a global adapter and clients' ones around it."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in MAPS})}
    names = ["global", *(f"client_{i:03d}" for i in range(count))]
    start: dict[str, torch.Tensor] = {}
    for number, name in enumerate(track(names, "making adapters")):
        path = folder / name / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(number)
        if path.exists() and start:
            continue
        state = {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in shapes(rank).items()}
        start = start or state
        if name != "global":
            state = {key: start[key] + 0.1 * value for key, value in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path, {"format": "pt"})
        (path.parent / "adapter_config.json").write_text(json.dumps(config))


def shapes(rank: int) -> dict[str, tuple[int, int]]:
    """Of all factors."""
    found = {}
    for layer in range(LAYERS):
        for name, (d_in, d_out) in MAPS.items():
            stem = f"base_model.model.gpt_neox.layers.{layer}.{name}"
            found |= {f"{stem}.lora_A.weight": (rank, d_in), f"{stem}.lora_B.weight": (d_out, rank)}
    return found


def read_all(files: list[Path]) -> float:
    """Seconds to read all bytes of some files, which the system may have in its cache."""
    buffer, began = bytearray(CHUNK), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
