"""The base model, as far as an audit needs it: what an adapter of it must look like, and how large its weights are."""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedllm_sec.audit.folder import Entry, digest
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json
from fedllm_sec.updates.sources import SafetensorsFile

INDEX = "model.safetensors.index.json"
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
COPIED = (  # of an adapter's configuration: what says which modules it adapts, and nothing that acts on loading
    "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "bias", "use_rslora", "use_dora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "fan_in_fan_out", "lora_bias", "target_parameters",
)  # fmt: skip


class Base:
    """A base model's folder, or its config.json.

    Raises:
        InputError: if it is not there, or needs code of its own.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        config = path / "config.json" if path.is_dir() else path
        if not config.is_file():
            raise InputError(f"--base {path}: has no config.json; give the base model's folder")
        self.config = read_json(config)
        if not isinstance(self.config, dict) or "model_type" not in self.config:
            raise InputError(f"--base {path}: config.json is not a model's configuration")
        if self.config.get("auto_map"):
            raise InputError(f"--base {path}: needs code of its own (auto_map), which an audit does not run")
        self.known: dict[str, Mapping[str, tuple[int, ...]] | str] = {}

    @property
    def weights(self) -> list[Path]:
        """Its safetensors files; none where only its configuration is there."""
        return sorted(self.folder.glob("model*.safetensors"))

    def shapes(self, config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]] | str:
        """Names and shapes of the adapter that a configuration describes; in words, why they are not known.

        The model is built without memory (on the meta device), from classes of transformers alone.
        """
        told = {name: config[name] for name in COPIED if config.get(name) is not None}
        key = repr(sorted(told.items(), key=lambda item: item[0])) + str(config.get("task_type"))
        if key not in self.known:
            try:
                self.known[key] = self.built(told, str(config.get("task_type") or "FEATURE_EXTRACTION"))
            except Exception as error:  # a stranger's configuration, in PEFT's and transformers' hands
                lines = str(error).splitlines() or [type(error).__name__]
                self.known[key] = f"the base takes no such adapter ({lines[0][:160]})"
        return self.known[key]

    def built(self, told: Mapping[str, Any], task: str) -> Mapping[str, tuple[int, ...]] | str:
        """As `shapes`, from the fields that count."""
        import transformers
        from peft import LoraConfig, get_peft_model
        from peft.utils import get_peft_model_state_dict

        if task not in AUTO:
            return f"adapters of the task {task[:40]} are not known here"
        config = transformers.AutoConfig.for_model(**self.config)
        with torch.device("meta"), silent():
            model = getattr(transformers, AUTO[task]).from_config(config)
            task_type = task if task != "FEATURE_EXTRACTION" else None
            adapted = get_peft_model(model, LoraConfig(**told, task_type=task_type, init_lora_weights=False))
            state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return {name: tuple(value.shape) for name, value in state.items()}

    def norms(self, modules: Mapping[str, str]) -> dict[str, float]:
        """The Frobenius norms of the weights of some modules; without those that its files do not have.

        Args:
            modules: by the name in the result, the module's name.
        """
        where: dict[str, SafetensorsFile] = {}
        for path in self.weights:
            file = SafetensorsFile(path)
            where |= dict.fromkeys(file.layout.sizes, file)
        found = {}
        for name, module in modules.items():
            names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
            known = next((each for each in names if each in where), None)
            if known is not None:
                found[name] = norm_of(where[known], known)
        return found

    def sha256(self) -> str | None:
        """Of names and bytes of its safetensors, as `SubmitUpdate` writes it; None where there are none."""
        if not self.weights:
            return None
        total = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            total.update(f"{path.name} ".encode())
            total.update(bytes.fromhex(digest(path)))
        return total.hexdigest()

    def other_tokenizer(self, files: Mapping[str, Entry]) -> list[str]:
        """The files of an adapter's tokenizer that differ from the base's of the same name."""
        return [
            name
            for name, entry in files.items()
            if (self.folder / name).is_file() and digest(self.folder / name) != digest(entry.path)
        ]


def norm_of(file: SafetensorsFile, name: str) -> float:
    """The Frobenius norm of a tensor, read in pieces."""
    (only,) = [layout for layout in [file.layout] if name in layout.sizes]
    squares = torch.zeros((), dtype=torch.float64)
    for span in only.spans(2**22):
        if span.tensor == name:
            squares += file.load(span).double().square().sum()
    return float(squares.sqrt())


@contextlib.contextmanager
def silent() -> Any:
    """Whatever libraries say about a model without weights is of no interest."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
