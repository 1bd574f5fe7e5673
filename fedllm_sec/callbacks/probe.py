"""Measure, while a client trains, what a curious server would read out of its update."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fedllm_sec.callbacks.base import OnWeights
from fedllm_sec.callbacks.weights import Received
from fedllm_sec.training.base_model import adapter_config, files_of
from fedllm_sec.training.seen import texts_seen
from fedllm_sec.updates.errors import InputError
from fedllm_sec.victim import Victim

logger = logging.getLogger(__name__)

Log = Callable[[dict[str, float]], None]
BUDGET = "256MiB"


class LeakageProbe(OnWeights):
    """Reconstruct tokens from the update as it is now, and log how many of those that were trained on are found.

    The attack is `lora_tokens` (docs/reconstruction.md): it has the received and the present adapter and the base, and
    is told the learning rate, the optimizer and the number of steps, but nothing of the data; what it finds is then
    compared with what really went through the model. It looks after every so many steps and when training ends, which
    is when the update is sent. What is logged:

    - `leakage/token_recall`: the share of the distinct tokens seen since training began that are found;
    - `leakage/token_precision`: the share of those found that were seen;
    - `leakage/tokens`: how many were seen;
    - `leakage/certificate`: how sure the attack is, without the truth;
    - `leakage/seconds`: what the look took.

    Give it before callbacks that change the update at the end (`AddNoise`, `ClipUpdate`) to see what they will hide,
    and after them to see what they have hidden. Of several processes the main one attacks, and the others wait.

    Args:
        every: steps between looks; 0: at the end alone. A look at a model of 22 M weights takes seconds to a minute.
        log: takes the numbers, for example `trainer.log` (then add the callback with `trainer.add_callback`). Default:
            they go into `trainer.state.log_history`. They are in `history` too.
        base: the folder of the base model's files; default: from where the model was loaded.
        memory: for the attack's blocks.
        received: see `OnWeights`.

    Raises:
        InputError: when training begins, if the base's files are not found, its architecture is not known, or nothing
            is trained that reads tokens. A look that fails later is logged and left out.

    Example:
        >>> from fedllm_sec.callbacks import LeakageProbe
        >>> probe = LeakageProbe(every=2, base=base)
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[probe])
        >>> result = trainer.train()
        >>> [look["step"] for look in probe.history]
        [2.0, 4.0]
        >>> 0 <= probe.history[-1]["leakage/token_recall"] <= 1
        True
    """

    def __init__(
        self,
        every: int = 0,
        log: Log | None = None,
        base: Path | str | None = None,
        memory: str = BUDGET,
        received: Received | None = None,
    ):
        super().__init__(received)
        self.watch = ExitStack()
        if every < 0:
            raise InputError(f"LeakageProbe: every={every}: give a number of steps, or 0 to look at the end alone")
        self.every, self.log, self.base, self.memory = every, log, base, memory
        self.history: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the base, and watch what goes through the model."""
        from fedllm_sec.attacks.reconstruction.dictionary import Checkpoint
        from fedllm_sec.attacks.reconstruction.families import family_of

        super().on_train_begin(args, state, control, model=model, **kwargs)
        folder = Path(self.base) if self.base else loaded_from(model)
        family_of(Checkpoint(folder).config, folder)  # raises for what it does not know
        self.files, self.model, self.history = folder, model, []
        self.rates: list[float] = []
        # an update of nothing: raises now, in all processes, if nothing that is trained tells of tokens
        leakage(self.start, self.start, self.victim(args, 1), [], causal=True, memory=self.memory)
        self.watch = ExitStack()
        self.texts = self.watch.enter_context(texts_seen(model))

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """The learning rate of this step."""
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, if it is time; training ends with a look anyway."""
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.look(args, state)

    def end(self, args: Any, state: Any) -> None:
        """The last look, at what will be sent."""
        self.look(args, state)
        del self.model

    def release(self) -> None:
        """See `OnWeights`."""
        self.watch.close()
        self.texts = []

    def __del__(self) -> None:
        self.watch.close()

    def look(self, args: Any, state: Any) -> None:
        """All processes read and tell what they saw; the main one attacks."""
        now, texts = self.weights.read(), gather_object(self.texts)
        if not state.is_world_process_zero:
            return
        bare = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        victim = self.victim(args, len(texts))
        try:
            told = leakage(now, self.start, victim, texts, bare.can_generate(), self.memory)
        except InputError as error:  # what was trained is worth more than to know what it reveals
            logger.warning("LeakageProbe: step %d cannot be looked at: %s", state.global_step, error)
            return
        found = {"step": float(state.global_step), **told}
        self.history.append(found)
        if self.log:
            self.log(told)
        else:
            state.log_history.append({**found, "step": state.global_step})

    def victim(self, args: Any, examples: int) -> Victim:
        """How this client has trained until now, on so many examples."""
        steps = max(len(self.rates), 1)
        return Victim(
            learning_rate=math.fsum(self.rates) / steps or args.learning_rate,
            steps=steps,
            batch_size=max(examples // steps, 1),
            optimizer="sgd" if str(args.optim).rpartition(".")[2].lower() == "sgd" else "adamw",
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm or None,
            base=self.files,
            adapter=adapter_config(self.model) if hasattr(self.model, "peft_config") else None,
        )


def leakage(
    now: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    victim: Victim,
    texts: list[list[int]],
    causal: bool,
    memory: str = BUDGET,
) -> dict[str, float]:
    """What the update from `received` to `now` reveals of `texts`, as `LeakageProbe` logs it."""
    from fedllm_sec.attacks.reconstruction.judge import judge_text, visible_prefix
    from fedllm_sec.attacks.reconstruction.lora_tokens import lora_tokens
    from fedllm_sec.core import Round, Threat
    from fedllm_sec.updates import stack_updates
    from fedllm_sec.updates.device import Budget

    truth = list(dict.fromkeys(visible_prefix(text, causal) for text in texts))
    update = {name: now[name] - received[name] for name in now}
    budget = Budget.of(memory, "cpu")
    reference, row = (replace(stack_updates([state], [1.0]), budget=budget) for state in (received, update))
    threat = Threat(Round(), (), (0,), reference, "all", 1, victim=victim)
    attack = lora_tokens().reconstruct_data
    assert attack is not None
    with torch.random.fork_rng(devices=[]):
        (found,) = attack(row, threat)
    measured = judge_text(found, truth)
    return {
        "leakage/token_recall": measured["token_recall"],
        "leakage/token_precision": measured["token_precision"],
        "leakage/tokens": float(len({token for text in truth for token in text})),
        "leakage/certificate": found.certificate,
        "leakage/seconds": found.seconds,
    }


def loaded_from(model: Any) -> Path:
    """Where the files are that a model was loaded from.

    Raises:
        InputError: if they are nowhere.
    """
    if not str(model.config.name_or_path):
        raise InputError("LeakageProbe: the model was not loaded from files; give base=FOLDER, where its files are")
    return files_of(model)
