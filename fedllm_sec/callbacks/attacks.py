"""What a malicious client does while it trains, to measure how a federation bears it; its data: `callbacks.data`."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm_sec.callbacks.base import OnWeights
from fedllm_sec.callbacks.defenses import ClipUpdate, positive
from fedllm_sec.callbacks.weights import Received
from fedllm_sec.randomness import derived_seed
from fedllm_sec.updates.errors import InputError


class ProjectUpdate(ClipUpdate):
    """Stay near what was received while training on poisoned data: PGD (Wang et al. 2020, arXiv:2007.05084, section 4).

    The same as `ClipUpdate` at every step: what passes a server's bound on norms, as an attacker sees it.

    Args:
        epsilon: the radius of the ball, over all tensors together.
        received: see `OnWeights`.

    Example:
        >>> from fedllm_sec.callbacks import ProjectUpdate
        >>> near = ProjectUpdate(epsilon=0.05)
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[near])
        >>> result = trainer.train()
    """

    def __init__(self, epsilon: float, received: Received | None = None):
        super().__init__(positive(epsilon, "ProjectUpdate: epsilon"), "step", received)


class ReplaceModel(OnWeights):
    """Send received + gamma (trained - received): model replacement (Bagdasaryan et al. 2020, arXiv:1807.00459, eq. 3).

    With gamma the number of clients over that of malicious ones the average of all is what was trained here, if honest
    clients change nothing. Factors of an adapter are scaled as factors; in the product B A more than gamma comes of it.

    Args:
        gamma: the factor.
        received: see `OnWeights`.

    Example:
        >>> from fedllm_sec.callbacks import ReplaceModel
        >>> boost = ReplaceModel(gamma=10)
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[boost])
        >>> result = trainer.train()
    """

    def __init__(self, gamma: float, received: Received | None = None):
        super().__init__(received)
        self.gamma = positive(gamma, "ReplaceModel: gamma")

    def end(self, args: Any, state: Any) -> None:
        """Scale the update."""
        now, names = self.weights.read(), self.weights.trained
        self.weights.write({name: torch.lerp(self.start[name], now[name], self.gamma) for name in names})


class MaskGradient(OnWeights):
    """Train only coordinates that honest clients hardly move: Neurotoxin (Zhang et al. 2022, arXiv:2206.10341).

    The gradient is zero on all but the `ratio` of coordinates that the last round changed least. Refused under
    DeepSpeed, which shows no gradients. An optimizer's weight decay still acts on all.

    Args:
        last_change: what the last round changed: the global adapter after it, minus the one before, by tensor.
        ratio: of coordinates, over all tensors together.
        received: see `OnWeights`.

    Raises:
        InputError: for a ratio that is not above 0 and at most 1; under DeepSpeed; for tensors that do not fit.

    Example:
        >>> from fedllm_sec.callbacks import MaskGradient
        >>> mask = MaskGradient(last_change, ratio=0.95)
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[mask])
        >>> result = trainer.train()
    """

    gradients = True

    def __init__(self, last_change: Mapping[str, Tensor], ratio: float = 0.95, received: Received | None = None):
        super().__init__(received)
        if not 0 < ratio <= 1:
            raise InputError(f"MaskGradient: ratio={ratio}: give a share above 0, up to 1")
        self.last_change, self.ratio = last_change, ratio

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the coordinates."""
        from fedllm_sec.attacks.neurotoxin import smallest
        from fedllm_sec.updates import stack_updates

        super().on_train_begin(args, state, control, model=model, **kwargs)
        lacking = sorted(set(self.weights.trained) - self.last_change.keys())
        if lacking:
            raise InputError(f"MaskGradient: last_change has no tensor {lacking[0]!r}")
        for name in self.weights.trained:
            expected, found = self.start[name].shape, self.last_change[name].shape
            if found != expected:
                raise InputError(
                    f"MaskGradient: last_change has tensor {name!r} of shape {list(found)}, expected {list(expected)}"
                )
        change = {name: self.last_change[name] for name in self.weights.trained}
        self.mask = smallest(stack_updates([change], [1.0]), self.ratio)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are there, clipped."""
        for name in self.weights.trained:
            parameter = self.weights.parameters[name]
            if parameter.grad is not None:
                parameter.grad.mul_(self.mask[name].to(parameter.device))


class NoTraining(OnWeights):
    """Do not train, and send what was received as if one had: a free rider (Fraboni et al. 2021, arXiv:2006.11901).

    Training ends after one step, whose effect is taken back; `SubmitUpdate` writes
    that it was one.

    Args:
        mode: `plain`: exactly what was received; `disguised`: with noise of a deviation.
        std: of the noise of `disguised`, in the units of the weights.
        seed: of the noise.
        received: see `OnWeights`.

    Raises:
        InputError: for `disguised` without a deviation, and for `plain` with one.

    Example:
        >>> from fedllm_sec.callbacks import NoTraining
        >>> lazy = NoTraining(mode="disguised", std=1e-3, seed=20)
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[lazy])
        >>> result = trainer.train()
    """

    def __init__(
        self,
        mode: Literal["plain", "disguised"] = "plain",
        std: float | None = None,
        seed: int = 0,
        received: Received | None = None,
    ):
        super().__init__(received)
        if (mode == "disguised") != (std is not None):
            raise InputError(
                f"NoTraining(mode={mode!r}, std={std}): only disguised has noise, and it needs its deviation"
            )
        self.std, self.seed = 0.0 if std is None else positive(std, "NoTraining: std"), seed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Enough."""
        control.should_training_stop = True
        return control

    def end(self, args: Any, state: Any) -> None:
        """Send what was received, with noise if there is any."""
        values = dict(self.start)
        for name in self.weights.trained if self.std else ():
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "NoTraining", name, self.uses))
            values[name] = values[name] + self.std * torch.randn(values[name].shape, generator=generator)
        self.weights.write(values)
