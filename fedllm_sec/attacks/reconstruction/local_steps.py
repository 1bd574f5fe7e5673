"""A client's local training as a function of its examples that can be differentiated: what matching gradients needs."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedllm_sec.attacks.reconstruction.gradients import Tensors, model_of, shares
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.layout import and_more
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

CLIP_EPS = 1e-6  # torch adds it to a length
RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class LocalSteps:
    """What a client with given examples would have sent, as a mean gradient (see `gradients.gradient`).

    The model trains as the client's does: batch normalisation by the statistics of the batch. Dropout is left out,
    because the masks that the client drew are not known.

    Attributes:
        model: the architecture, a copy of our own.
        weights: the received parameters, by name.
        buffers: the received buffers.
        victim: how clients train.
        clip: the length to which they clip a gradient; None: they do not.
    """

    model: nn.Module
    weights: Tensors
    buffers: Tensors
    victim: Victim
    clip: float | None = None

    def gradient(self, images: Tensor, targets: Tensor) -> list[Tensor]:
        """The weighted mean of the gradients of the K local steps, in the order of `weights`, with its graph.

        The examples are cut into batches in their order, and each epoch has the same order: that is exact for one
        epoch (whichever order the client drew, since examples have no order here) and for one batch that holds all
        examples; a client that shuffles anew for each epoch departs from it.

        Args:
            images: (n, *shape).
            targets: (n,) int64 classes, or (n, classes) probabilities.
        """
        part, weights = shares(self.victim), {n: value.detach().requires_grad_() for n, value in self.weights.items()}
        mean = [torch.zeros_like(value) for value in weights.values()]
        velocity: list[Tensor] | None = None
        for factor, (inputs, wanted) in zip(part.weights, self.batches(images, targets), strict=True):
            slopes = self.slopes(weights, inputs, wanted)
            mean = [so_far + (factor / part.total) * slope for so_far, slope in zip(mean, slopes, strict=True)]
            if self.victim.steps > 1:
                weights, velocity = self.step(weights, slopes, velocity)
        return mean

    def slopes(self, weights: Tensors, images: Tensor, targets: Tensor) -> list[Tensor]:
        """The gradient of one batch's mean cross entropy, clipped as torch does."""
        logits = functional_call(self.model, {**weights, **self.buffers}, (images,))
        loss = functional.cross_entropy(logits, targets)
        made = torch.autograd.grad(
            loss, list(weights.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        if self.clip is None:
            return list(made)
        length = torch.stack([slope.square().sum() for slope in made]).sum().sqrt()
        factor = (self.clip / (length + CLIP_EPS)).clamp(max=1.0)
        return [factor * slope for slope in made]

    def step(
        self, weights: Tensors, slopes: list[Tensor], velocity: list[Tensor] | None
    ) -> tuple[Tensors, list[Tensor]]:
        """One step of torch's SGD, out of place; the new weights and the new velocity."""
        decayed = [s + self.victim.weight_decay * w for s, w in zip(slopes, weights.values(), strict=True)]
        if velocity is not None:
            decayed = [self.victim.momentum * v + d for v, d in zip(velocity, decayed, strict=True)]
        moved = {
            name: weight - self.victim.learning_rate * change
            for (name, weight), change in zip(weights.items(), decayed, strict=True)
        }
        return moved, decayed

    def batches(self, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of each local step; where examples do not fill the last one of an epoch it is short."""
        size = self.victim.batch_size
        starts = range(0, len(images), size)
        for step in range(self.victim.steps):
            start = starts[step % len(starts)]
            yield images[start : start + size], targets[start : start + size]

    def as_one_step(self) -> "LocalSteps":
        """The same client as if its mean gradient were that of one step on all its examples."""
        whole = self.victim.batch_size * self.victim.steps
        return replace(self, victim=replace(self.victim, learning_rate=1.0, steps=1, batch_size=whole))


def local_steps(visible: UpdateSet, victim: Victim, weights: Tensors, clip: float | None, method: str) -> LocalSteps:
    """Set up the clients' training.

    Raises:
        InputError: if the model's parameters or buffers are others than the updates', or it cannot take such inputs.
    """
    model = copy.deepcopy(model_of(victim, visible.layout, method)).train()
    for module in model.modules():
        if isinstance(module, RANDOM):
            module.eval()
    known = dict(model.named_buffers())
    if strange := sorted(name for name in victim.buffers if name not in known):
        raise InputError(f"{method}: the victim's model has no buffer {strange[0]!r}{and_more(strange)}; leave it out")
    buffers = {name: victim.buffers.get(name, value).detach().clone() for name, value in known.items()}
    made = LocalSteps(model, weights, buffers, victim, clip)
    made_logits(made, method)
    return made


def made_logits(client: LocalSteps, method: str) -> None:
    """Try the model on one batch, before any work.

    Raises:
        InputError: if it fails, or gives something else than a row of logits for each example.
    """
    victim = client.victim
    blank = torch.zeros(victim.batch_size, *victim.shape)
    try:
        with torch.no_grad():
            logits = functional_call(client.model, {**client.weights, **client.buffers}, (blank,))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise InputError(
            f"{method}: the victim's model does not take {victim.batch_size} inputs of numbers of shape "
            f"{victim.shape} ({str(error).splitlines()[0][:120]}); give the shape of one input as the model takes it"
        ) from None
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != (victim.batch_size, victim.classes):
        raise InputError(
            f"{method}: the victim's model makes {found} of {victim.batch_size} inputs, not that many rows of "
            f"classes={victim.classes} logits; say how many classes it tells apart"
        )
