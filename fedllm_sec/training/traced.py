"""Work that is done again and again on tensors of one shape: its operations are recorded once, and replayed.

A small model's step is a hundred microseconds of arithmetic and a thousand of bookkeeping by autograd, `vmap` and
module calls. A recording (torch's `make_fx`, on which `torch.compile` and `torch.export` stand) has the operations
only, so that a replay does the same arithmetic in the same order.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

OFTEN = 100  # calls after which a shape is recorded: recording takes as long as they do
KEPT = 200  # recordings at most


class Replayed:
    """A function of tensors and mappings to tensors, replayed for shapes that come often.

    Args:
        function: its path may depend on shapes, never on values; what it changes in place is changed by a replay too.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.calls: Counter[Hashable] = Counter()
        self.recordings: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, shapes: Hashable, *args: Any) -> Any:
        """Call the function; `shapes` tells apart all that decides about its path."""
        if shapes not in self.recordings:
            self.calls[shapes] += 1
            if self.calls[shapes] <= OFTEN or len(self.recordings) >= KEPT:
                return self.function(*args)
            copies = [copy(arg) for arg in args]  # recording does the work, which changes what it is given
            recording = make_fx(lambda *given: self.function(*given))(*copies)
            for node in recording.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
                node.replace_all_uses_with(node.args[0])
                recording.graph.erase_node(node)
            recording.recompile()
            self.recordings[shapes] = recording.forward
        return self.recordings[shapes](*args)


def copy(arg: Any) -> Any:
    """A copy of a tensor, or of a mapping to tensors."""
    return arg.clone() if isinstance(arg, Tensor) else {name: value.clone() for name, value in arg.items()}


class StackedLinear(torch.autograd.Function):
    """The linear layers of k clients: (k, b, i) inputs, (k, o, i) weights, (k, o) biases -> (k, b, o)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One batched product."""
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradients; the weights' lies in memory as the weights do."""
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        before = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        return before, torch.bmm(gradient.mT, x), gradient.sum(dim=1)


class Linear(torch.autograd.Function):
    """`functional.linear` of (b, i) inputs, which knows what it is under `vmap` over clients.

    As torch does it, stacked layers are a dozen operations, and the gradients of their weights lie across the weights.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Of one client."""
        return functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: outside of `vmap` it is not called."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, int]:
        """Of all clients."""
        given = zip((x, weight, bias), in_dims, strict=True)
        stacked = (by_client(value, dim, info.batch_size) for value, dim in given)
        return StackedLinear.apply(*stacked), 0  # type: ignore[no-untyped-call]


def by_client(value: Tensor, dim: int | None, clients: int) -> Tensor:
    """With the clients in front; what all share is expanded."""
    if dim is None:
        return value.expand(clients, *value.shape)
    return value if dim == 0 else value.movedim(dim, 0)


class GroupedKernels(TorchFunctionMode):
    """Under it a model's linear layers are `Linear`; what it cannot do stays as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a call."""
        if func is functional.linear and len(args) == 3 and args[2] is not None and args[0].dim() == 2:
            return Linear.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
