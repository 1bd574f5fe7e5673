"""What is made once and kept: the embedded base model, and GGUF files as safetensors."""

import os
from collections.abc import Callable
from pathlib import Path

from fedllm_sec.updates.files import atomic_folder


def cache_folder() -> Path:
    """`$FEDLLM_SEC_CACHE`, or `~/.cache/fedllm_sec`."""
    return Path(os.environ.get("FEDLLM_SEC_CACHE", "~/.cache/fedllm_sec")).expanduser()


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, which `make` fills if it is not there; two makers do no harm."""
    folder = cache_folder() / name
    if not folder.exists():
        try:
            with atomic_folder(folder) as partial:
                make(partial)
        except OSError:
            if not folder.exists():  # else somebody was faster
                raise
    return folder
