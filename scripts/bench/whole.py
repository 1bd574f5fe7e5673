"""What is measured of ours alone, in a child process: the product space, and updates larger than memory."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.measure import Report, measure
from bench.systems import MEMORY, Clock

if TYPE_CHECKING:
    import torch

PIECE = 2**22  # bytes read at once, as ours does: 2^20 float32 values
COLUMNS = 2**16  # of a dense delta, turned to float64 at once


def product(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """m-Krum on B_i A_i - B_g A_g, decided from the factors; the result's re-factorisation is timed apart."""
    from fedllm_sec import Round, aggregate, defense, open_updates

    chain = [defense.build("krum", {"f": job["f"], "m": job["m"]})]
    space: dict[str, Any] = {"space": "product"}

    def run(paths: list[str], reference: str, folder: Path | None = None) -> tuple[Any, Any]:
        opened = open_updates(paths, reference=reference, memory=MEMORY, **space)
        return opened, aggregate(opened, Round(dir=folder), chain)

    run(**job["warm"])
    with tempfile.TemporaryDirectory() as folder:
        (opened, result), measured = measure(lambda: run(job["paths"], job["reference"], Path(folder)), report)
        kept = json.loads((Path(folder) / "krum" / "decision.json").read_text())["kept"]
        start = time.perf_counter()
        result.save([Path(folder) / "mean.safetensors"])
        saved = time.perf_counter() - start
    return {**measured, "save_s": saved, "kept": [int(name[-2:]) for name in kept], "gram": opened.gram.tolist()}


def materialised(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """The same decision from dense deltas, one module at a time: n matrices of d_out x d_in are in memory together."""
    import torch

    dtype = getattr(torch, job["dtype"])

    def run(paths: list[str], reference: str) -> tuple["torch.Tensor", list[int]]:
        gram = torch.zeros(len(paths), len(paths), dtype=torch.float64)
        for deltas in dense_deltas(paths, reference, dtype):
            for start in range(0, deltas.shape[1], COLUMNS):
                piece = deltas[:, start : start + COLUMNS].double()
                gram += piece @ piece.T
        return gram, krum(gram, job["f"], job["m"])

    run(**job["warm"])
    (gram, kept), measured = measure(lambda: run(job["paths"], job["reference"]), report)
    return {**measured, "kept": kept, "gram": gram.tolist()}


def dense_deltas(paths: list[str], reference: str, dtype: "torch.dtype") -> Iterator["torch.Tensor"]:
    """For each module, the (n, d_out * d_in) matrix of the clients' B_i A_i - B_g A_g (their lora_alpha equals r).

    The matrix is made in the same memory as the one before it.
    """
    import torch
    from safetensors.torch import load_file

    *clients, base = (load_file(f"{path}/adapter_model.safetensors") for path in [*paths, reference])
    deltas = torch.empty(0, 0)
    for name in sorted(name for name in base if "lora_A" in name):
        pair = name, name.replace("lora_A", "lora_B")
        before = base[pair[1]].to(dtype) @ base[pair[0]].to(dtype)
        if deltas.shape[1] != before.numel():
            deltas = torch.empty(len(clients), before.numel(), dtype=dtype)
        for row, client in zip(deltas, clients, strict=True):
            torch.matmul(client[pair[1]].to(dtype), client[pair[0]].to(dtype), out=row.view_as(before))
            row -= before.flatten()
        yield deltas


def krum(gram: "torch.Tensor", f: int, m: int) -> list[int]:
    """The m rows whose n - f - 2 nearest others are nearest."""
    norms = gram.diagonal()
    distances = (norms[:, None] + norms[None, :] - 2 * gram).fill_diagonal_(float("inf"))
    scores = distances.sort(dim=1).values[:, : len(gram) - f - 2].sum(dim=1)
    return sorted(scores.argsort(stable=True)[:m].tolist())


def huge(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """m-Krum over whole models in files: open (the gate reads everything), decide, save."""
    from fedllm_sec import Round, aggregate, defense, open_updates

    chain = [defense.build("krum", {"f": job["f"], "m": job["m"]})]
    parts: dict[str, float] = {}

    def run() -> None:
        clock = Clock(parts)
        opened = open_updates(job["paths"], memory=MEMORY)
        clock.lap("open")
        result = aggregate(opened, Round(dir=Path(folder)), chain)
        clock.lap("decide")
        result.save([job["out"]])
        clock.lap("save")

    with tempfile.TemporaryDirectory() as folder:
        _, measured = measure(run, report)
        kept = json.loads((Path(folder) / "krum" / "decision.json").read_text())["kept"]
    written = Path(job["out"]).stat().st_size
    Path(job["out"]).unlink()
    return {**measured, "parts": parts, "kept": kept, "bytes_written": written}


def read(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Read as many bytes of the same files in the same pieces, then write and flush as many, and do nothing else."""
    parts: dict[str, float] = {}

    def run() -> None:
        clock = Clock(parts)
        read_pieces([Path(path) for path in job["paths"]], job["bytes_read"])
        clock.lap("read")
        write_pieces(Path(job["out"]), job["bytes_written"])
        clock.lap("save")

    _, measured = measure(run, report)
    Path(job["out"]).unlink()
    return {**measured, "parts": parts}


def read_pieces(paths: list[Path], amount: int) -> None:
    """Go over all files at once, a piece of each in turn, again and again until `amount` bytes have been read."""
    files = [path.open("rb", buffering=0) for path in paths]
    try:
        view, done = np.empty(PIECE, np.uint8).data, 0
        while done < amount:
            for file in files:
                count = file.readinto(view)
                done += count
                if not count:
                    file.seek(0)
    finally:
        for file in files:
            file.close()


def write_pieces(path: Path, amount: int) -> None:
    """Write `amount` bytes and flush them to the disk."""
    piece = np.random.default_rng(0).bytes(PIECE)
    with path.open("wb", buffering=0) as file:
        for start in range(0, amount, PIECE):
            file.write(piece[: amount - start])
        os.fsync(file.fileno())


KINDS: dict[str, Callable[[dict[str, Any], Report], dict[str, Any]]] = {
    "product": product,
    "materialised": materialised,
    "huge": huge,
    "read": read,
}
