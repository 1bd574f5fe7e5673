"""The beginning of a language model, as clients received it: what its first two layers read of token ids."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.reconstruction.families import Family
from fedllm_sec.attacks.reconstruction.gradients import tensors
from fedllm_sec.attacks.reconstruction.lora_tokens import Base
from fedllm_sec.attacks.reconstruction.reading import PREFIX, A, B
from fedllm_sec.attacks.reconstruction.second_layer import next_layer
from fedllm_sec.core import Threat
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.pairs import scaling

BATCH = 2**26  # bytes that a forward pass of many texts takes, about
HELD = 12  # float32 numbers of a state's width that a layer holds of a token at a time, about


class ReachedError(Exception):
    """The forward pass has come to what is looked at; the rest of the model is not run."""

    def __init__(self, states: Tensor):
        self.states = states


@dataclass
class Blocks:
    """Embeddings and the first two layers of a model, in float32, without dropout. Texts are never padded.

    Attributes:
        model: of transformers.
        family: where it keeps what.
        computed: tokens that went through the first layer so far.
    """

    model: Any
    family: Family
    computed: int = 0

    def first(self, ids: Tensor) -> Tensor:
        """(n, L, d) float32: what the first layer reads of (n, L) token ids."""
        return torch.cat([self.reach(self.family, part) for part in torch.split(ids, self.batch(ids.shape[1]))])

    def second(self, ids: Tensor) -> Tensor:
        """(n, L, d) float32: what the second layer reads of (n, L) token ids."""
        self.computed += ids.numel()
        family = next_layer(self.family)
        return torch.cat([self.reach(family, part) for part in torch.split(ids, self.batch(ids.shape[1]))])

    def extended(self, prefixes: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Put each of some tokens (t,) behind each prefix (n, L >= 1) of a causal model: prefixes are computed once.

        Yields:
            Some pairs at a time: which prefix (p,), which token (p,), and what the second layer reads of it (p, d).
        """
        from transformers import DynamicCache

        family, length = next_layer(self.family), prefixes.shape[1]
        pairs = torch.cartesian_prod(torch.arange(len(prefixes)), torch.arange(len(tokens)))
        for rows, columns in (part.unbind(dim=1) for part in torch.split(pairs, self.batch(length + 1))):
            begun, places = torch.unique(rows, return_inverse=True)
            self.computed += len(rows) + len(begun) * length
            how = {"past_key_values": DynamicCache(), "use_cache": True}
            self.reach(family, prefixes[begun], **how)
            how["past_key_values"].batch_select_indices(places)
            yield rows, columns, self.reach(family, tokens[columns, None], **how)[:, -1]

    def batch(self, length: int) -> int:
        """How many texts of so many tokens are computed together."""
        width: int = self.model.config.hidden_size
        return max(1, BATCH // (4 * HELD * width * length))

    def reach(self, family: Family, ids: Tensor, **how: Any) -> Tensor:
        """What the family's readers read."""
        module = next(module for name, module in self.model.named_modules() if family.reads(name))
        hook = module.register_forward_pre_hook(look)
        try:
            with torch.no_grad():
                self.model(input_ids=ids, **how)
        except ReachedError as reached:
            return reached.states
        finally:
            hook.remove()
        raise AssertionError(f"nothing reads as {family.readers}")


def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> NoReturn:
    """A hook that ends the forward pass."""
    raise ReachedError(inputs[0])


def blocks_of(base: Base, threat: Threat, method: str) -> Blocks | None:
    """The blocks as clients received them; None if the base has a single layer. Of its files nothing else is read.

    Args:
        base: the base model.
        threat: its reference, in the space of what is sent, is what they received.
        method: for errors.

    Raises:
        InputError: if transformers cannot load the base, or the reference is for another one, or is an adapter that is
            not known here or of which nobody says how it is scaled.
    """
    model = beginning(base.checkpoint.folder)
    if model is None:
        return None
    receive(model, threat, f"{base.family.blocks}.1.", method)
    return Blocks(model, base.family)


def beginning(folder: Path, layers: int = 2) -> nn.Module | None:
    """Embeddings and first layers of a base, in float32, without dropout; None if it has fewer."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder)
        if config.num_hidden_layers < layers:
            return None
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        with quiet():
            model: nn.Module = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: transformers cannot load it ({(str(error).splitlines() or [''])[0]})") from error
    return model.eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers says nothing of the layers that are left out."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def receive(model: nn.Module, threat: Threat, after: str, method: str) -> None:
    """Give a model what clients received: tensors in place of its own, and s B A added where LoRA is.

    Args:
        model: the first layers of the base.
        threat: its reference is what they received.
        after: names of the layer whose own weights do not matter, because only what it reads is looked at.
        method: for errors.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, str] = {}
    for name in threat.reference.layout.sizes:
        module, lora, _ = name.removeprefix(PREFIX).partition(".lora_")
        ours = own(f"{module}.weight" if lora else module, parameters)
        if ours is not None and not (lora and ours.startswith(after)):
            found[name] = ours
    values = tensors(threat.reference, 0, found)
    for name, ours in found.items():
        weight = parameters[ours]
        if ".lora_" not in name:
            check_shape(values[name], weight, name, method)
            weight.copy_(values[name])
        elif name.endswith(A):
            product = product_of(values, name, threat, method)
            turned = type(model.get_submodule(ours.rpartition(".")[0])).__name__ == "Conv1D"  # GPT-2: (d_in, d_out)
            check_shape(product.T if turned else product, weight, name, method)
            weight.add_(product.T if turned else product)
        elif not name.endswith(B):
            raise InputError(
                f"{method} runs the first layers under the adapter that clients received, and knows LoRA's A and B of "
                f"linear layers only, not {name}; lora_tokens runs no layer"
            )


def own(name: str, parameters: Container[str]) -> str | None:
    """What a tensor is called without the prefix of a head; None if it is none of these."""
    parts = name.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts)))
    return next((ending for ending in endings if ending in parameters), None)


def check_shape(value: Tensor, weight: Tensor, name: str, method: str) -> None:
    """Raise InputError for a tensor of another model."""
    if value.shape != weight.shape:
        raise InputError(
            f"{method}: {name} is for a weight of shape {list(value.shape)}, and that of the base model is "
            f"{list(weight.shape)}: give the base that was trained (Victim.base)"
        )


def product_of(values: Mapping[str, Tensor], name: str, threat: Threat, method: str) -> Tensor:
    """(d_out, d_in) float32, s B A of a factor A's name.

    Raises:
        InputError: if nobody says what s is, and B is not zero.
    """
    a, b = values[name].double(), values[name.removesuffix(A) + B].double()
    assert threat.victim is not None
    if threat.victim.adapter is None and b.any():
        raise InputError(
            f"{method} runs the first layers under the adapter that clients received: give the victim its "
            "adapter_config.json, which says how it is scaled (Victim.adapter)"
        )
    return (scaling(threat.victim.adapter, name, len(a)) * (b @ a)).float()
