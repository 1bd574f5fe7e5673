"""How each system is handed the updates and asked for a result; imported in a child process only.

`prepare` does what comes before the clock starts: it imports the system and puts the updates into the form that the
system wants. The function that it returns is what is measured.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from bench.files import Array, Shapes, read_shapes, read_update
from bench.stand_in import stand_in

MEMORY = "256MiB"  # for the blocks of ours where updates come from files


class Prepared(NamedTuple):
    """A call that is ready to be measured, and how to see its result as one vector afterwards."""

    run: Callable[[], Any]
    vector: Callable[[Any], Array]
    parts: dict[str, float] = {}  # noqa: RUF012  # seconds of the call's parts, once it has run


def prepare(system: str, call: Any, paths: Sequence[Path], peer: str | None, out: Path) -> Prepared:
    """Make a system ready.

    Args:
        system: `ours`, `ours_files`, `byzfl`, `flower` or `fedml`.
        call: what it calls the method, with parameters; a chain of such for ByzFL.
        paths: the updates.
        peer: where the peer is, if it is not installed: a wheel, or the folder that it was unpacked to.
        out: where a result that is a file goes.
    """
    if system == "ours_files":
        return ours_from_files(call, paths, out)
    updates = [read_update(path) for path in paths]
    if system == "ours":
        return ours_in_memory(call, updates)
    if system == "byzfl":
        return byzfl(call, updates, peer)
    if system == "flower":
        return flower(call, updates)
    from bench.fedml import fedml

    return Prepared(*fedml(call, updates, peer))


def our_method(call: Any, shapes: Shapes) -> tuple[list[Any], Any]:
    """The chain of defenses, and the round; only CRFL asks for the global adapter, which is zero here."""
    import torch

    from fedllm_sec import Round, defense, stack_updates

    name, parameters = call
    chain = [] if name == "average" else [defense.build(name, parameters)]
    if name != "crfl":
        return chain, Round(seed=0)
    zero = {key: torch.zeros(shape) for key, shape in shapes.items()}
    return chain, Round(seed=0, reference=stack_updates([zero], [1.0]))


def ours_in_memory(call: Any, updates: list[dict[str, Array]]) -> Prepared:
    """State dicts in memory; the gate's check of every value is part of the call."""
    import torch

    from fedllm_sec import aggregate, stack_updates

    states = [{name: torch.from_numpy(array) for name, array in update.items()} for update in updates]
    chain, round_ = our_method(call, {name: array.shape for name, array in updates[0].items()})
    parts: dict[str, float] = {}

    def run() -> torch.Tensor:
        clock = Clock(parts)
        stacked = stack_updates(states, [1.0] * len(states))
        clock.lap("open")
        result = aggregate(stacked, round_, chain)
        clock.lap("decide")
        vector, done = torch.empty(result.layout.columns), 0
        for _, block in result.blocks():
            vector[done : done + block.shape[1]] = block[0]
            done += block.shape[1]
        clock.lap("result")
        return vector

    return Prepared(run, lambda vector: vector.numpy(), parts)


def ours_from_files(call: Any, paths: Sequence[Path], out: Path) -> Prepared:
    """Safetensors files in, a safetensors file out, flushed to the disk: reading and writing are part of the call."""
    from fedllm_sec import aggregate, open_updates

    chain, round_ = our_method(call, read_shapes(paths[0]))
    parts: dict[str, float] = {}

    def run() -> Path:
        clock = Clock(parts)
        opened = open_updates(list(paths), memory=MEMORY)
        clock.lap("open")
        result = aggregate(opened, round_, chain)
        clock.lap("decide")
        result.save([out])
        clock.lap("result")
        return out

    return Prepared(run, lambda path: np.concatenate([a.ravel() for a in read_update(path).values()]), parts)


class Clock:
    """Writes down how long each part of a call took."""

    def __init__(self, parts: dict[str, float]):
        self.parts, self.last = parts, time.perf_counter()

    def lap(self, part: str) -> None:
        """Name what has been done since the last lap."""
        now = time.perf_counter()
        self.parts[part], self.last = now - self.last, now


def byzfl(call: Any, updates: list[dict[str, Array]], peer: str | None) -> Prepared:
    """A list of flat torch vectors; a chain is a pre-aggregator and an aggregator.

    `import byzfl` wants torchvision and seaborn for its benchmark, so that only its aggregators are imported.
    """
    import torch

    stand_in("byzfl", peer)
    from byzfl.aggregators import aggregators, preaggregators

    names = {**vars(preaggregators), **vars(aggregators)}
    steps = [names[name](**parameters) for name, parameters in call]
    vectors = [torch.from_numpy(np.concatenate([array.ravel() for array in update.values()])) for update in updates]
    updates.clear()

    def run() -> torch.Tensor:
        result: Any = vectors
        for step in steps:
            result = step(result)
        return torch.as_tensor(result)

    return Prepared(run, lambda vector: vector.numpy())


def flower(call: Any, updates: list[dict[str, Array]]) -> Prepared:
    """Replies as the server has them, arrays serialised; a strategy asks a reply only for its content and errors."""
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp import strategy

    replies = []
    for i in range(len(updates)):
        arrays = {name: FlowerArray(array) for name, array in updates[i].items()}
        updates[i] = {}
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1.0})})
        replies.append(SimpleNamespace(content=content, has_error=bool))
    name, parameters = call
    rule = getattr(strategy, name)(**parameters)

    def run() -> Any:
        return rule.aggregate_train(1, replies)[0]

    return Prepared(run, lambda record: np.concatenate([array.ravel() for array in record.to_numpy_ndarrays()]))
