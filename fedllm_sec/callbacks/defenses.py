"""Client-side defenses: what an honest client does so that it neither harms nor tells too much."""

import logging
import math
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from fedllm_sec.attacks.local import distance
from fedllm_sec.callbacks.base import OnWeights
from fedllm_sec.callbacks.weights import Received, require_finite, weights_of
from fedllm_sec.defenses.client_side import FlWbc
from fedllm_sec.randomness import derived_seed
from fedllm_sec.training.base_model import freeze_a, is_a
from fedllm_sec.updates.errors import InputError

logger = logging.getLogger(__name__)

When = Literal["end", "step"]


def positive(value: float, what: str) -> float:
    """The value.

    Raises:
        InputError: if it is not a positive number.
    """
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{what}={value}: give a positive number")
    return value


class ClipUpdate(OnWeights):
    """Keep the update, trained minus received weights, within a ball: |update| <= norm, over all tensors together.

    With `when="step"` the weights are projected after every optimizer step as well. The optimizer is not told: Adam's
    moments push outwards again, so that this is projected Adam and no projected gradient descent in its sense.

    Args:
        norm: of the update, in the units of the weights.
        when: at the end of training alone, or after every step too.
        received: see `OnWeights`.

    Raises:
        InputError: for a norm that is not positive.

    Example:
        >>> from fedllm_sec.callbacks import ClipUpdate
        >>> clip = ClipUpdate(norm=0.01)
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clip])
        >>> result = trainer.train()
        >>> clip.length > clip.norm  # what it was before it was clipped, at the end
        True
    """

    def __init__(self, norm: float, when: When = "end", received: Received | None = None):
        super().__init__(received)
        self.norm, self.when, self.length = positive(norm, "ClipUpdate: norm"), when, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Say if the ball cannot be kept to the last digit."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        kinds = {self.weights.parameters[name].dtype for name in self.weights.trained}
        if not self.weights.engine and (short := [kind for kind in kinds if kind.itemsize < torch.float32.itemsize]):
            logger.warning(
                "%s: weights in %s round what is projected: give a norm a little shorter", self.who, short[0]
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project, if that is to be done at every step."""
        if self.when == "step":
            self.project()

    def end(self, args: Any, state: Any) -> None:
        """Project what will be sent."""
        self.project()

    def project(self) -> None:
        """Go to the nearest point of the ball."""
        now, names = self.weights.read(), self.weights.trained
        require_finite(now, self.who)
        self.length = distance({name: now[name] for name in names}, self.start)
        if self.length > self.norm:
            share = self.norm / self.length
            self.weights.write({name: torch.lerp(self.start[name], now[name], share) for name in names})


class AddNoise(OnWeights):
    """Add Gaussian noise to the update when training ends: weak DP (Sun et al. 2019, arXiv:1911.07963).

    No examples are clipped one by one, so that this is no DP-SGD and gives no guarantee by itself: give `ClipUpdate`
    before it, whose norm bounds what one client can change. docs/leakage.md has what noise hides.

    All processes draw the same.

    Args:
        std: deviation of the noise, in the units of the weights.
        seed: of the noise: the client's own secret (`secrets.randbits`), for whoever knows it can take the noise out.
            The same object draws other noise in each training.
        received: see `OnWeights`.

    Raises:
        InputError: for a deviation that is not positive.

    Example:
        >>> from fedllm_sec.callbacks import AddNoise, ClipUpdate
        >>> private = [ClipUpdate(norm=0.5), AddNoise(std=1e-3, seed=20)]
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=private)
        >>> result = trainer.train()
    """

    def __init__(self, std: float, seed: int, received: Received | None = None):
        super().__init__(received)
        self.std, self.seed = positive(std, "AddNoise: std"), seed

    def end(self, args: Any, state: Any) -> None:
        """Draw for each tensor from a generator of its own, and in each training other noise."""
        noisy = {}
        now = self.weights.read()
        for name in self.weights.trained:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "AddNoise", name, self.uses))
            noisy[name] = now[name] + self.std * torch.randn(now[name].shape, generator=generator)
        self.weights.write(noisy)


class FreezeA(TrainerCallback):  # type: ignore[misc]
    """Train LoRA's B only, and leave A as it was received: FFA-LoRA (Sun et al. 2024, arXiv:2403.12313).

    The average of products is then the product of averages, and A tells nothing of a batch (docs/leakage.md). Give it
    to `Trainer`'s constructor, so that no optimizer is made for A.

    Example:
        >>> from fedllm_sec.callbacks import FreezeA
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[FreezeA()])
        >>> result = trainer.train()
        >>> [name for name, value in model.named_parameters() if value.requires_grad and ".lora_A." in name]
        []
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Freeze before an optimizer is made.

        Raises:
            InputError: if there is no A, or nothing would be left to train.
        """
        parameters = weights_of(model).parameters
        if not any(is_a(name) for name in parameters):
            raise InputError("FreezeA: the model has no LoRA adapter; put one on it before Trainer gets it")
        freeze_a(parameters)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raise InputError if it came too late."""
        if any(is_a(name) for name in weights_of(model).trained):
            raise InputError(
                "FreezeA: give it to Trainer's constructor (callbacks=[FreezeA()]) with a model, not to add_callback, "
                "nor with model_init"
            )


class FlWbcNoise(OnWeights):
    """Perturb weights where the loss is flat and an old attack would stay: FL-WBC (Sun et al. 2021, arXiv:2110.13864).

    After each optimizer step but the first, Laplace noise Y is added, times the learning rate, where |g_t - g_{t-1}| <=
    |Y|: where gradients hardly change. Refused under DeepSpeed, which shows no gradients. With `max_grad_norm` the
    gradients are the clipped ones.

    Args:
        scale: of the noise, in the units of a gradient; its deviation is sqrt(2) times that. Choose it against how much
            a gradient's coordinate changes from step to step.
        seed: of the noise: the client's own and another one in each round.
        received: see `OnWeights`.

    Raises:
        InputError: for a scale that is not positive; under DeepSpeed.

    Example:
        >>> from fedllm_sec.callbacks import FlWbcNoise
        >>> wbc = FlWbcNoise(scale=1e-4, seed=20)
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[wbc])
        >>> result = trainer.train()
    """

    gradients = True

    def __init__(self, scale: float, seed: int, received: Received | None = None):
        super().__init__(received)
        self.defense, self.seed = FlWbc(positive(scale, "FlWbcNoise: scale")), seed
        self.before: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """No step has been done, and no gradient is known."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.before = {}

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Gradients and the learning rate are still those of this step."""
        rate = float(optimizer.param_groups[0]["lr"])
        for name in self.weights.trained:
            parameter = self.weights.parameters[name]
            if parameter.grad is None:
                continue
            gradient = parameter.grad.detach().clone()
            if name in self.before and rate > 0:
                generator = torch.Generator().manual_seed(
                    derived_seed(self.seed, self.uses, state.global_step, "FlWbcNoise", name)
                )
                change, previous = -rate * gradient, -rate * self.before[name]
                parameter.copy_(self.defense.perturb(parameter, change, previous, rate, generator))
            self.before[name] = gradient
