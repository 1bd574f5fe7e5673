"""The weights that a `Trainer` trains, by the names that they have in an adapter file, in one process or several."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedllm_sec.training import sharded
from fedllm_sec.training.base_model import peft_key
from fedllm_sec.updates.errors import InputError, not_finite
from fedllm_sec.updates.sources import adapter_file, all_finite

T = TypeVar("T")
Received = Path | str | Mapping[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """What a client sends: an adapter with what was trained beside it, or all trained weights of a model without one.

    Attributes:
        parameters: by their names in an adapter file (a model without an adapter: in a checkpoint), frozen factors of
            the adapter among them.
        engine: whether DeepSpeed holds them; then the exact values are its own.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    engine: bool

    def read(self) -> dict[str, Tensor]:
        """A float32 copy of all, whole, on the CPU; with DeepSpeed all processes must ask."""
        return {name: sharded.full_value(parameter) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite some, in all copies that there are; with DeepSpeed all processes must write the same."""
        for name, value in values.items():
            parameter = self.parameters[name]
            if self.engine:
                write_sharded(parameter, value)
            else:
                parameter.copy_(value)

    @property
    def trained(self) -> list[str]:
        """The names of those that are not frozen."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]


def write_sharded(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Into DeepSpeed's float32 copy, which the next step starts from, and into what is seen and saved until then."""
    from deepspeed.utils import safe_set_full_fp32_param

    if parameter.requires_grad:
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
    with sharded.gathered([parameter]):
        parameter.data.copy_(value)


def weights_of(model: Any) -> Weights:
    """The weights of a model as `Trainer` gives it to callbacks.

    Raises:
        InputError: if nothing of it is trained, or several adapters are.
    """
    adapter = active_adapter(model)
    kept = {}
    for name, parameter in model.named_parameters():
        of_adapter = adapter is not None and any(part in name for part in (".lora_", ".modules_to_save."))
        if parameter.requires_grad or (of_adapter and f".{adapter}" in name):
            kept[peft_key(name, adapter or "default")] = parameter
    if not any(parameter.requires_grad for parameter in kept.values()):
        raise InputError("nothing of the model is trained: put an adapter on it, or let some weights require gradients")
    engine = any(hasattr(each, "ds_id") or hasattr(each, "_hp_mapping") for each in kept.values())
    return Weights(kept, engine)


def active_adapter(model: Any) -> str | None:
    """The adapter that is trained, by its name; None for a model without one.

    Raises:
        InputError: if several are.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    active = model.active_adapters
    if len(active) != 1:
        raise InputError(f"adapters {', '.join(active)} are active at once: activate the one that is to be sent")
    return str(active[0])


def without_base(state: Mapping[str, T], expected: Mapping[str, Any]) -> dict[str, T]:
    """The tensors of an adapter file but for a copy of the embeddings, which PEFT adds where LoRA is on them."""
    base = ".base_layer.weight"
    return {
        name: value
        for name, value in state.items()
        if not (name.endswith(base) and f"{name.removesuffix(base)}.lora_embedding_A" in expected)
    }


def require_finite(values: Mapping[str, Tensor], who: str) -> None:
    """Raise InputError, naming the first tensor that holds NaN or Inf: training has diverged."""
    for name, value in values.items():
        if not all_finite(value):
            raise InputError(f"{who}: training diverged: {not_finite(name)}; lower the learning rate")


def received_values(received: Received | None, weights: Weights, step: int, who: str) -> dict[str, Tensor]:
    """What the client started from.

    Args:
        received: the folder or file of the adapter that the server sent, or its tensors; None: what the weights are.
        weights: of the model.
        step: how many steps have been done: after a resume the weights are no longer what was received.
        who: the callback, for errors.

    Raises:
        InputError: if it cannot be read or is of another shape, or if it is not given and training is resumed.
    """
    if received is None:
        if step:
            raise InputError(f"{who}: resumed at step {step}, the weights are not what was received: give received=")
        return weights.read()
    shapes = {name: getattr(each, "ds_shape", each.shape) for name, each in weights.parameters.items()}
    state = without_base(received if isinstance(received, Mapping) else load(Path(received), who), shapes)
    wrong = sorted(shapes.keys() ^ state.keys())
    wrong = wrong or [name for name, shape in shapes.items() if tuple(state[name].shape) != tuple(shape)]
    if wrong:
        raise InputError(f"{who}: received= is not this model's adapter: see tensor {wrong[0]!r}")
    return {name: state[name].detach().to("cpu", torch.float32) for name in shapes}


def load(path: Path, who: str) -> dict[str, Tensor]:
    """The tensors of an adapter folder or a safetensors file."""
    file = adapter_file(path)
    try:
        state: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{who}: {file}: is not a whole safetensors file ({error})") from None
    return state
