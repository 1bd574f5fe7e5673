"""What is known of how clients trained to those who would learn from an update what it was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Victim:
    """How the clients of a round trained. None of it is a secret: the server has told them, and so everybody knows.

    A gradient is an update like any other: minus the gradient is what one step of SGD at a learning rate of 1 changes.

    Attributes:
        learning_rate: of the local optimizer.
        steps: optimizer steps between what a client received and what it sent.
        batch_size: examples in each of them.
        optimizer: the local one.
        weight_decay: the local one's.
        momentum: of sgd.
        max_grad_norm: the length to which gradients are clipped; None: they are not.
        model: the architecture of a small model; the weights that it holds are not looked at.
        buffers: of the small model, as clients received them; they are no part of an update.
        shape: of one of its inputs, as the model takes it.
        classes: how many it tells apart.
        bounds: the least and the largest value of an input, each as `shape` or one that broadcasts to it: black and
            white, as the model takes them; None: unknown.
        base: the folder of the base model that an adapter is for.
        adapter: the server's adapter_config.json, which says how factors are scaled; None: there is none.
    """

    learning_rate: float = 1.0
    steps: int = 1
    batch_size: int = 1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    weight_decay: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = None
    model: nn.Module | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    classes: int = 0
    bounds: tuple[Tensor, Tensor] | None = None
    base: Path | None = None
    adapter: Mapping[str, Any] | None = None
