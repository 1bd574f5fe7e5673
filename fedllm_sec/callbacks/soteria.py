"""Soteria: hide from the gradient of one layer what tells most about the inputs."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fedllm_sec.callbacks.base import OnWeights
from fedllm_sec.callbacks.weights import Received, active_adapter
from fedllm_sec.defenses.client_side import Soteria, masked_gradient
from fedllm_sec.updates.errors import InputError

HEAD = "classifier"


class HideRepresentation(OnWeights):
    """Take out of a head's gradient the entries of its input that tell most: Soteria.

    Sun et al. 2021, arXiv:2012.06043. For models that classify, where a trained linear layer reads one vector of each
    example. In every batch the entries whose removal moves the inputs' embeddings most are found, and their columns of
    that layer's weight gradient are 0. It hides the vector from this gradient alone: who reads the gradients of the
    layers below is not stopped (Balunovic et al. 2022, arXiv:2111.04706), and an optimizer's moments and weight decay
    still move those columns.

    A batch costs one backward pass more for each entry of the vector: hundreds of times as much. Refused under
    DeepSpeed and with gradient checkpointing. Of several processes each hides what is best hidden of its own batch.

    Args:
        percentile: of the entries that are removed, 0 to 100.
        layer: the end of the layer's name; default: the head.
        chunk: entries differentiated at once: more is faster, and takes that many times the memory.
        received: see `OnWeights`.

    Raises:
        InputError: when training begins or with the first batch, if there is no such layer or it reads more than a
            vector of each example.

    Example:
        >>> from fedllm_sec.callbacks import HideRepresentation
        >>> hide = HideRepresentation(percentile=20)
        >>> trainer = Trainer(model=classifier, args=arguments, train_dataset=labelled, callbacks=[hide])
        >>> result = trainer.train()
        >>> hide.removed  # of the 32 entries, in the last batch
        7
    """

    gradients = True

    def __init__(self, percentile: float, layer: str | None = None, chunk: int = 1, received: Received | None = None):
        super().__init__(received)
        self.hooks: list[Any] = []
        if not 0 <= percentile <= 100:
            raise InputError(f"HideRepresentation: percentile={percentile}: give one from 0 to 100")
        self.defense, self.layer, self.chunk, self.removed = Soteria(percentile), layer or HEAD, chunk, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watch the embeddings and the layer, and mask its gradient before it is added to that of other batches."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if args.gradient_checkpointing or getattr(model, "is_gradient_checkpointing", False):
            raise InputError("HideRepresentation: gradient checkpointing does not go with it: turn it off")
        layer = self.find(model)
        self.embedded: Tensor | None = None
        self.keep: Tensor | None = None
        this = weakref.proxy(self)  # hooks that a broken training leaves behind are not to keep it alive
        self.hooks = [
            model.get_input_embeddings().register_forward_hook(lambda *told: this.begin(*told)),
            layer.register_forward_pre_hook(lambda *told: this.choose(*told)),
            layer.weight.register_hook(lambda gradient: this.mask(gradient)),  # type: ignore[no-untyped-call]
        ]

    def find(self, model: Any) -> nn.Linear:
        """The layer."""
        adapter = active_adapter(model)
        for name, module in model.named_modules():
            plain = name.replace(f".modules_to_save.{adapter}", "")
            trained = isinstance(module, nn.Linear) and module.weight.requires_grad
            if trained and f".{plain}".endswith(f".{self.layer}"):
                assert isinstance(module, nn.Linear)
                return module
        raise InputError(
            f"HideRepresentation: no trained linear layer is called {self.layer}: it is for a model that "
            "classifies, whose head is trained; give layer=NAME"
        )

    def begin(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """Keep the embeddings of a batch, with a graph from there on even where nothing below is trained."""
        if not (module.training and torch.is_grad_enabled()):
            return None
        self.embedded = output if output.requires_grad else output.requires_grad_()
        return self.embedded

    def choose(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """What of the layer's input is to be hidden in this batch."""
        if not (module.training and torch.is_grad_enabled()) or self.embedded is None:
            return
        if inputs[0].ndim != 2:
            raise InputError(
                f"HideRepresentation: the layer reads {tuple(inputs[0].shape)}, not one vector of each example; give "
                "the name of a layer that does"
            )
        self.keep = self.defense.keep(inputs[0], self.embedded, self.chunk)
        self.removed = int((~self.keep).sum())

    def mask(self, gradient: Tensor) -> Tensor:
        """Of one batch."""
        return gradient if self.keep is None else masked_gradient(gradient, self.keep)

    def release(self) -> None:
        """See `OnWeights`."""
        for hook in self.hooks:
            hook.remove()
        self.embedded = self.keep = None
        self.hooks.clear()

    def __del__(self) -> None:
        self.release()
