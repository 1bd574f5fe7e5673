"""What a client's update tells of the words of its batch, by attacks that know its defense."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fedllm_sec import Round, Threat, UpdateSet, attack, stack_updates
from fedllm_sec.attacks.reconstruction.dictionary import Checkpoint, Dictionary, dictionary
from fedllm_sec.attacks.reconstruction.judge import judge_text
from fedllm_sec.attacks.reconstruction.revealed import FoundToken, RevealedText
from fedllm_sec.victim import Victim
from leakage.clients import LAYERS, Learner, Text, learner, sent, whole
from leakage.masked import masked_pursuit
from leakage.rows import Row

MEMORY = 2**28


class Leak(NamedTuple):
    """How much one update told.

    Attributes:
        recall: of the distinct tokens.
        precision: of those named.
        certificate: of the attack, which has no truth.
        certain: whether it vouches for them.
        tokens: distinct ones.
        way: how the update was read.
        seconds: of all ways together.
    """

    recall: float
    precision: float
    certificate: float
    certain: bool
    tokens: int
    way: str
    seconds: float


@dataclass(frozen=True)
class Setting:
    """One attacked update.

    Attributes:
        optimizer: `sgd` or `adamw`.
        rate: its learning rate.
        rank: of the adapter.
        seed: of the adapter, of dropout and of noise.
        batch: the sentences.
    """

    optimizer: str
    rate: float
    rank: int
    seed: int
    batch: Sequence[Text]


def leak(base: Path, row: Row, setting: Setting) -> Leak:
    """Train one client, and read what it sent in all ways that there are: what the best of them tells.

    The best has the highest F1, which is known only with the truth: that favours the attacker.
    """
    client = learner(base, row, setting.rank, setting.seed)
    received = client.state()
    steps = row.steps if setting.optimizer == "sgd" else row.adamw_steps
    client.train([setting.batch] * steps, setting.optimizer, setting.rate)
    update = sent(row, client.state(), received, "client_0", Round(seed=setting.seed))
    known = Victim(
        learning_rate=setting.rate,
        steps=steps,
        batch_size=len(setting.batch),
        optimizer="sgd" if setting.optimizer == "sgd" else "adamw",
        base=base,
        adapter={"r": setting.rank, "lora_alpha": 2 * setting.rank, "target_modules": LAYERS},
    )
    threat = Threat(Round(seed=setting.seed), (), (0,), stack_updates([received], [1.0]), "all", 1, victim=known)
    texts = tokens_of(client, setting.batch)
    distinct = {token for text in texts for token in text}
    longest = max(map(len, texts))
    every = list(ways(row, update, threat, longest, len(distinct)))
    measured = [judge_text(found, texts) for _, found in every]
    scores = [f1(each["token_recall"], each["token_precision"]) for each in measured]
    best = scores.index(max(scores))
    way, found = every[best]
    return Leak(
        measured[best]["token_recall"],
        measured[best]["token_precision"],
        found.certificate,
        found.certain,
        len(distinct),
        way,
        sum(found.seconds for _, found in every),
    )


def f1(recall: float, precision: float) -> float:
    """Their harmonic mean."""
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


def tokens_of(client: Learner, batch: Sequence[Text]) -> list[list[int]]:
    """The ids of each text."""
    ids: list[list[int]] = client.tokenizer([text.sentence for text in batch])["input_ids"]
    return ids


def ways(row: Row, update: UpdateSet, threat: Threat, longest: int, tokens: int) -> Iterator[tuple[str, RevealedText]]:
    """`lora_tokens` as it is; and, where coordinates were dropped, by one who takes them for unknown."""
    method = attack.build("lora_tokens", {})
    assert method.reconstruct_data is not None
    yield "lora_tokens", method.reconstruct_data(update, threat)[0]
    if row.share < 1:
        yield "masked pursuit", masked(update, threat, longest, tokens)


def masked(update: UpdateSet, threat: Threat, longest: int, tokens: int) -> RevealedText:
    """What the attacker finds that knows how many tokens there are, and how long the longest text is."""
    began = time.perf_counter()
    assert threat.victim is not None
    assert threat.victim.base is not None
    atoms = even(dictionary(Checkpoint(threat.victim.base), MEMORY))
    rows = torch.cat(first_layer(update))
    found = masked_pursuit(rows / atoms_spread(threat.victim.base), atoms, longest, tokens)
    named = tuple(FoundToken(token, 0.0, 0.0) for token in found.tokens)
    seconds = time.perf_counter() - began
    return RevealedText("client_0", "masked pursuit", found.explained, False, "", seconds, named, (), len(rows))


def atoms_spread(base: Path) -> torch.Tensor:
    """(d,) float64: what is usual for each coordinate."""
    return dictionary(Checkpoint(base), MEMORY).spread


def even(atoms: Dictionary) -> Dictionary:
    """Atoms in units of what is usual for each coordinate."""
    return atoms.scaled(1 / atoms.spread)


def first_layer(update: UpdateSet) -> list[torch.Tensor]:
    """The factors A of the first layer, (r, d) float64."""
    shapes = dict(update.layout.shapes)
    return [
        value.reshape(shapes[name]).double()
        for name, value in whole(update).items()
        if "encoder.layer.0." in name and "lora_A" in name
    ]
