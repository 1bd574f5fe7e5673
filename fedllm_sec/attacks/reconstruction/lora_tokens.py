"""The words of a training batch from what a low-rank adapter update changed in the first layer."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from fedllm_sec.attacks.reconstruction.adam import Adam
from fedllm_sec.attacks.reconstruction.dictionary import Checkpoint, Dictionary, dictionary
from fedllm_sec.attacks.reconstruction.embeddings import changed, may_be_tied
from fedllm_sec.attacks.reconstruction.families import Family, family_of
from fedllm_sec.attacks.reconstruction.gradients import victim_of
from fedllm_sec.attacks.reconstruction.likeliest import Likeliest
from fedllm_sec.attacks.reconstruction.pairs import pairs
from fedllm_sec.attacks.reconstruction.pursuit import Pursuit
from fedllm_sec.attacks.reconstruction.reading import (
    A,
    B,
    Module,
    Sent,
    bag_of,
    from_a,
    from_b,
    from_weights,
    readers,
    readings,
)
from fedllm_sec.attacks.reconstruction.revealed import FoundToken, RevealedText
from fedllm_sec.attacks.reconstruction.search import Pick
from fedllm_sec.attacks.reconstruction.second_layer import Check, check
from fedllm_sec.core import Attack, Threat
from fedllm_sec.registry import attack
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

Length = Annotated[int, Field(ge=1)]
FINE = 1e-3  # of a row: with more noise than this in all of them a token may have been lost in it
ALL = 1e-4  # of the pairs at most may have passed by chance
TRUSTED = 0.5  # of the pairs at least, or none are


@attack("lora_tokens", paper="this project; Davies and Eldar 2012, arXiv:1004.4529 (pursuit); DAGER, arXiv:2405.15586")
def lora_tokens(*, length: Length | None = None) -> Attack:
    """Recover the distinct tokens of a client's texts from the first layer of its adapter, at any rank.

    What the first layer reads is frozen under LoRA, so every row by which training changed A (or a weight) is a
    combination of the atoms of the tokens seen: a sparse one, which a rank-aware pursuit finds though the rank be far
    below the number of tokens. Weight decay is found by least squares. One step of Adam is inverted by its epsilon,
    several on the same data by an expectation-maximisation (`lenses`). Where A did not change, B is read: it tells as
    long as fewer inputs than the rank were read; where positions are added, by a check of every token at every position
    (`pairs`). Where the embeddings were trained, the rows that changed are read.

    The order of tokens is told of a single text to which positions are added (`order`), at any rank, and else not (see
    `span`). A causal model's last token of each text is read by nobody.

    Certificate: the share of the rows that the tokens account for, less what as many vectors would by chance. Certain:
    nothing is left but a rounding of less than 1e-3, there are fewer atoms than half of the width and the rank, and no
    other token lies in their span: then no other set of so few tokens explains the update. A token without a gradient
    leaves no trace, such as the first one of a causal model where only queries are trained.

    Args:
        length: of the longest text, in tokens, where it is known and the model adds positions; default: it is found.
    """

    def reconstruct_data(visible: UpdateSet, threat: Threat) -> list[RevealedText]:
        base = base_of(threat, "lora_tokens")
        sent = as_sent(visible, threat)
        return [bag(sent, row, base, length) for row in range(len(visible))]

    return Attack(reconstruct_data=reconstruct_data)


@dataclass(frozen=True)
class Base:
    """A base model, as far as it is read.

    Attributes:
        checkpoint: its files.
        family: where its first layer reads what.
        atoms: all that it can read.
        victim: how clients trained on it.
    """

    checkpoint: Checkpoint
    family: Family
    atoms: Dictionary
    victim: Victim


class Found(NamedTuple):
    """What a search gave.

    Attributes:
        picks: the surest first.
        explained: the share of the rows.
        atoms: vectors that were needed for it, those of positions among them.
        rank: of what is read.
        width: of it.
        source: what was read, in a line.
        length: positions found.
        is_whole: whether nothing but rounding is left of rows that are known.
        ambiguous: whether another token is as good as one of these.
        text: the whole text in its order, where it is a single one and positions are added.
    """

    picks: Sequence[Pick]
    explained: float
    atoms: int
    rank: int
    width: int
    source: str
    length: int
    is_whole: bool = False
    ambiguous: bool = False
    text: tuple[int, ...] | None = None

    @property
    def is_unique(self) -> bool:
        """Whether no other set of so few atoms can explain as much; one dimension of the width is the norm's mean."""
        return not self.ambiguous and 2 * self.atoms < self.width - 1 + self.rank


def base_of(threat: Threat, method: str) -> Base:
    """The base model of the threat's victim.

    Raises:
        InputError: if none is named, or it cannot be read.
    """
    victim = victim_of(threat, method)
    if victim.base is None:
        raise InputError(
            f"{method} reads the first layer of a language model: give the victim its folder (Victim.base)"
        )
    checkpoint = Checkpoint(Path(victim.base))
    family = family_of(checkpoint.config, checkpoint.folder)
    return Base(checkpoint, family, dictionary(checkpoint, threat.reference.budget.memory), victim)


def as_sent(visible: UpdateSet, threat: Threat) -> Sent:
    """The rows in the space of factors, beside what the clients received."""
    rows, reference = threat.as_sent(visible), threat.reference
    if reference.layout.pairs:
        assert threat.received is not None
        reference = threat.received(threat.round.index)
    return Sent(rows, 0, replace(threat, reference=reference))


def bag(sent: Sent, row: int, base: Base, length: int | None) -> RevealedText:
    """What one client's update reveals."""
    began = time.perf_counter()
    here = Sent(sent.rows, row, sent.threat)
    found = trained_rows(here, base) or searched(here, base, length)
    whole, lone = found.is_whole, found.is_unique
    left = "nothing is left but rounding" if whole else f"{1 - found.explained:.0%} of it is not accounted for"
    only = "" if lone else "; other sets as large might explain as much"
    return RevealedText(
        client=sent.rows.clients[row],
        method="lora_tokens",
        certificate=found.explained,
        certain=whole and lone and bool(found.picks),
        why=f"{found.source}: {left}{only}" if found.picks else f"{found.source}: nothing stands out",
        seconds=time.perf_counter() - began,
        tokens=tuple(tokens_of(found.picks)),
        sentences=() if found.text is None else (found.text,),
        rank=found.rank,
        sentence_scores=() if found.text is None else (found.explained,),
    )


def tokens_of(picks: Sequence[Pick]) -> Iterator[FoundToken]:
    """With weights relative to the heaviest."""
    most = max((pick.weight for pick in picks), default=1.0)
    for pick in picks:
        yield FoundToken(pick.token, min(pick.score, 1.0), pick.weight / most)


def searched(sent: Sent, base: Base, length: int | None) -> Found:
    """Read A or the weights; where those did not change, B.

    Raises:
        InputError: if the update has nothing of the first layer's readers.
    """
    modules = from_a(sent, base.family, "lora_tokens") + from_weights(
        sent, base.family, base.atoms.width, "lora_tokens"
    )
    if wrong := [module for module in modules if module.change.shape[1] != base.atoms.width]:
        raise InputError(
            f"lora_tokens: {wrong[0].name} reads {wrong[0].change.shape[1]} numbers, and the base model "
            f"{base.victim.base} has {base.atoms.width}: give the base that was trained (Victim.base)"
        )
    if modules:
        return best_reading(modules, base.atoms, base.victim, length)
    through = from_b(sent, base.family, "lora_tokens")
    if through:
        found = checked(sent, base)
        if not any(each.is_whole for each in found):
            tries = [best_reading([m], base.atoms.through(matrix), base.victim, length) for m, matrix in through]
            found += [each._replace(source="A did not change; B of the first layer") for each in tries]
        return together(found)
    if not readers(sent.rows, base.family, [A, B, ".weight"]):
        raise InputError(
            f"lora_tokens: {sent.rows.clients[sent.row]} trains nothing that reads the first layer's input "
            f"({base.family.readers}); only that tells tokens"
        )
    return Found((), 0.0, 0, 0, base.atoms.width, "the first layer's readers did not change", 0)


def checked(sent: Sent, base: Base) -> list[Found]:
    """The tokens of the pairs that pass the check of each B; none where positions are not added, or it is blind."""
    if base.family.positions is None or (base.victim.optimizer != "sgd" and base.victim.steps > 1):
        return []
    every = check(sent, base.family, base.atoms.width, "lora_tokens")
    found = []
    for space in every.spaces if every else ():
        one = Check((space,))
        if not one.is_telling:
            continue
        read = pairs(one, base.checkpoint, base.family, base.atoms.memory)
        if read.trusted < TRUSTED:
            continue
        nearest = {pair.token: pair.distance for pair in reversed(read.pairs)}
        picks = [Pick(token, 1 - far**2, 1.0) for token, far in sorted(nearest.items(), key=lambda each: each[1])]
        count, width = len(read.pairs), len(space.basis)
        source = f"A did not change; B of {count} inputs"
        found.append(Found(picks, read.trusted, count, one.rank, width, source, 0, read.trusted > 1 - ALL))
    return found


def together(found: Sequence[Found]) -> Found:
    """What several modules tell, each by itself: all of those of which nothing is left, or the best.

    Not all tokens reach all modules: a query of a causal model's first token has no gradient. It is certain that one
    module saw all only if no other one saw more.
    """
    whole = [each for each in found if each.is_whole]
    if not whole:
        return max(found, key=lambda each: each.explained)
    most = max(whole, key=lambda each: each.rank)
    scores: dict[int, Pick] = {}
    for pick in (pick for each in whole for pick in each.picks):
        scores[pick.token] = max(scores.get(pick.token, pick), pick, key=lambda each: each.score)
    apart = len(scores) > len(most.picks)
    picks = sorted(scores.values(), key=lambda pick: pick.score, reverse=True)
    return most._replace(picks=picks, ambiguous=most.ambiguous or apart)


def best_reading(modules: Sequence[Module], atoms: Dictionary, victim: Victim, length: int | None) -> Found:
    """Try the ways to read the rows until one leaves nothing, or take the one that leaves least."""
    best: Found | None = None
    for lens, units in readings(modules, atoms, victim):
        start = length or 0
        search = Likeliest(lens, units, start) if isinstance(lens, Adam) else Pursuit(lens, units, start)
        picks = search.run()
        used, source = search.basis.shape[1], bag_of(modules, atoms)
        found = Found(picks, search.explained, used, lens.rank, atoms.width, source, search.length)
        if isinstance(search, Pursuit) and search.is_whole:
            blurred = float(search.lens.noise.min()) > FINE or search.is_ambiguous
            found = found._replace(is_whole=True, ambiguous=blurred, text=search.text())
        best = max(best or found, found, key=lambda each: (each.is_whole, each.explained))
        if found.is_whole:
            break
    assert best is not None
    return best


def trained_rows(sent: Sent, base: Base) -> Found | None:
    """The tokens whose embeddings changed; None where they were not trained, or a head that is tied to them was."""
    named = [name for name in sent.rows.layout.sizes if name.endswith(f".{base.family.words}")]
    if not named or may_be_tied(sent, base.checkpoint, base.victim):
        return None
    energy = changed(sent, named[0], base.atoms.width, base.victim)
    touched = energy.nonzero().flatten().tolist()
    if not touched or 2 * len(touched) > base.atoms.size:
        return None
    picks = [Pick(token, 1.0, float(energy[token]) ** 0.5) for token in touched]
    picks.sort(key=lambda pick: pick.weight, reverse=True)
    source = "rows of the trained embeddings that changed"
    return Found(picks, 1.0, 0, len(touched), base.atoms.width, source, 0, is_whole=True)
