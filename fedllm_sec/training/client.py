"""One client's turn: a stock `Trainer` on the shared base, from the received adapter to its own."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fedllm_sec.settings import TrainingSettings
from fedllm_sec.tasks.encoding import Collator
from fedllm_sec.training import sharded
from fedllm_sec.training.base_model import BaseModel
from fedllm_sec.training.schedule import factor


class Turn(NamedTuple):
    """What a client's training gave.

    Attributes:
        adapter: the trained adapter, float32, complete.
        loss: mean training loss over the steps, nats per token.
        steps: optimizer steps done.
        seconds: the time of `Trainer.train` alone.
    """

    adapter: dict[str, Tensor]
    loss: float
    steps: int
    seconds: float


class ScheduledTrainer(Trainer):
    """A `Trainer` whose learning rate follows a schedule over the whole run, of which this is one round."""

    def __init__(self, settings: TrainingSettings, rounds_done: int, rounds: int, **options: Any):
        self.plan = (settings, rounds_done, rounds)
        super().__init__(**options)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Place this round's steps within the run."""
        settings, done, rounds = self.plan
        self.lr_scheduler: Any
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: factor(settings, (done + step / num_training_steps) / rounds),
            )
        return self.lr_scheduler


def train_client(
    base: BaseModel,
    rows: Dataset[dict[str, Any]],
    received: Mapping[str, Tensor],
    settings: TrainingSettings,
    *,
    seed: int,
    rounds_done: int,
    rounds: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> Turn:
    """Train one client from the adapter that it received; the optimizer starts afresh.

    Args:
        base: the shared model; its adapter is overwritten.
        rows: the client's texts, encoded.
        received: the global adapter.
        settings: how to train.
        seed: of batches and dropout.
        rounds_done: rounds before this one, for the learning rate's schedule.
        rounds: rounds in all.
        callbacks: told of the progress.
    """
    base.load_adapter(received)
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory(prefix="fedllm_sec_") as scratch:
        trainer = ScheduledTrainer(
            settings,
            rounds_done,
            rounds,
            model=base.model,
            args=training_arguments(base, settings, scratch, seed),
            train_dataset=rows,
            data_collator=Collator(base.tokenizer.pad_token_id),
            callbacks=list(callbacks),
        )
        if base.classifies:  # its loss is a mean, which `Trainer` (transformers 5.23) takes for a part of a sum
            trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)  # it prints a dictionary a client
        began = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - began
        adapter = base.adapter()
        sharded.take_down(trainer)
    return Turn(adapter, float(result.training_loss), int(result.global_step), seconds)


def training_arguments(base: BaseModel, settings: TrainingSettings, scratch: str, seed: int) -> TrainingArguments:
    """Our settings in `Trainer`'s words; nothing is logged, saved or reported by it.

    Where the base is in bfloat16 there is no autocast: adapters and their gradients stay in float32.
    """
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=settings.batch_size or 1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or 0.0,  # 0: not clipped
        optim="sgd" if settings.optimizer == "sgd" else "adamw_torch",
        optim_args=f"momentum={settings.momentum}" if settings.optimizer == "sgd" else None,
        seed=seed % 2**32,
        data_seed=seed % 2**32,
        use_cpu=not torch.cuda.is_available(),
        bf16=base.launch is not None and base.launch.bf16 and sharded.zero3(),  # there it is what keeps the base so
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
    )
