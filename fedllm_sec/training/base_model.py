"""The base model, loaded once for all clients, rounds and arms; only the adapter on it is swapped."""

import json
import logging
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedllm_sec.randomness import derived_seed
from fedllm_sec.settings import ModelSettings
from fedllm_sec.training import sharded
from fedllm_sec.training.prepare import first_line
from fedllm_sec.updates.errors import InputError

logger = logging.getLogger(__name__)

HEADS = ("classifier", "score", "qa_outputs")  # what transformers calls the head of a model that classifies


@dataclass(frozen=True)
class BaseModel:
    """A language model, or one that classifies, with one LoRA adapter on it or trained whole, and its tokenizer.

    Attributes:
        model: the `PeftModel`; trained whole, the model itself.
        tokenizer: its tokenizer; it has a padding token.
        parameters: what clients send, by their names in an adapter file: the adapter's, those that are frozen among
            them, and a classifier's head; trained whole, all by their names in a checkpoint.
        description: what was loaded, for people.
        launch: keeps alive what tells transformers how this launch shards models; None where it does not.
        classifies: whether it tells classes of texts apart.
    """

    model: Any
    tokenizer: Any
    parameters: Mapping[str, torch.nn.Parameter]
    description: str
    launch: Any = None
    classifies: bool = False

    @property
    def context(self) -> int | None:
        """How many tokens the model can read, where its configuration says so."""
        length: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return length

    def load_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the adapter's values in place; keys and shapes must be exactly the adapter's."""
        if state.keys() != self.parameters.keys():
            raise InputError(f"not this model's adapter: {sorted(state.keys() ^ self.parameters.keys())[:3]} ...")
        for name, parameter in self.parameters.items():
            expected = getattr(parameter, "ds_shape", parameter.shape)
            if state[name].shape != expected:
                raise InputError(f"tensor {name!r} has shape {list(state[name].shape)}, expected {list(expected)}")
        with torch.no_grad(), sharded.gathered(list(self.parameters.values())):
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def adapter(self) -> dict[str, Tensor]:
        """A float32 copy of the adapter, whole, on the CPU; where the model is sharded all processes must ask."""
        return {name: sharded.full_value(parameter) for name, parameter in self.parameters.items()}

    @property
    def is_adapted(self) -> bool:
        """Whether there is an adapter; otherwise the whole model is trained."""
        return hasattr(self.model, "peft_config")

    def configuration(self) -> dict[str, Any]:
        """PEFT's adapter configuration; trained whole, the model's."""
        if self.is_adapted:
            return adapter_config(self.model)
        config = {**json.loads(self.model.config.to_json_string()), "architectures": [type(self.model).__name__]}
        return dict(sorted(config.items()))


def load_base(
    settings: ModelSettings, folder: str, seed: int, *, is_sharded: bool = False, classes: Sequence[str] = ()
) -> BaseModel:
    """Load the base and put a fresh adapter on it, whose initial values depend on `seed` alone, and so do a head's.

    Args:
        settings: in which precision, with which adapter, or none.
        folder: what `prepare_base` gave.
        seed: the run's seed.
        is_sharded: whether DeepSpeed shards the model over the processes of this launch, which then load it together.
        classes: what a model that classifies tells apart; none: a causal language model.

    Raises:
        InputError: if the model cannot be had.
    """
    from transformers import AutoTokenizer

    dtype = load_dtype(settings)
    launch = sharding_arguments(dtype) if is_sharded else None  # before the model: it decides how that is loaded
    if settings.load_in_4bit and is_sharded and sharded.zero3():
        raise InputError("model.load_in_4bit and ZeRO-3 do not go together; use ZeRO-2, or no DeepSpeed")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=settings.revision)
        model, drawn = load_model(folder, settings, dtype, seed, classes)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {settings.path!r} cannot be loaded: {first_line(error)}") from error
    prepare_tokenizer(tokenizer, model, settings, classes)
    sharded.require_shards(model)
    if torch.cuda.is_available() and not is_sharded and not settings.load_in_4bit:
        model.to("cuda")
    weights = sharded.count_weights(model)
    trained = with_adapter(model, settings, seed, drawn, "SEQ_CLS" if classes else "CAUSAL_LM")
    parameters = {peft_key(name): p for name, p in trained.named_parameters() if p.requires_grad}
    if settings.lora and settings.lora.freeze_a:
        freeze_a(parameters)
    precision = "4-bit NF4" if settings.load_in_4bit else str(dtype).removeprefix("torch.")
    description = f"{settings.path} ({weights / 1e6:,.1f} M weights, {precision})"
    return BaseModel(trained, tokenizer, parameters, description, launch, bool(classes))


def prepare_tokenizer(tokenizer: Any, model: Any, settings: ModelSettings, classes: Sequence[str]) -> None:
    """Have it pad, and a model that classifies know with what.

    Raises:
        InputError: if it has no token to do so, or none to end a text of a language model.
    """
    if tokenizer.eos_token_id is None and not classes:
        raise InputError(f"model {settings.path!r}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"model {settings.path!r}: its tokenizer has no padding token")
        tokenizer.pad_token = tokenizer.eos_token
    if classes:
        model.config.pad_token_id = tokenizer.pad_token_id


def sharding_arguments(dtype: torch.dtype) -> Any:
    """`TrainingArguments` made for their side effect: they tell transformers about this launch's DeepSpeed."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=tempfile.gettempdir(),
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        save_strategy="no",
        report_to=[],
    )


def load_dtype(settings: ModelSettings) -> torch.dtype:
    """The precision of the base; a CPU gets float32 whatever is asked, and says so, and so does what is trained whole.

    A step of training is small beside a weight: bfloat16, which has 8 bits, would round most of it away.
    """
    asked = settings.dtype
    if settings.lora is None:
        if asked not in ("auto", "float32"):
            logger.warning("model.dtype=%s without an adapter: the whole model is trained, in float32", asked)
        return torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if asked == "auto" else getattr(torch, asked)
    if asked not in ("auto", "float32"):
        logger.warning("model.dtype=%s on a CPU (%s): training in float32", asked, platform.processor())
    return torch.float32


def load_model(
    folder: str, settings: ModelSettings, dtype: torch.dtype, seed: int, classes: Sequence[str]
) -> tuple[Any, list[str]]:
    """The base itself, and the modules of a model that classifies which its checkpoint lacks: drawn by the seed."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "revision": settings.revision}
    if settings.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(HEADS) if classes else None,
        )
    kind = AutoModelForCausalLM
    if classes:
        kind = AutoModelForSequenceClassification
        options |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    with torch.random.fork_rng():
        torch.random.manual_seed(derived_seed(seed, "head"))
        model, report = kind.from_pretrained(folder, **options, output_loading_info=True)
        drawn = sorted({name.rpartition(".")[0] for name in report["missing_keys"]}) if classes else []
        if settings.load_in_4bit and set(drawn) - set(HEADS):  # 4-bit weights cannot be trained
            options["quantization_config"].llm_int8_skip_modules = [*HEADS, *drawn]
            torch.random.manual_seed(derived_seed(seed, "head"))
            model = kind.from_pretrained(folder, **options)
    if settings.load_in_4bit:
        keep_trainable_on_cpu(model)
    return model, drawn


def keep_trainable_on_cpu(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place for inference, after which training fails (0.50)."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_adapter(model: Any, settings: ModelSettings, seed: int, drawn: Sequence[str], task_type: str) -> Any:
    """Put LoRA on a model, if it is to have one; what is trained stays in float32: bfloat16 would lose the update.

    PEFT trains the head of a model that classifies, whole (`modules_to_save`). What else was drawn, such as the pooler
    of a BERT that only learned to fill in words, is trained beside it: whoever loads the adapter draws other weights.
    """
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    if lora is None:
        return model
    config = LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else None,
        modules_to_save=[name for name in drawn if name.partition(".")[0] not in HEADS] or None,
    )
    with torch.random.fork_rng():
        torch.random.manual_seed(derived_seed(seed, "adapter"))
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"model.lora.target_modules={lora.target_modules}: {error}") from error
    keep_head_exact(adapted)
    return adapted


def keep_head_exact(model: Any) -> None:
    """Train modules that are trained whole beside an adapter in float32, whatever the base gives them to read."""
    from peft.utils import ModulesToSaveWrapper

    def in_float32(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.float() if torch.is_tensor(each) and each.is_floating_point() else each for each in inputs)

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                if any(parameter.dtype != torch.float32 for parameter in copy.parameters()):
                    copy.float().register_forward_pre_hook(in_float32)


def freeze_a(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Let no gradient reach the factors A: a client sends them as it received them (FFA-LoRA, arXiv:2403.12313)."""
    for name, parameter in parameters.items():
        if is_a(name):
            parameter.requires_grad_(False)


def is_a(name: str) -> bool:
    """Whether a parameter is LoRA's factor A."""
    return ".lora_A." in name or ".lora_embedding_A" in name


def adapter_config(model: Any) -> dict[str, Any]:
    """A `PeftModel`'s adapter configuration, with its sets in order, so that it has the same bytes in every process."""
    config = model.peft_config[model.active_adapter].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}


def peft_key(parameter: str, adapter: str = "default") -> str:
    """The name that PEFT gives a parameter in an adapter file: without the adapter's, and where it keeps a module."""
    name = re.sub(rf"(\.modules_to_save)?\.{re.escape(adapter)}(?=\.|$)", "", parameter)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def files_of(model: Any) -> Path:
    """Where a model's files are; those of a hub id in the hub's cache, where loading has put them.

    Raises:
        InputError: if they are nowhere.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = str(model.config.name_or_path)
    if Path(name).is_dir():
        return Path(name)
    revision = getattr(model.config, "_commit_hash", None)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
        raise InputError(f"model.path={name}: its files are not found ({error}); download it to a folder") from None
