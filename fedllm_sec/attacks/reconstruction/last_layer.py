"""The layer of the logits: which it is, and what its gradient tells of the classes.

With softmax and cross entropy the gradient of a head's weight is the mean over examples of g_i z_iᵀ, and that of its
bias the mean of g_i. z_i is what goes into the head, and g_i = p_i - e_{y_i} what the model gives each class, less one
for the true one. So g_i has exactly one negative entry, its class, and its entries add up to zero.

Shapes: C classes, h features, n examples.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.reconstruction.gradients import gradient, received_weights, shares, tensors
from fedllm_sec.core import Threat
from fedllm_sec.registry import did_you_mean
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.layout import Layout
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

HEADS = ("classifier.weight", "score.weight", "out_proj.weight", "head.weight", "fc.weight")  # of known architectures
FACTOR = "lora_"  # in the names of matrices that PEFT adds


@dataclass(frozen=True)
class Head:
    """The last layer of one client, in float64.

    Attributes:
        name: of its weight.
        weight: (C, h) gradient.
        bias: (C,) gradient; None: it has none.
        received: (C, h) weight as the client received it.
        offset: (C,) bias as the client received it.
        scale: what the update was divided by to make it a gradient: learning rate times steps.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    received: Tensor
    offset: Tensor | None
    scale: float

    @property
    def whole(self) -> Tensor:
        """(C, h + 1), the bias as one feature more that is always 1; (C, h) without one."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], dim=1)

    @property
    def imbalance(self) -> float:
        """How far the classes' gradients are from adding up to zero: 0 under softmax, about 1 for noise."""
        length = float(self.whole.norm())
        return float(self.whole.sum(dim=0).norm()) / length if length else 1.0


def head_name(layout: Layout, victim: Victim, layer: str | None, method: str) -> str:
    """The name of the last layer's weight among the tensors of an update.

    That is `layer` if one is given; the model's last linear layer with a row for each class, if there is a model; a
    name by which known architectures call it; else the last matrix with as many rows as its bias.

    Raises:
        InputError: if there is none, or `layer` names no matrix.
    """
    matrices = [name for name, shape in layout.shapes if len(shape) == 2 and FACTOR not in name]
    matrices = sorted((n for n in matrices if not n.endswith(".bias")), key=natural)
    if layer is not None:
        named = [name for name in matrices if layer in (name, name.removesuffix(".weight"))]
        if not named:
            raise InputError(f"{method}(layer={layer!r}): no matrix of the update has this name"
                             f"{did_you_mean(layer, dict.fromkeys(matrices))}")  # fmt: skip
        return named[0]
    shapes = dict(layout.shapes)
    if victim.classes:
        matrices = [name for name in matrices if shapes[name][0] == victim.classes]
    if victim.model is not None:
        parts = victim.model.named_modules()
        linear = [f"{name}.weight".lstrip(".") for name, part in parts if isinstance(part, nn.Linear)]
        ours = [name for name in linear if name in matrices]
    else:
        known = [name for name in matrices if name.endswith(HEADS)]
        ours = known or [name for name in matrices if shapes.get(bias_name(name)) == shapes[name][:1]]
    if not ours:
        of_classes = f" with classes={victim.classes} rows" if victim.classes else ""
        raise InputError(
            f"{method}: the update has no last layer{of_classes} that is told by its name or its bias; name its "
            f"weight with layer=... (matrices: {', '.join(matrices[-5:]) or 'none'})"
        )
    return ours[-1]


def natural(name: str) -> list[tuple[int, str]]:
    """A sorting key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def bias_name(weight: str) -> str:
    """The bias that goes with a weight."""
    return weight.removesuffix("weight") + "bias"


def head_of(visible: UpdateSet, row: int, threat: Threat, victim: Victim, name: str, method: str) -> Head:
    """Read one client's last layer; of the other tensors nothing is read.

    Under Adam it is minus the update (without decoupled weight decay), of which only signs mean something.
    """
    shapes = dict(visible.layout.shapes)
    names = [name, *([bias_name(name)] if shapes.get(bias_name(name)) == shapes[name][:1] else [])]
    received = received_weights(threat, visible, names, method)
    if victim.optimizer == "sgd":
        found, scale = gradient(visible, row, received, victim), shares(victim).total
    else:
        kept = (1 - victim.learning_rate * victim.weight_decay) ** victim.steps if victim.optimizer == "adamw" else 1.0
        update, scale = tensors(visible, row, names), victim.learning_rate * victim.steps
        found = {one: ((kept - 1) * received[one] - update[one]) / scale for one in names}
    bias, offset = (some[names[-1]].double() if len(names) > 1 else None for some in (found, received))
    return Head(name, found[name].double(), bias, received[name].double(), offset, scale)


def label_of_one(head: Head) -> int:
    """The class of a single example (Zhao et al. 2020, arXiv:2001.02610): the one whose gradient is negative.

    Without a bias the row of that class points against all others, and is as long as they are together: it is the
    longest. Of two classes both are as long; then the one is taken whose row sums to less, which is right for features
    that are mostly positive, such as those behind a ReLU or a sigmoid.
    """
    if head.bias is not None:
        return int(head.bias.argmin())
    if len(head.weight) > 2:
        return int(head.weight.norm(dim=1).argmax())
    return int(head.weight.sum(dim=1).argmin())
