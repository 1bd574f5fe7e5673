"""Look at what is saved before somebody else does."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor

from fedllm_sec.attacks.local import distance
from fedllm_sec.audit import audit_adapters
from fedllm_sec.audit.pickles import SUFFIXES
from fedllm_sec.callbacks.base import OnWeights
from fedllm_sec.callbacks.weights import Received, without_base
from fedllm_sec.training.base_model import adapter_config
from fedllm_sec.updates.adapters import adapter_config as read_config
from fedllm_sec.updates.errors import InputError, not_finite
from fedllm_sec.updates.layout import Layout
from fedllm_sec.updates.sources import SafetensorsFile, adapter_file, all_finite

logger = logging.getLogger(__name__)

WHILE_SAVING = {"inference_mode", "auto_mapping"}
OF_TRAINER = ("training_args.bin", "optimizer.", "scheduler.pt", "scaler.pt", "rng_state", "global_step")  # to resume


class AuditOnSave(OnWeights):
    """Audit each checkpoint that `Trainer` saves: would a server let this adapter pass, and does it hold the update?

    What is looked at: that the file is whole and has exactly the tensors of the adapter, in their shapes; that values
    are numbers; that they have not been rounded to 16 bits, which loses an update (DeepSpeed saves so under bf16); that
    the configuration is the model's; that something was trained; that the update is not longer than `norm`; that no
    pickle lies there but those from which `Trainer` resumes; and then all that `fedllm-sec audit` looks at. Nothing is
    ever unpickled.

    Findings are logged as warnings, kept in `findings` by step, and counted in `trainer.state.log_history` as
    `audit/findings`. The hub is sent a checkpoint before callbacks can look at it; push yourself when this is empty.
    Of several processes the one that saves looks.

    Args:
        norm: the longest update that is in order, in the units of the weights; default: any.
        stop: whether training ends with the first finding.
        received: see `OnWeights`.

    Example:
        >>> from fedllm_sec.callbacks import AuditOnSave
        >>> audit = AuditOnSave(norm=1e-3)
        >>> trainer = Trainer(model=model, args=saving, train_dataset=data, callbacks=[audit])
        >>> result = trainer.train()
        >>> list(audit.findings)  # of four steps the second and the fourth are saved
        [2, 4]
        >>> audit.findings[4]
        ['the update is 0.029 long, and the limit is 0.001']
    """

    def __init__(self, norm: float | None = None, *, stop: bool = False, received: Received | None = None):
        super().__init__(received)
        if norm is not None and not norm > 0:
            raise InputError(f"AuditOnSave: norm={norm}: give a positive number, or none")
        self.norm, self.stop = norm, stop
        self.findings: dict[int, list[str]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note what there is to be saved."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.config = adapter_config(model) if hasattr(model, "peft_config") else None
        self.findings = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Look at the newest checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save:
            found = audit(folder, self.start, self.config, self.norm)
            self.findings[state.global_step] = found
            state.log_history.append({"audit/findings": len(found), "step": state.global_step})
            for finding in found:
                logger.warning("%s: %s", folder, finding)
        if self.stop:  # all processes together
            control.should_training_stop |= any(gather_object(self.findings.get(state.global_step, [])))
        return control


def audit(
    folder: Path, received: Mapping[str, Tensor], config: Mapping[str, Any] | None, norm: float | None = None
) -> list[str]:
    """What is wrong with a saved adapter, a line each.

    Args:
        folder: the checkpoint's.
        received: what the update starts from; its names and shapes are those that are expected.
        config: the adapter's configuration, as the model has it.
        norm: the longest update that is in order.
    """
    pickles = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in SUFFIXES)
    found = [
        f"{name}: is a pickle, which runs code when it is read: do not send it"
        for name in pickles
        if not name.startswith(OF_TRAINER)
    ]
    try:
        file = SafetensorsFile(adapter_file(folder))
    except InputError as error:
        return [*found, str(error)]
    expected = Layout.of({name: tuple(value.shape) for name, value in received.items()})
    shapes = without_base(dict(file.layout.shapes), received)
    if config is None:  # a whole model: what is not trained is there too
        shapes = {name: shape for name, shape in shapes.items() if name in received}
    if fault := expected.difference(Layout.of(shapes)):
        return [*found, fault]
    if config is not None and (fault := other_config(folder, config)):
        found.append(fault)
    short = sorted(name for name, dtype in file.dtypes.items() if dtype.itemsize < torch.float32.itemsize)
    if short:
        found.append(f"tensor {short[0]!r} is saved as {file.dtypes[short[0]]}, which loses a small update")
    state = load_file(adapter_file(folder))
    found += of_values({name: state[name] for name in received}, received, norm)
    return found or (by_rule(folder) if config is not None else [])


def by_rule(folder: Path) -> list[str]:
    """What `fedllm-sec audit` finds in a checkpoint, besides the files that `Trainer` resumes from."""
    result = audit_adapters([folder])
    ours = [each for each in result.failing if not (each.file or "").startswith(OF_TRAINER)]
    return [f"{each.rule.id}: {each.message}" for each in ours]


def of_values(state: Mapping[str, Tensor], received: Mapping[str, Tensor], norm: float | None) -> list[str]:
    """What is wrong with the values."""
    bad = sorted(name for name, value in state.items() if not all_finite(value))
    if bad:
        return [not_finite(bad[0])]
    length = distance({name: value.float() for name, value in state.items()}, received)
    if not length:
        return ["the adapter is what was received: nothing was trained"]
    return [f"the update is {length:.2g} long, and the limit is {norm:.2g}"] if norm and length > norm else []


def other_config(folder: Path, config: Mapping[str, Any]) -> str | None:
    """In what the saved configuration is not the model's, besides what PEFT sets while it saves."""
    try:
        saved = read_config(folder)
    except InputError as error:
        return str(error)
    if saved is None:
        return "has no adapter_config.json: nobody can tell how the factors are scaled"
    keys = (config.keys() | saved.keys()) - WHILE_SAVING
    differs = sorted(key for key in keys if plain(config.get(key)) != plain(saved.get(key)))
    return f"its adapter_config differs from the model's in {differs[0]!r}" if differs else None


def plain(value: Any) -> Any:
    """As JSON has it, whatever the order of a set."""
    return sorted(value, key=str) if isinstance(value, list | set | tuple) else value
