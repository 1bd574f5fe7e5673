"""From updates to gradients: sign, learning rate, local steps, momentum and weight decay are all reckoned with.

SGD is linear in what it is given. With momentum and weight decay or without, K local steps turn the received weights w
into

    kept * w  -  sum over steps t of weight_t * g_t,

where g_t is the gradient of the t-th batch at the weights that the client had then. So every update tells a weighted
mean of the client's gradients exactly, up to the rounding of the weights that it sent. Adam is not linear in its
gradients (its first step hardly tells more than their signs), and no gradient is read from it.

Shapes: those of a model's parameters; everything is float32.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedllm_sec.core import Threat
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.layout import Layout, and_more
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

Tensors = dict[str, Tensor]


class Shares(NamedTuple):
    """What K local steps of SGD make of the received weights and of the K gradients.

    Attributes:
        kept: the factor of the received weights: 1 without weight decay.
        weights: K factors of the gradients, in the units of a learning rate.
    """

    kept: float
    weights: tuple[float, ...]

    @property
    def total(self) -> float:
        """The sum of the gradients' factors: learning rate times steps for plain SGD."""
        return sum(self.weights)


def victim_of(threat: Threat, method: str) -> Victim:
    """What is known of how clients train.

    Raises:
        InputError: if nothing is, or what is makes no sense.
    """
    victim = threat.victim
    if victim is None:
        raise InputError(
            f"{method} is not told how the clients train: give the threat a Victim (learning rate, steps, batch size, "
            "optimizer, and the architecture of a small model)"
        )
    if not (victim.learning_rate > 0 and math.isfinite(victim.learning_rate)):
        raise InputError(f"{method}: a victim's learning_rate is {victim.learning_rate}; it must be above zero")
    for name, least in (("steps", 1), ("batch_size", 1), ("weight_decay", 0), ("momentum", 0)):
        if not least <= getattr(victim, name) < math.inf:
            raise InputError(f"{method}: a victim's {name} is {getattr(victim, name)}; it must be at least {least}")
    return victim


def check_linear(victim: Victim, method: str) -> None:
    """Raise InputError for an optimizer from whose steps no gradient can be read."""
    if victim.optimizer != "sgd":
        raise InputError(
            f"{method} reads gradients from updates, and those of {victim.optimizer} are not linear in them: attack "
            "clients that train with optimizer=sgd, or give it gradients (rows that are minus a gradient, with "
            "learning_rate=1, steps=1, optimizer=sgd)"
        )


def model_of(victim: Victim, layout: Layout, method: str) -> nn.Module:
    """The architecture of the small model, whose parameters are the tensors of an update.

    Raises:
        InputError: if it is not known, or has other parameters.
    """
    if victim.model is None:
        raise InputError(f"{method} runs the clients' small model: give the victim its architecture (Victim.model)")
    if not victim.shape or victim.classes < 2:
        raise InputError(
            f"{method} makes inputs for the model: give the victim their shape and the number of classes, not "
            f"shape={victim.shape} and classes={victim.classes}"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in victim.model.named_parameters()}
    if difference := Layout.of(shapes).difference(layout):
        raise InputError(f"{method}: these updates are not of the victim's model: {difference}; give it theirs")
    return victim.model


def shares(victim: Victim) -> Shares:
    """What SGD's K steps make of the weights and of each gradient, by running its recursion on numbers.

    torch's: d = g + decay w; v = momentum v + d (v = d in the first step); w = w - rate v. Linear in w and all g, so
    the factor of one of them is what comes out where it is one and the others are zero.
    """

    def run(start: float, at: int) -> float:
        w, v = start, 0.0
        for step in range(victim.steps):
            v = victim.momentum * v + (step == at) + victim.weight_decay * w
            w -= victim.learning_rate * v
        return w

    return Shares(run(1.0, -1), tuple(-run(0.0, step) for step in range(victim.steps)))


def gradient(visible: UpdateSet, row: int, received: Tensors, victim: Victim) -> Tensors:
    """The mean of a client's gradients over its local steps, weighted by what each did to the update.

    One step: the gradient at the received weights. Several: an average along the client's way, which is near the
    gradient at the received weights only as long as the learning rate is small.

    Args:
        visible: updates.
        row: whose.
        received: the weights that clients received, of those tensors that are wanted.
        victim: trains with sgd.

    Raises:
        InputError: if its weight decay and learning rate leave no gradient to read.
    """
    part = shares(victim)
    if not (part.total > 0 and math.isfinite(part.total)):
        raise InputError(f"no gradient can be read from steps of learning_rate={victim.learning_rate} with this decay")
    update = tensors(visible, row, received)
    return {
        name: (((part.kept - 1) * received[name].double() - update[name].double()) / part.total).float()
        for name in received
    }


def tensors(updates: UpdateSet, row: int, names: Iterable[str]) -> Tensors:
    """Some tensors of one row, whole and in memory; nothing else of it is read."""
    wanted = set(names)
    part = Layout(tuple((name, shape) for name, shape in updates.layout.shapes if name in wanted))
    whole = {name: torch.empty(shape, dtype=updates.dtype) for name, shape in part.shapes}
    for span, block in updates.rows([row]).blocks(part):
        whole[span.tensor].view(-1)[span.start : span.stop] = block[0].cpu()
    return {name: value.float() for name, value in whole.items()}


def received_weights(threat: Threat, visible: UpdateSet, names: Iterable[str], method: str) -> Tensors:
    """The weights that clients received, of some tensors of the visible rows.

    Raises:
        InputError: if the global model lacks one, or has it in another shape.
    """
    ours, theirs = dict(visible.layout.shapes), dict(threat.reference.layout.shapes)
    wanted = list(names)
    if wrong := [name for name in wanted if theirs.get(name) != ours[name]]:
        raise InputError(
            f"{method}: the global model has no tensor {wrong[0]!r} of shape {list(ours[wrong[0]])}{and_more(wrong)}; "
            "give the one that these clients received"
        )
    return tensors(threat.reference, 0, wanted)


def examples_of(victim: Victim, claimed: float, given: int | None, method: str) -> int:
    """How many different examples a client trained on: what is given, or else what its claim and its steps allow.

    With one step a batch; with more as many as it claims to have (that sets its weight in the server's mean), but at
    least a batch and at most a batch in each step.

    Raises:
        InputError: for more than that many were seen.
    """
    most = victim.batch_size * victim.steps
    if given is not None and given > most:
        raise InputError(
            f"{method}(examples={given}): {victim.steps} steps on {victim.batch_size} examples see {most} at most"
        )
    return given or int(min(max(round(claimed), victim.batch_size), most))


def seen_by(victim: Victim, examples: int) -> int:
    """How many examples all local steps see, counting one anew in each epoch; the last batch of an epoch is short."""
    starts = range(0, examples, victim.batch_size)
    at = (starts[step % len(starts)] for step in range(victim.steps))
    return sum(min(victim.batch_size, examples - start) for start in at)
