"""Attacks that look, planted by tests: what they find can be told beforehand. As a program: a run with one of them.

`python -m tests.federation.peeping CONFIG.json` runs the configuration in the processes that a launcher's variables
name; each of them has the attacks then.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fedllm_sec import Attack, InputError, attack
from fedllm_sec.attacks.reconstruction.revealed import FoundToken, RevealedImages, RevealedLabels, RevealedText


def tensors(rows):
    """A row's tensors by name."""
    found = {name: torch.empty(shape) for name, shape in rows.layout.shapes}
    for span, block in rows.blocks():
        found[span.tensor].view(-1)[span.start : span.stop] = block[0].float()
    return found


@contextmanager
def planted() -> Iterator[list]:
    """Registers four attacks, gives a list of what they were shown, and takes them away again."""
    shown: list = []

    def seen(rows, threat, update):
        shown.append((rows.clients[0], threat, update, rows.num_samples.item()))
        return ("planted", 0.5, False, "it was planted", 12.5)

    @attack("peep", paper="none, arXiv:0000.00000")
    def peep(*, needs: str = "model", disturbs: bool = False):
        """The example of a logistic regression that did one step on one example: a row of weights by its bias."""

        def reconstruct_data(rows, threat):
            if needs == "model" and threat.victim.model is None:
                raise InputError("peep needs a small model")
            update = tensors(rows)
            if disturbs:
                torch.manual_seed(4711)
            told = seen(rows, threat, update)
            weight, bias = (next(v for v in update.values() if v.dim() == dim) for dim in (2, 1))
            label = int(bias.argmax())  # its logit alone is raised
            x = (weight[label] / bias[label]).view(1, *threat.victim.shape)
            return RevealedImages(rows.clients[0], *told, x, torch.tensor([label]), 0.0)

        return Attack(reconstruct_data=reconstruct_data)

    @attack("peep_labels", paper="none, arXiv:0000.00000")
    def peep_labels():
        """All classes, five of each; two rows' worth of results are what many rows would give."""

        def reconstruct_data(rows, threat):
            told = seen(rows, threat, tensors(rows))
            classes = threat.victim.classes
            return (RevealedLabels(rows.clients[0], *told, tuple(range(classes)), (5,) * classes),)

        return Attack(reconstruct_data=reconstruct_data)

    @attack("peep_texts", paper="none, arXiv:0000.00000")
    def peep_texts(*, token: int = 5):
        """The first 500 tokens of the vocabulary, and one sentence."""

        def reconstruct_data(rows, threat):
            if threat.victim.base is None:
                raise InputError("peep_texts needs a base model's folder")
            told = seen(rows, threat, tensors(rows))
            tokens = tuple(FoundToken(id, 1.0, 1.0) for id in range(500))
            return RevealedText(rows.clients[0], *told, tokens, ((token, token),), 8)

        return Attack(reconstruct_data=reconstruct_data)

    try:
        yield shown
    finally:
        for name in ("peep", "peep_labels", "peep_texts"):
            del attack._entries[name]


if __name__ == "__main__":
    from fedllm_sec.config import Config
    from fedllm_sec.federation.experiment import run_experiment
    from fedllm_sec.federation.world import World

    with planted() as shown:
        world = World.from_environment()
        config = Config.model_validate(json.loads(Path(sys.argv[1]).read_text()))
        folder = run_experiment(config, world)
        clients = [client for client, *_ in shown]
        Path(f"{folder}.{world.rank}.json").write_text(json.dumps(clients))
