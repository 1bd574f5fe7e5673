"""What every system is given, as files: the examples, the first model, and who trains on which batches in which round.

Peers read it in an environment of their own, where this library is not installed: numpy and torch only.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Examples = tuple[Tensor, Tensor]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Given:
    """The work of all clients in all rounds.

    Attributes:
        x: (n, 1, 28, 28) float32, normalised.
        y: (n,) int64.
        initial: the first model's state dict.
        facts: `model`, `clients`, `rounds`, `algorithm`, `batch`, `learning_rate`.
        order: (k,) int64 places in `x`, in the order of rounds, then of clients, then of what a client sees.
        counts: (rounds, clients) int64: of the places, how many a client sees in a round.
        weights: (clients,) float64, of each client's model in the average.
    """

    x: Tensor
    y: Tensor
    initial: dict[str, Tensor]
    facts: dict[str, Any]
    order: Int64s
    counts: Int64s
    weights: npt.NDArray[np.float64]

    def batches(self, round: int, client: int) -> list[Tensor]:
        """A client's batches in a round (from 1): places, each (b,) with b <= `facts["batch"]`."""
        end = int(self.counts.ravel()[: (round - 1) * self.counts.shape[1] + client + 1].sum())
        places = torch.from_numpy(self.order[end - int(self.counts[round - 1, client]) : end])
        return list(torch.split(places, self.facts["batch"]))

    def steps(self, round: int) -> int:
        """Gradient steps of all clients in a round."""
        return int((-(-self.counts[round - 1] // self.facts["batch"])).sum())


class Sliced(Dataset[Examples]):
    """Examples that are fetched a batch at a time by indexing, rather than one by one and stacked."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __getitem__(self, index: int) -> Examples:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: Tensor) -> Examples:
        """A whole batch; torch's loaders ask for this where it is there."""
        return self.x[indices], self.y[indices]


def loader(given: Given, batches: list[Tensor], *, sliced: bool) -> "DataLoader[Examples]":
    """Batches by a loader of torch.

    Args:
        given: the examples.
        batches: of `Given.batches`.
        sliced: index whole batches, which no tutorial does; else torch's TensorDataset and its stacking of examples.
    """
    if sliced:
        tensors: list[Any] = list(batches)
        return DataLoader(Sliced(given.x, given.y), batch_sampler=tensors, collate_fn=as_it_is)
    listed = [batch.tolist() for batch in batches]
    examples: Dataset[Any] = TensorDataset(given.x, given.y)
    return DataLoader(examples, batch_sampler=listed)


def as_it_is(batch: Any) -> Any:
    """A batch needs no stacking any more."""
    return batch


def write(folder: Path, given: Given) -> None:
    """Write everything, for `read`."""
    np.savez(folder / "examples.npz", x=given.x.numpy(), y=given.y.numpy())
    write_state(folder / "initial.npz", given.initial)
    np.savez(folder / "work.npz", order=given.order, counts=given.counts, weights=given.weights)
    (folder / "facts.json").write_text(json.dumps(given.facts))


@functools.cache
def read(folder: Path) -> Given:
    """Read everything, once in a process."""
    with np.load(folder / "examples.npz") as examples:
        x, y = torch.from_numpy(examples["x"]), torch.from_numpy(examples["y"])
    with np.load(folder / "work.npz") as work:
        order, counts, weights = work["order"], work["counts"], work["weights"]
    facts = json.loads((folder / "facts.json").read_text())
    return Given(x, y, read_state(folder / "initial.npz"), facts, order, counts, weights)


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """A model's state dict."""
    np.savez(path, **{name: value.detach().numpy() for name, value in state.items()})  # type: ignore[arg-type]


def read_state(path: Path) -> dict[str, Tensor]:
    """A model's state dict."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
