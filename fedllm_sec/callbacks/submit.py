"""Write what a client sends, when its training has ended."""

import hashlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from fedllm_sec.attacks.local import distance
from fedllm_sec.callbacks.base import OnWeights
from fedllm_sec.callbacks.weights import Received
from fedllm_sec.training.base_model import adapter_config
from fedllm_sec.updates.errors import InputError


class SubmitUpdate(OnWeights):
    """Write the client's folder when training ends: what `fedllm-sec aggregate`, `audit` and `reconstruct` take.

    The folder holds the trained adapter in float32 (`adapter_model.safetensors`, `adapter_config.json`; PEFT loads it)
    and `client.json`: the samples, the mean training loss, the steps, the length of the update, and hashes of the
    received adapter and of the base's configuration, by which a server knows from what the update starts. With
    `difference=True` there is also `update.safetensors`, the adapter minus the received one.

    Give it last: it writes what callbacks before it have left. The folder appears whole or not at all.

    Args:
        folder: where; it must not be there yet.
        num_samples: examples of the client; default: those of the training data set.
        received: see `OnWeights`.
        difference: whether to write the difference too.

    Raises:
        InputError: when training begins, if the folder is there, or the model has no adapter.

    Example:
        >>> from fedllm_sec.callbacks import SubmitUpdate
        >>> submit = SubmitUpdate(folder / "client_00")
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[submit])
        >>> result = trainer.train()
        >>> sorted(path.name for path in (folder / "client_00").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'client.json']
    """

    def __init__(
        self,
        folder: Path | str,
        num_samples: int | None = None,
        received: Received | None = None,
        *,
        difference: bool = False,
    ):
        super().__init__(received)
        self.folder, self.num_samples, self.difference = Path(folder), num_samples, difference

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look whether it can be written later."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if self.folder.exists():
            raise InputError(f"SubmitUpdate: {self.folder} is there already; remove it, or submit to another folder")
        if not hasattr(model, "peft_config"):
            raise InputError("SubmitUpdate: the model has no PEFT adapter, which is what is submitted")
        loader = kwargs.get("train_dataloader")
        self.samples = self.num_samples or (len(loader.dataset) if loader is not None else None)
        if self.samples is None:
            raise InputError("SubmitUpdate: how many examples the client has is not known: give num_samples=")
        self.model = model

    def end(self, args: Any, state: Any) -> None:
        """Read on all processes, write on one."""
        now = self.weights.read()
        if state.is_world_process_zero:
            self.write(now, state)
        del self.model

    def write(self, now: dict[str, Tensor], state: Any) -> None:
        """The folder."""
        from safetensors.torch import save_file

        from fedllm_sec.federation.run_folder import save_adapter
        from fedllm_sec.updates.files import atomic_file

        config = adapter_config(self.model)
        claims = {
            "num_samples": self.samples,
            "loss": mean_loss(state),
            "steps": state.global_step,
            "update_norm": distance(now, self.start),
            "received_sha256": digest(self.start),
            "base_model": config.get("base_model_name_or_path"),
            "base_config_sha256": hashlib.sha256(self.model.config.to_json_string().encode()).hexdigest(),
        }
        save_adapter(now, config, self.folder, client=claims)
        if self.difference:
            with atomic_file(self.folder / "update.safetensors") as partial:
                save_file({name: now[name] - self.start[name] for name in now}, partial)


def mean_loss(state: Any) -> float | None:
    """The mean training loss, as far as `Trainer` has logged it; None where it has not, or it is no number."""
    logged = [entry.get("train_loss", entry.get("loss")) for entry in state.log_history]
    losses = [float(loss) for loss in logged if loss is not None]
    return losses[-1] if losses and math.isfinite(losses[-1]) else None


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of the names, shapes and float32 values of all tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(f"{name} {tuple(state[name].shape)} ".encode())
        total.update(state[name].contiguous().numpy().tobytes())
    return total.hexdigest()


__all__ = ["SubmitUpdate", "TrainerCallback", "digest"]
