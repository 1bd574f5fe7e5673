"""DeepSpeed: what changes when all processes hold one model together.

`Trainer` makes a DeepSpeed engine around the model for each client. Between two engines the adapter is written into the
parameters; while one is alive, the exact float32 values are its own and all processes read them together. An engine
that is not taken down breaks the next one, and one whose hooks stay on the model is never freed.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer


def zero3() -> bool:
    """Whether the launch shards the weights themselves (ZeRO-3), which `from_pretrained` then does as well."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def require_shards(model: Any) -> None:
    """Raise if a base that should be sharded was loaded whole: transformers would not say so."""
    if zero3() and not all(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("the base was loaded whole under ZeRO-3: TrainingArguments must exist before it is loaded")


def count_weights(model: Any) -> int:
    """How many weights a base has, sharded or packed into 4 bits or neither."""
    if zero3():
        return sum(parameter.ds_numel for parameter in model.parameters())
    return int(model.num_parameters())


def gathered(parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """A context in which parameters are whole and what the main process writes to them reaches all."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded, modifier_rank=0)
    return context


def full_value(parameter: torch.nn.Parameter) -> Tensor:
    """A parameter's float32 value, whole, on every process; all must ask together.

    Raises:
        RuntimeError: if it comes back incomplete (an empty adapter was saved by many a ZeRO-3 run).
    """
    value: Tensor | None = None
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
    if value is None:
        with gathered([parameter]):
            value = parameter.detach().clone()
    if value.shape != getattr(parameter, "ds_shape", value.shape) or not value.numel():
        raise RuntimeError(f"a sharded parameter came back with shape {tuple(value.shape)}")
    return value.detach().to("cpu", torch.float32, copy=True)


def take_down(trainer: Trainer) -> None:
    """Free a trainer's DeepSpeed engine, where it has one, and take its hooks off the model."""
    if trainer.deepspeed is None:
        return
    close(trainer.deepspeed)
    trainer.accelerator.free_memory()
    trainer.deepspeed = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None


def close(engine: Any) -> None:
    """Destroy an engine; `destroy` itself leaves two hooks on the model, which keep everything alive."""
    engine.destroy()
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        if (hook := getattr(engine, name, None)) is not None:
            hook.remove()
            setattr(engine, name, None)


@contextmanager
def for_inference(model: Any) -> Iterator[Any]:
    """What to call for forward passes, in evaluation mode; under ZeRO-3 all processes must call it equally often."""
    model.eval()
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield model
        return
    import deepspeed

    bf16 = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16}, "zero_optimization": {"stage": 3}}
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    try:
        yield engine
    finally:
        close(engine)
