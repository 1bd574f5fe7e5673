"""The base model, loaded once for all clients, rounds and arms; only the adapter on it is swapped."""

import hashlib
import logging
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedllm_sec.randomness import derived_seed
from fedllm_sec.settings import EMBEDDED, ModelSettings
from fedllm_sec.training import sharded
from fedllm_sec.training.cache import cached
from fedllm_sec.updates.errors import InputError

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class BaseModel:
    """A causal language model with one LoRA adapter on it, and its tokenizer.

    Attributes:
        model: the `PeftModel`.
        tokenizer: its tokenizer; it has a padding token.
        parameters: the adapter's parameters by their names in an adapter file, those that are frozen among them.
        description: what was loaded, for people.
        launch: keeps alive what tells transformers how this launch shards models; None where it does not.
    """

    model: Any
    tokenizer: Any
    parameters: Mapping[str, torch.nn.Parameter]
    description: str
    launch: Any = None

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

    def adapter_config(self) -> dict[str, Any]:
        """PEFT's adapter configuration."""
        return adapter_config(self.model)


def load_base(settings: ModelSettings, folder: str, seed: int, *, is_sharded: bool = False) -> BaseModel:
    """Load the base and put a fresh adapter on it, whose initial values depend on `seed` alone.

    Args:
        settings: in which precision, with which adapter.
        folder: what `prepare_base` gave.
        seed: the run's seed.
        is_sharded: whether DeepSpeed shards the model over the processes of this launch, which then load it together.

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
        model = load_model(folder, settings, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"model {settings.path!r} cannot be loaded: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {settings.path!r}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    sharded.require_shards(model)
    if torch.cuda.is_available() and not is_sharded and not settings.load_in_4bit:
        model.to("cuda")
    weights = sharded.count_weights(model)
    adapted = with_adapter(model, settings, seed)
    parameters = {peft_key(name): p for name, p in adapted.named_parameters() if p.requires_grad}
    if settings.lora.freeze_a:
        freeze_a(parameters)
    precision = "4-bit NF4" if settings.load_in_4bit else str(dtype).removeprefix("torch.")
    description = f"{settings.path} ({weights / 1e6:,.1f} M weights, {precision})"
    return BaseModel(adapted, tokenizer, parameters, description, launch)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def prepare_base(settings: ModelSettings, on_step: OnStep | None = None) -> str:
    """A hub id or folder that `from_pretrained` reads: the embedded base is trained, a GGUF file is converted, once.

    Args:
        settings: which model.
        on_step: told (step, steps, loss) while the embedded base is trained.

    Raises:
        InputError: if a GGUF file is missing or cannot be read.
    """
    if settings.path == EMBEDDED:
        from fedllm_sec.training.tiny_base import build_tiny_base, tiny_base_fingerprint

        return str(cached(f"tiny-base-{tiny_base_fingerprint()}", lambda to: build_tiny_base(to, on_step=on_step)))
    path = Path(settings.path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model.path={settings.path}: no such file")
        stamp = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stamp.st_size} {stamp.st_mtime_ns}".encode()).hexdigest()[:16]
        return str(cached(f"gguf-{path.stem}-{key}", lambda to: convert_gguf(path, to)))
    if not path.exists() and (path.is_absolute() or settings.path.startswith(".")):
        raise InputError(f"model.path={settings.path}: no such file or folder")
    return settings.path


def convert_gguf(file: Path, folder: Path) -> None:
    """Save a GGUF model as bfloat16 safetensors: dequantising takes half a minute, and is needed once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError("GGUF files need the package gguf: pip install 'fedllm-sec[gguf]'") from None
    logger.warning("converting %s to safetensors, once; it is kept in the cache", file)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as a GGUF model: {first_line(error)}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):  # `save_pretrained` refuses a model that says it is GGUF
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def load_dtype(settings: ModelSettings) -> torch.dtype:
    """The precision of the base; a CPU gets float32 whatever is asked, and says so."""
    if torch.cuda.is_available():
        return torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if settings.dtype not in ("auto", "float32"):
        logger.warning("model.dtype=%s on a CPU (%s): training in float32", settings.dtype, platform.processor())
    return torch.float32


def load_model(folder: str, settings: ModelSettings, dtype: torch.dtype) -> Any:
    """The base itself."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "revision": settings.revision}
    if settings.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if settings.load_in_4bit:
        keep_trainable_on_cpu(model)
    return model


def keep_trainable_on_cpu(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place for inference, after which training fails (0.50)."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_adapter(model: Any, settings: ModelSettings, seed: int) -> Any:
    """Put LoRA on a model; adapters stay in float32, for a bfloat16 copy would lose the update."""
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else None,
    )
    with torch.random.fork_rng():
        torch.random.manual_seed(derived_seed(seed, "adapter"))
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"model.lora.target_modules={lora.target_modules}: {error}") from error


def freeze_a(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Let no gradient reach the factors A: a client sends them as it received them (FFA-LoRA, arXiv:2403.12313)."""
    for name, parameter in parameters.items():
        if ".lora_A." in name or ".lora_embedding_A" in name:
            parameter.requires_grad_(False)


def adapter_config(model: Any) -> dict[str, Any]:
    """A `PeftModel`'s adapter configuration, with its sets in order, so that it has the same bytes in every process."""
    config = model.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}


def peft_key(parameter: str) -> str:
    """The name that PEFT gives a parameter in an adapter file: without the adapter's, and where it keeps a module."""
    return parameter.replace(".modules_to_save.default", "").replace(".default", "")
