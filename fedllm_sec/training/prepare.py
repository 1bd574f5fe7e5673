"""What must be made before a base can be loaded, once: embedded bases are trained, GGUF files converted."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from fedllm_sec.settings import EMBEDDED, ModelSettings
from fedllm_sec.training.cache import cached
from fedllm_sec.updates.errors import InputError

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, float], None]


def prepare_base(settings: ModelSettings, on_step: OnStep | None = None, *, classifies: bool = False) -> str:
    """A hub id or folder that `from_pretrained` reads: the embedded base is trained, a GGUF file is converted, once.

    Args:
        settings: which model.
        on_step: told (step, steps, loss) while the embedded base is trained.
        classifies: whether the embedded base is to classify texts.

    Raises:
        InputError: if a GGUF file is missing or cannot be read.
    """
    if settings.path == EMBEDDED and classifies:
        from fedllm_sec.training.tiny_bert import build_tiny_bert, tiny_bert_fingerprint

        return str(cached(f"tiny-bert-{tiny_bert_fingerprint()}", lambda to: build_tiny_bert(to, on_step=on_step)))
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


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]
