"""What callbacks that look at or change a client's weights have in common."""

from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from fedllm_sec.callbacks.weights import Received, Weights, received_values, weights_of
from fedllm_sec.updates.errors import InputError


class OnWeights(TrainerCallback):  # type: ignore[misc]
    """Knows the weights and what the client received from the beginning of a training to its end.

    Args:
        received: the adapter that the server sent: its folder or file, or its tensors. Default: what the model holds
            when training begins, which after a resume is something else, and refused.
    """

    gradients = False  # whether it changes gradients, which DeepSpeed does not show

    def __init__(self, received: Received | None = None):
        self.received, self.uses = received, 0

    @property
    def who(self) -> str:
        """The callback's name."""
        return type(self).__name__

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the weights."""
        self.release()
        self.uses += 1  # a callback may serve again, in the next round, and is to draw other noise then
        self.weights: Weights = weights_of(model)
        if self.gradients and self.weights.engine:
            raise InputError(
                f"{self.who} changes gradients, and DeepSpeed has used them before a callback is called: "
                "train without DeepSpeed"
            )
        self.start: dict[str, Tensor] = received_values(self.received, self.weights, state.global_step, self.who)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of them."""
        self.end(args, state)
        self.release()
        del self.weights, self.start

    def release(self) -> None:
        """Take off what was put on a model, also by a training that came to no end."""

    def end(self, args: Any, state: Any) -> None:
        """What is done when training has ended."""
