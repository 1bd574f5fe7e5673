"""The processes of a launch, and how they wait for one another.

Under a launcher that shards the model (DeepSpeed) all processes train one client together, and nothing here touches
their environment. Otherwise processes train *different clients at once*: each must then look like a single process to
`Trainer`, so the launcher's variables are taken out of the environment, and processes meet through the launcher's
key-value store alone. What they exchange are files.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=2)  # how long a process waits for a slower one


@dataclass
class World:
    """Who we are among the processes.

    Attributes:
        rank: our number, from 0; 0 is the main process, the only one that writes results.
        size: how many we are.
        sharded: whether all processes hold one model together.
        store: what connects us; None for a single process.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False
    store: Any = None
    _meetings: Any = field(default_factory=count)

    @classmethod
    def from_environment(cls) -> "World":
        """Join the processes that a launcher (`accelerate launch`, `torchrun`) started; call it first of all."""
        sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        store = None
        if size > 1:
            found, _, _ = next(rendezvous("env://", timeout=PATIENCE))
            store = PrefixStore("fedllm_sec", found)
        if not sharded:
            take_one_gpu(int(os.environ.get("LOCAL_RANK", "0")))
            for name in LAUNCHER:
                os.environ.pop(name, None)
        return cls(rank, size, sharded, store)

    @property
    def is_main(self) -> bool:
        """Whether we are the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> list[Any]:
        """The items that fall to us: every `size`-th, or all of them where the model is sharded."""
        return list(items) if self.sharded else list(items[self.rank :: self.size])

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (JSON), by rank; also a meeting point."""
        if self.store is None:
            return [value]
        meeting = next(self._meetings)
        self.store.set(f"{meeting}/{self.rank}", json.dumps(value))
        keys = [f"{meeting}/{rank}" for rank in range(self.size)]
        self.store.wait(keys, PATIENCE)
        return [json.loads(self.store.get(key)) for key in keys]

    def wait(self) -> None:
        """Go on when everybody is here."""
        self.gather(None)

    def is_first(self, text: str) -> bool:
        """Whether no other process has asked this of the same text."""
        return self.store is None or int(self.store.add(f"first/{hash_of(text)}", 1)) == 1

    def tell(self, key: str, value: float) -> None:
        """Leave a number for whoever asks; waits for nobody."""
        if self.store is not None:
            self.store.set(f"told/{key}", str(value))

    def ask(self, key: str) -> float | None:
        """The number that was left under a key, or None."""
        if self.store is None or not self.store.check([f"told/{key}"]):
            return None
        return float(self.store.get(f"told/{key}"))


def hash_of(text: str) -> str:
    """A key for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def take_one_gpu(local_rank: int) -> None:
    """Let this process see one GPU, its own, before CUDA starts: `Trainer` would use every GPU that it sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank % len(devices)]
