"""Write what a client sends, when its training has ended."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from fedllm_sec.attacks.local import distance
from fedllm_sec.callbacks.base import OnWeights
from fedllm_sec.callbacks.weights import Received, require_finite
from fedllm_sec.training.base_model import adapter_config, files_of
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import sha256_of_all

PASSING = ("dtype", "torch_dtype", "use_cache", "transformers_version", "_name_or_path", "quantization_config")


class SubmitUpdate(OnWeights):
    """Write the client's folder when training ends: what `fedllm-sec aggregate`, `audit` and `reconstruct` take.

    The folder holds the trained adapter in float32 (`adapter_model.safetensors`, `adapter_config.json`; PEFT loads it)
    and `client.json`: the samples, the mean training loss, the steps, the length of the update, and hashes of the
    received adapter, of the base's files and of its configuration, which a server can compare with its own. With
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
        self.config = adapter_config(model)
        if self.config["peft_type"] != "LORA":
            raise InputError(f"SubmitUpdate: the adapter is {self.config['peft_type']}; LoRA is what can be submitted")
        self.samples = self.num_samples
        if self.samples is None:
            self.samples = samples_of(kwargs.get("train_dataloader"))
        if self.samples < 1:
            raise InputError(f"SubmitUpdate: num_samples={self.samples}: give how many examples the client has")
        self.base = {
            "base_config_sha256": digest_of_config(model.config),
            "base_sha256": digest_of_files(model) if state.is_world_process_zero else None,
        }

    def end(self, args: Any, state: Any) -> None:
        """Read on all processes, write on one."""
        now = self.weights.read()
        require_finite(now, self.who)
        if state.is_world_process_zero:
            self.write(now, state)

    def write(self, now: dict[str, Tensor], state: Any) -> None:
        """The folder."""
        from fedllm_sec.federation.run_folder import save_adapter

        claims = {
            "num_samples": self.samples,
            "loss": mean_loss(state),
            "steps": state.global_step,
            "update_norm": distance(now, self.start),
            "received_sha256": digest(self.start),
            "base_model": self.config.get("base_model_name_or_path"),
            **self.base,
        }
        difference = {"update": {name: now[name] - self.start[name] for name in now}} if self.difference else None
        save_adapter(now, self.config, self.folder, beside=difference, client=claims)


def samples_of(loader: Any) -> int:
    """How many examples a loader's data set has.

    Raises:
        InputError: if that is not known.
    """
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        raise InputError("SubmitUpdate: how many examples the client has is not known: give num_samples=") from None


def digest_of_files(model: Any) -> str | None:
    """SHA-256 of the names and bytes of a base's safetensors files; None where it was not loaded from any."""
    try:
        return sha256_of_all(files_of(model).glob("*.safetensors")) if model.config.name_or_path else None
    except InputError:  # converted, or its files have gone
        return None


def digest_of_config(config: Any) -> str:
    """SHA-256 of a base's configuration, but for what does not make it another model."""
    told = {name: value for name, value in config.to_dict().items() if name not in PASSING}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


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
