"""What of an update was made from a language model's first inputs, and how it is to be read.

With y = W x + s B A x and the loss's gradients G at y over all tokens X (n, d): dA = s Bᵀ Gᵀ X and dW = Gᵀ X are
combinations of inputs, row by row; dB = s Gᵀ X Aᵀ is one of what A makes of them, r numbers each. A tells nothing as
long as B is zero (one step from a fresh adapter), and where it is frozen (FFA-LoRA); then B is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.adam import Adam
from fedllm_sec.attacks.reconstruction.dictionary import Dictionary
from fedllm_sec.attacks.reconstruction.families import Family
from fedllm_sec.attacks.reconstruction.gradients import received_weights, tensors
from fedllm_sec.attacks.reconstruction.lenses import ROUNDING, Exact, first_step
from fedllm_sec.core import Threat
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

OUTLYING = 8.0  # times the median of a row, of which normal values have none in 10^7
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class Module(NamedTuple):
    """A module of the first layer.

    Attributes:
        name: without PEFT's prefix.
        change: (k, d) float64, what training changed; rows are combinations of inputs.
        received: (k, d) float64, what it was before.
    """

    name: str
    change: Tensor
    received: Tensor


@dataclass(frozen=True)
class Sent:
    """One client's update as it was sent, in the space of factors, and what it started from.

    Attributes:
        rows: the updates.
        row: whose.
        threat: what is known.
    """

    rows: UpdateSet
    row: int
    threat: Threat

    def values(self, names: Sequence[str], method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Changes and received values of some tensors, whole, float64; nothing else is read."""
        changes = tensors(self.rows, self.row, names)
        known = received_weights(self.threat, self.rows, names, method)
        return widened(changes), widened(known)


def widened(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64."""
    return {name: value.double() for name, value in values.items()}


def readers(updates: UpdateSet, family: Family, endings: Sequence[str]) -> dict[str, dict[str, str]]:
    """The modules that read the first layer's input, and the tensors of each by the ending of their names."""
    found: dict[str, dict[str, str]] = {}
    for name in updates.layout.sizes:
        for ending in endings:
            module = name.removesuffix(ending).removeprefix(PREFIX)
            if name.endswith(ending) and family.reads(module):
                found.setdefault(module, {})[ending] = name
    return found


def from_a(sent: Sent, family: Family, method: str) -> list[Module]:
    """The factors A of the first layer's readers; none that did not change."""
    found = [parts[A] for parts in readers(sent.rows, family, [A]).values()]
    shapes = dict(sent.rows.layout.shapes)
    if odd := [name for name in found if len(shapes[name]) != 2 or not all(shapes[name])]:
        raise InputError(f"{method}: {odd[0]} has the shape {list(shapes[odd[0]])}; a factor A is (r, d)")
    changes, known = sent.values(found, method)
    return [Module(name, changes[name], known[name]) for name in found if changes[name].any()]


def from_weights(sent: Sent, family: Family, width: int, method: str) -> list[Module]:
    """The first layer's readers themselves, where they were trained whole."""
    found = [parts[".weight"] for parts in readers(sent.rows, family, [".weight"]).values()]
    changes, known = sent.values(found, method)
    turned = [name for name in found if changes[name].shape[1] != width]  # GPT-2's are (d_in, d_out)
    for name in turned:
        changes[name], known[name] = changes[name].T, known[name].T
    return [Module(name, changes[name], known[name]) for name in found if changes[name].any()]


def from_b(sent: Sent, family: Family, method: str) -> list[tuple[Module, Tensor]]:
    """The factors B of the first layer's readers, each with the A (r, d) through which it reads.

    Raises:
        InputError: if an A that did not change is not there either.
    """
    parts = readers(sent.rows, family, [A, B])
    changes, known = sent.values([part[B] for part in parts.values() if B in part], method)
    moved = {module: part for module, part in parts.items() if B in part and changes[part[B]].any()}
    if lacking := [module for module, part in moved.items() if A not in part]:
        raise InputError(f"{method}: the update has no A of {lacking[0]}; what B changed can be read beside it only")
    matrices = sent.values([part[A] for part in moved.values()], method)[1]
    return [(Module(m, changes[part[B]], known[part[B]]), matrices[part[A]]) for m, part in moved.items()]


def readings(modules: Sequence[Module], atoms: Dictionary, victim: Victim) -> Iterator[tuple[Exact | Adam, Dictionary]]:
    """How rows can be read, the likeliest first, each with the atoms in its units: to be tried until one explains all.

    In units of what is usual for each coordinate atoms lie less near to one another, as a rule: a few coordinates of
    a language model's embeddings outweigh all the others. Not in every model, so that they are also read as they are.
    """
    changes, known = [module.change for module in modules], [module.received for module in modules]
    even, spread = atoms.scaled(1 / atoms.spread), atoms.spread
    if victim.optimizer == "sgd":
        decays = victim.weight_decay > 0
        yield exact(changes, known, spread, decay=decays), even
        yield Exact(changes, known, decay=decays), atoms
        yield exact(changes, known, spread, decay=not decays), even  # nobody told of it, or it was told wrongly
        return
    if victim.optimizer == "adamw":  # decoupled: it is known, and by far too small to be found in signs
        kept = (1 - victim.learning_rate * victim.weight_decay) ** victim.steps
        changes = [change + (1 - kept) * base for change, base in zip(changes, known, strict=True)]
    if victim.steps > 1:
        noise = torch.cat([unit(base) for base in known]) * (victim.steps / 12) ** 0.5  # even within a unit, each step
        yield Adam(torch.cat(changes), spread, victim.learning_rate * victim.steps, victim.steps, noise), even
        return
    rate = victim.learning_rate
    rows = [held(first_step(each, base, rate), spread) for each, base in zip(changes, known, strict=True)]
    noise = max(float(ROUNDING * base.abs().mean() / rate) for base in known)
    yield exact(rows, known, spread, noise=noise), even
    yield Exact(rows, known, noise=noise), atoms


def unit(values: Tensor) -> Tensor:
    """float64: the unit in the last place of each value, as a float32."""
    exponent = torch.frexp(values.abs().clamp(min=torch.finfo(torch.float32).tiny))[1]
    return torch.ldexp(torch.ones_like(values), exponent - 24)


def held(rows: Tensor, spread: Tensor) -> Tensor:
    """Rows without values that no gradient has, such as a learning rate that is a little off makes: they hide all."""
    usual = rows / spread
    most = OUTLYING * usual.abs().median(dim=1, keepdim=True).values
    return usual.clamp(-most, most) * spread


def exact(rows: Sequence[Tensor], known: Sequence[Tensor], spread: Tensor, **how: Any) -> Exact:
    """Rows in units of what is usual for each coordinate."""
    return Exact([each / spread for each in rows], [each / spread for each in known], **how)


def bag_of(modules: Sequence[Module], atoms: Dictionary) -> str:
    """What is read, in a line."""
    ranks = sum(len(module.change) for module in modules)
    return f"{len(modules)} module{'s' * (len(modules) > 1)} of the first layer, {ranks} rows of {atoms.width}"
