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
    AuditOnSave,
    ClipUpdate,
    FlWbcNoise,
    FreezeA,
    HideRepresentation,
    LeakageProbe,
    MaskGradient,
    NoTraining,
    ProjectUpdate,
    ReplaceModel,
    SubmitUpdate,
)
from fedllm_sec.callbacks.weights import weights_of
from fedllm_sec.training.sharded import take_down
from tests.callbacks.clients import arguments, classifier, data, labelled, model

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


def cases(made, base):
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
        "hide": [HideRepresentation(percentile=30)],
        "probe": [LeakageProbe(base=base)],
        "audit": [AuditOnSave()],
    }


def main():
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    how = {"load_in_4bit": True} if "4bit" in sys.argv else {}
    rank = os.environ.get("RANK", "0")
    refused = {}
    base = folder / f"base.{rank}"
    model().get_base_model().save_pretrained(base)
    for name in cases(model(**how), base):
        made, rows = (classifier(), labelled()) if name == "hide" else (model(**how), data())
        submit = SubmitUpdate(folder / name, difference=True)
        chosen = cases(made, base)[name]
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2}
        split |= {"save_strategy": "steps", "save_steps": 2} if name == "audit" else {}
        trainer = Trainer(
            model=made,
            args=arguments(folder / "scratch", **split),
            train_dataset=rows,
            callbacks=[*chosen, submit, Digest(folder / f"{name}.{rank}.sha256")],
        )
        try:
            trainer.train()
        except InputError as error:
            refused[name] = str(error)
        looks = {"probe": "history", "audit": "findings"}
        if name in looks:
            (folder / f"{name}.{rank}.json").write_text(json.dumps(getattr(chosen[0], looks[name])))
        take_down(trainer)
    (folder / f"refused.{rank}.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    main()
