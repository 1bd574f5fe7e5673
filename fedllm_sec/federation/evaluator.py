"""Evaluate a global adapter on the server's test set, all processes together."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from fedllm_sec.federation.run_folder import load_adapter
from fedllm_sec.federation.world import World
from fedllm_sec.tasks.evaluation import Score, batches_by_length
from fedllm_sec.tasks.forms import Form
from fedllm_sec.tasks.task import Example
from fedllm_sec.training.base_model import BaseModel
from fedllm_sec.training.sharded import for_inference
from fedllm_sec.updates.files import sha256
from fedllm_sec.updates.sources import adapter_file


class Evaluator:
    """Scores adapters on one test set; an adapter that was scored before costs nothing.

    Args:
        base: the shared model.
        form: of its task.
        test: the test set.
        batch_size: texts in a forward pass.
        threads: CPU threads, the same for every number of processes.
        world: who shares the work; the batches are the same however many share it, and so are the results.
    """

    def __init__(
        self,
        base: BaseModel,
        form: Form,
        test: Sequence[Example],
        batch_size: int,
        threads: int,
        world: World,
    ):
        self.base, self.form, self.threads, self.world = base, form, threads, world
        self.batch_size = batch_size
        self.test = form.encode(test)
        self.batches = batches_by_length(self.test, batch_size)
        self.known: dict[str, dict[str, float]] = {}

    def on(self, test: Sequence[Example]) -> "Evaluator":
        """The same for other texts."""
        return Evaluator(self.base, self.form, test, self.batch_size, self.threads, self.world)

    def __call__(self, folder: Path) -> dict[str, float]:
        """The metrics of an adapter folder, the same on every process."""
        digest = sha256(adapter_file(folder))
        if digest not in self.known:
            self.known[digest] = self.evaluate(folder)
        return dict(self.known[digest])

    def evaluate(self, folder: Path) -> dict[str, float]:
        """Score our share of the batches and put all shares together."""
        torch.set_num_threads(self.threads)
        self.base.load_adapter(load_adapter(folder))
        with for_inference(self.base.model) as model:
            shared = [
                (i, one)
                for batch in self.world.share(self.batches)
                for i, one in zip(batch, self.form.score(model, [self.test[i] for i in batch]), strict=True)
            ]
        everything = dict(chain.from_iterable(self.world.gather(shared)))
        return self.form.metrics([Score(*everything[i]) for i in range(len(self.test))], self.test)
