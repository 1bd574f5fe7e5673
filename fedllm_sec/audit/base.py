"""The base model, as far as an audit needs it: what an adapter of it must look like, and how large its weights are."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm_sec.audit.folder import Entry
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json, sha256, sha256_of_all
from fedllm_sec.updates.layout import Span
from fedllm_sec.updates.patterns import matches, matching
from fedllm_sec.updates.sources import SafetensorsFile

PIECE = 2**22  # values of a tensor that are read at once
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
    "layers_to_transform", "rank_pattern", "fan_in_fan_out", "lora_bias", "target_parameters",
    "trainable_token_indices",
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
        self.index: dict[str, SafetensorsFile] = {}
        try:
            self.skeleton({})
        except Exception as error:  # whatever transformers says of it
            told = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"--base {path}: config.json describes no model that can be built ({told[:160]})"
            ) from None

    @property
    def weights(self) -> list[Path]:
        """Its safetensors files; none where only its configuration is there."""
        return sorted(self.folder.glob("model*.safetensors"))

    def shapes(self, config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]] | str:
        """Names and shapes of the adapter that a configuration describes; in words, why they are not known.

        The model is built without memory (on the meta device), from classes of transformers alone.
        """
        told = told_of(config)
        key = repr(sorted(told.items(), key=lambda item: item[0])) + str(config.get("task_type"))
        if key not in self.known:
            try:
                self.known[key] = self.built(config)
            except Exception as error:  # a stranger's configuration, in PEFT's and transformers' hands
                lines = str(error).splitlines() or [type(error).__name__]
                self.known[key] = f"the base takes no such adapter ({lines[0][:160]})"
        return self.known[key]

    def skeleton(self, config: Mapping[str, Any]) -> Any:
        """The model that an adapter is for, without memory: by its task, or as the base's own configuration says."""
        import transformers

        known = transformers.AutoConfig.for_model(**self.config)
        task, mapping = str(config.get("task_type") or ""), config.get("auto_mapping")
        names = [mapping.get("base_model_class") if isinstance(mapping, dict) else None]
        names += self.config.get("architectures") or []
        own = [getattr(transformers, str(name), None) for name in names]
        models = [each for each in own if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel)]
        with torch.device("meta"), silent():
            if task in AUTO:
                return getattr(transformers, AUTO[task]).from_config(known)
            return models[0](known) if models else transformers.AutoModel.from_config(known)

    def built(self, config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
        """As `shapes`."""
        from peft import LoraConfig, get_peft_model
        from peft.utils import get_peft_model_state_dict

        model, task = self.skeleton(config), config.get("task_type")
        fields = fields_for(model, config)
        with torch.device("meta"), silent():
            task_type = task if task in AUTO and task != "FEATURE_EXTRACTION" else None
            adapted = get_peft_model(model, LoraConfig(**fields, task_type=task_type, init_lora_weights=False))
            state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return {name: tuple(value.shape) for name, value in state.items()}

    def find(self, name: str) -> tuple[SafetensorsFile, str] | None:
        """Where a tensor lies, whatever prefix the checkpoint has; None: it has none of that name."""
        if not self.index:
            for path in self.weights:
                file = SafetensorsFile(path)
                self.index |= dict.fromkeys(file.layout.sizes, file)
        for each in (name, name.partition(".")[2]):
            if each in self.index:
                return self.index[each], each
        longer = [each for each in self.index if each.endswith(f".{name}")]
        return (self.index[longer[0]], longer[0]) if len(longer) == 1 else None

    def norms(self, modules: Iterable[str]) -> dict[str, float]:
        """The Frobenius norms of the weights of some modules; without those that its files do not have."""
        found = {module: self.find(f"{module}.weight") for module in modules}
        return {module: norm_of(*place) for module, place in found.items() if place is not None}

    def sha256(self) -> str | None:
        """Of names and bytes of its safetensors, as `SubmitUpdate` writes it; None where there are none."""
        return sha256_of_all(self.folder.glob("*.safetensors"))

    def other_tokenizer(self, files: Mapping[str, Entry]) -> list[str]:
        """The files of an adapter's tokenizer that differ from the base's of the same name."""
        return [
            name
            for name, entry in files.items()
            if (self.folder / name).is_file() and sha256(self.folder / name) != sha256(entry.path)
        ]


def norm_of(file: SafetensorsFile, name: str) -> float:
    """The Frobenius norm of a tensor, read in pieces."""
    return float(sum(file.load(span).double().square().sum() for span in spans_of(file, name)) ** 0.5)


def spans_of(file: SafetensorsFile, name: str) -> Iterator[Span]:
    """A tensor in pieces."""
    size = file.layout.sizes[name]
    for start in range(0, size, PIECE):
        yield Span(name, start, min(start + PIECE, size))


def told_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration says which modules are adapted, and nothing that acts on loading."""
    return {name: config[name] for name in COPIED if config.get(name) is not None}


def fields_for(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT is given to adapt a model: a stranger's patterns are matched here, in bounded time, and not by PEFT.

    Raises:
        TooSlowError: if one cannot be matched.
    """
    told = told_of(config)
    return {**told, **plain_names(told, [name for name, _ in model.named_modules()])}


def plain_names(told: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A configuration's patterns as lists of the names that they match.

    Raises:
        TooSlowError: if one cannot be matched.
    """
    found: dict[str, Any] = {}
    for field in ("target_modules", "exclude_modules"):
        if isinstance(told.get(field), str) and told[field] != "all-linear":
            found[field] = [name for name in names if name and matches(told[field], name)]
    patterns = told.get("rank_pattern")
    if patterns:
        ranked = {name: pattern for name in names if name and (pattern := matching(patterns, name)) is not None}
        found["rank_pattern"] = {f"^{re.escape(name)}": patterns[pattern] for name, pattern in ranked.items()}
    return found


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
