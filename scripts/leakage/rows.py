"""The rows of the table: what a client does, and what it does to its update before it sends it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedllm_sec import Round, UpdateSet
from fedllm_sec.defenses.upload import TopK, Unit, UpdateNoise

Send = Callable[[UpdateSet, Round], UpdateSet]


def as_it_is(updates: UpdateSet, round: Round) -> UpdateSet:
    """No defense."""
    return updates


def rounded(updates: UpdateSet, round: Round) -> UpdateSet:
    """The update in bfloat16."""
    return updates.map(lambda block, span: block.bfloat16().to(block.dtype))


@dataclass(frozen=True)
class Row:
    """One defense.

    Attributes:
        name: for `--only`.
        label: for people.
        send: what is done to an update before it is sent.
        share: of the coordinates that is sent, where the attacker is to know that the others are no zeros.
        freeze_a: FFA-LoRA.
        rate: times the federation's learning rate, where a defense asks for another.
        lora_dropout: LoRA's own.
        dropout: the base's, of hidden states and of attention.
        fresh: whether the adapter that is attacked is a fresh one, with B = 0.
        steps: of SGD in the update that is attacked.
        adamw_steps: of AdamW in that which is attacked beside it.
        alone: whether an update of one sentence at a high rank is attacked too, which B alone can tell.
        first_steps: local steps in the first round of the federation; None: as many as in the others.
    """

    name: str
    label: str
    send: Send = as_it_is
    share: float = 1.0
    freeze_a: bool = False
    rate: float = 1.0
    lora_dropout: float = 0.0
    dropout: float = 0.0
    fresh: bool = False
    steps: int = 1
    adamw_steps: int = 4
    alone: bool = False
    first_steps: int | None = None


def noise(scale: float, unit: Unit) -> Row:
    """Noise of a multiple of a root mean square."""
    of = {"update": "the update's rms", "tensor": "each tensor's rms", "weights": "1"}[unit]
    return Row(f"noise_{unit}_{scale:g}", f"noise of {scale:g} x {of}", UpdateNoise(scale, unit).sent)


def largest(share: float) -> Row:
    """Only the largest coordinates."""
    return Row(f"top_{share:g}", f"top-k, {share:.0%} sent", TopK(share).sent, share=share)


ROWS = (
    Row("plain", "none", alone=True),
    Row("ffa", "FFA-LoRA (A frozen)", freeze_a=True, alone=True),
    Row("ffa_fast", "FFA-LoRA, three times the learning rate", freeze_a=True, rate=3.0),
    *(noise(scale, unit) for unit in ("update", "tensor") for scale in (0.1, 0.3, 1.0, 3.0)),
    *(largest(share) for share in (0.5, 0.1, 0.01)),
    Row("lora_dropout", "LoRA dropout 0.1", lora_dropout=0.1),
    Row("dropout", "the base's dropout 0.1", dropout=0.1),
    Row("bf16", "update rounded to bfloat16", rounded),
    Row("fresh_1", "fresh adapter, one local step", fresh=True, adamw_steps=1, alone=True, first_steps=1),
    Row("fresh_5", "fresh adapter, five local steps", fresh=True, steps=5),
)


def generator(*names: object) -> torch.Generator:
    """Named randomness for what is no round's."""
    return Round().generator("measure_leakage", *names)
