"""What `accelerate launch` runs: the same client under each callback, in as many processes as there are.

Usage: launched.py FOLDER BATCH_OF_A_PROCESS [4bit]
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from transformers import Trainer, TrainerCallback

from fedllm_sec import InputError
from fedllm_sec.callbacks import (
    AddNoise,
    ClipUpdate,
    FlWbcNoise,
    FreezeA,
    MaskGradient,
    NoTraining,
    ProjectUpdate,
    ReplaceModel,
    SubmitUpdate,
)
from fedllm_sec.callbacks.weights import weights_of
from fedllm_sec.training.sharded import take_down
from tests.callbacks.clients import arguments, data, model

SHORT = 0.005


class Digest(TrainerCallback):
    """Note of what this process has in the end."""

    def __init__(self, path):
        self.path = path

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model

    def on_train_end(self, args, state, control, **kwargs):
        digest = hashlib.sha256()
        for name, value in sorted(weights_of(self.model).read().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        self.path.write_text(digest.hexdigest())


def cases(made):
    change = weights_of(made).read()
    return {
        "plain": [],
        "clip": [ClipUpdate(SHORT)],
        "clip_steps": [ProjectUpdate(SHORT)],
        "noise": [AddNoise(0.1, seed=3)],
        "replace": [ReplaceModel(gamma=3.0)],
        "freeze": [FreezeA()],
        "lazy": [NoTraining()],
        "disguised": [NoTraining("disguised", std=0.1, seed=4)],
        "both": [ClipUpdate(SHORT), AddNoise(0.1, seed=3)],
        "mask": [MaskGradient(change, ratio=0.5)],
        "wbc": [FlWbcNoise(scale=1e-4, seed=5)],
    }


def main():
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    how = {"load_in_4bit": True} if "4bit" in sys.argv else {}
    rank = os.environ.get("RANK", "0")
    refused = {}
    for name in cases(model(**how)):
        made = model(**how)
        submit = SubmitUpdate(folder / name, difference=True)
        callbacks = [*cases(made)[name], submit, Digest(folder / f"{name}.{rank}.sha256")]
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2}
        trainer = Trainer(
            model=made,
            args=arguments(folder / "scratch", **split),
            train_dataset=data(),
            callbacks=callbacks,
        )
        try:
            trainer.train()
        except InputError as error:
            refused[name] = str(error)
        take_down(trainer)
    (folder / f"refused.{rank}.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    main()
