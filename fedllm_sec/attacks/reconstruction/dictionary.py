"""Everything that the first layer of a base model can read, one vector a token, walked in blocks from its files.

Shapes: V tokens, P positions, d the model's width. A token's vector is an *atom*. Where positions are added to words,
LayerNorm(w + p + t) = scale * (c(w) + c(p) + c(t)) + bias, with c(x) = gamma * (x - mean(x)) and a scale of the whole:
so tokens, positions, segments and the bias have atoms of their own, V + P + ... in place of V P.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedllm_sec.attacks.reconstruction.families import Family, epsilon, family_of
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json

INDEX = "model.safetensors.index.json"
BLOCK = 2**25  # bytes of one block of atoms in float32


class Checkpoint:
    """The tensors of a base model's folder, read by range; nothing is loaded that is not asked for.

    Raises:
        InputError: if the folder has no safetensors, or they are damaged.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; the base model's is needed, with config.json and safetensors")
        self.folder = folder
        self.config: Mapping[str, Any] = read_json(folder / "config.json")
        if not isinstance(self.config, dict):
            raise InputError(f"{folder / 'config.json'}: is not a model's configuration")
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX)
            names = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise InputError(f"{folder / INDEX}: has no weight_map; is it a whole checkpoint?")
            self.files = {name: folder / file for name, file in names.items()}
        elif (folder / "model.safetensors").is_file():
            with self.opened(folder / "model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), folder / "model.safetensors")
        else:
            raise InputError(f"{folder}: has no model.safetensors; pickled weights are never opened: save safetensors")

    def opened(self, path: Path) -> Any:
        """A safetensors file."""
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: is not a whole safetensors file ({error})") from None

    def name(self, ending: str) -> str | None:
        """The one tensor of that name, whatever the head's prefix; None if there is none."""
        old = ending.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        endings = tuple(f".{each}" for each in dict.fromkeys((ending, old)))  # BERT's own checkpoints have old names
        found = [name for name in self.files if f".{name}".endswith(endings)]
        return min(found, key=len, default=None)

    def read(self, ending: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, float32.

        Raises:
            InputError: if there is no such tensor.
        """
        name = self.name(ending)
        if name is None:
            raise InputError(f"{self.folder}: has no tensor {ending!r}; is it a {self.config.get('model_type')}?")
        with self.opened(self.files[name]) as file:
            values: Tensor = file.get_slice(name)[start:stop]
        return values.float()

    def rows(self, ending: str) -> int:
        """How many rows a tensor has."""
        name = self.name(ending)
        if name is None:
            raise InputError(f"{self.folder}: has no tensor {ending!r}; is it a {self.config.get('model_type')}?")
        with self.opened(self.files[name]) as file:
            return int(file.get_slice(name).get_shape()[0])


@dataclass(frozen=True)
class Dictionary:
    """Atoms: of tokens, of positions, and those that are always there.

    Attributes:
        source: gives (b, d) float32 atoms of the tokens from one id up to another.
        size: V.
        width: d.
        positions: (P, d) float64, none where they are not added.
        constants: (c, d) float64: what every input holds, such as the norm's bias.
        memory: bytes; tokens' atoms are kept if they take no more than half of it.
        causal: whether nobody reads a text's last token.
    """

    source: Callable[[int, int], Tensor]
    size: int
    width: int
    positions: Tensor
    constants: Tensor
    memory: int
    causal: bool

    @property
    def fits(self) -> bool:
        """Whether all atoms of tokens may be kept, twice: as they are and in other units."""
        return 8 * self.size * self.width <= self.memory

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first id, (b, d) float32 atoms), all tokens once."""
        if self.fits:
            yield 0, self.kept
            return
        yield from self.walk()

    def walk(self) -> Iterator[tuple[int, Tensor]]:
        """The same, always from the files."""
        step = max(1, min(BLOCK, self.memory) // (4 * self.width))
        for start in range(0, self.size, step):
            yield start, self.source(start, min(start + step, self.size))

    @cached_property
    def kept(self) -> Tensor:
        """(V, d) float32, all atoms of tokens."""
        return torch.cat([block for _, block in self.walk()])

    def times(self, matrix: Tensor) -> Tensor:
        """(V, m) float32 products of the tokens' atoms with the columns of a (d, m) matrix; one walk."""
        columns = matrix.float()
        return torch.cat([block @ columns for _, block in self.blocks()])

    @cached_property
    def squares(self) -> Tensor:
        """(V,) float64 squared lengths of the tokens' atoms; one walk."""
        return torch.cat([block.double().square().sum(dim=1) for _, block in self.blocks()])

    def atom(self, token: int) -> Tensor:
        """(d,) float64."""
        if self.fits:
            return self.kept[token].double()
        return self.source(token, token + 1)[0].double()

    def atoms(self, tokens: list[int]) -> Tensor:
        """(m, d) float64."""
        return (
            torch.stack([self.atom(token) for token in tokens]) if tokens else self.constants.new_zeros(0, self.width)
        )

    @cached_property
    def spread(self) -> Tensor:
        """(d,) float64: how large the tokens' atoms are in each coordinate, as a root of the mean square; one walk."""
        total = sum((block.double().square().sum(dim=0) for _, block in self.walk()), self.constants.new_zeros(1))
        return (total / self.size).sqrt().clamp(min=1e-12)

    def scaled(self, factors: Tensor) -> "Dictionary":
        """The same with each coordinate multiplied by a factor of its own, (d,)."""
        narrow = factors.float()
        return replace(
            self,
            source=lambda start, stop: self.source(start, stop) * narrow,
            positions=self.positions * factors,
            constants=self.constants * factors,
        )

    def through(self, matrix: Tensor) -> "Dictionary":
        """What an (r, d) matrix makes of every atom: r numbers each."""
        narrow = matrix.float().T
        return replace(
            self,
            source=lambda start, stop: self.source(start, stop) @ narrow,
            width=len(matrix),
            positions=self.positions @ matrix.double().T,
            constants=self.constants @ matrix.double().T,
        )


def dictionary(checkpoint: Checkpoint, memory: int) -> Dictionary:
    """The dictionary of a base model.

    Args:
        checkpoint: of the base; of each table only what is asked for is read.
        memory: bytes, see `Dictionary`.

    Raises:
        InputError: for an unknown architecture, or a tensor that is missing.
    """
    family = family_of(checkpoint.config, checkpoint.folder)
    weight = checkpoint.read(f"{family.norm}.weight") + family.shift
    bias = checkpoint.read(f"{family.norm}.bias") if family.kind == "layer" else torch.zeros_like(weight)
    added = family.positions is not None

    def atoms(start: int, stop: int) -> Tensor:
        words = checkpoint.read(family.words, start, stop) * (len(weight) ** 0.5 if family.grown else 1.0)
        return centred(words, weight) if added else normed(words, weight, bias, family, checkpoint.config)

    tables = [centred(checkpoint.read(name), weight) for name in (family.positions, family.types) if name]
    return Dictionary(
        source=atoms,
        size=checkpoint.rows(family.words),
        width=len(weight),
        positions=tables[0][family.skipped :].double() if added else weight.new_zeros(0, len(weight)).double(),
        constants=torch.cat([bias[None], *tables[1:]]).double() if added else weight.new_zeros(0, len(weight)).double(),
        memory=memory,
        causal=family.causal,
    )


def centred(table: Tensor, weight: Tensor) -> Tensor:
    """gamma * (x - mean(x)) of every row."""
    return (table - table.mean(dim=1, keepdim=True)) * weight


def normed(table: Tensor, weight: Tensor, bias: Tensor, family: Family, config: Mapping[str, Any]) -> Tensor:
    """LayerNorm or RMSNorm of every row."""
    eps = epsilon(family, config)
    if family.kind == "layer":
        return torch.nn.functional.layer_norm(table, weight.shape, weight, bias, eps)
    return table * torch.rsqrt(table.square().mean(dim=1, keepdim=True) + eps) * weight
