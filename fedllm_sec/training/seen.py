"""What texts went through a language model while a client trained it, token by token."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def texts_seen(model: nn.Module) -> Iterator[list[list[int]]]:
    """Keep every text of every batch of a training, in a list that fills while the context is open.

    It is the model that is watched and not the data set: of that, batches are fetched ahead and may never be used.

    Args:
        model: is called with `input_ids` and, where there is padding, `attention_mask`, (batch, length), by name.

    Yields:
        Token ids of each text without its padding, in the order of the batches.
    """
    texts: list[list[int]] = []

    def look(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if module.training:
            every, mask = named["input_ids"], named.get("attention_mask")
            for row, ids in enumerate(every):
                texts.append((ids if mask is None else ids[mask[row].bool()]).tolist())

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield texts
    finally:
        hook.remove()
