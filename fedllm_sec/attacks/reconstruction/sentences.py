"""Whole sentences of a client's batch, in their order, from what training changed in the first two layers."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedllm_sec.attacks.reconstruction.blocks import Blocks, blocks_of
from fedllm_sec.attacks.reconstruction.families import Family
from fedllm_sec.attacks.reconstruction.lora_tokens import Base, as_sent, bag, base_of
from fedllm_sec.attacks.reconstruction.prefixes import Prefixes
from fedllm_sec.attacks.reconstruction.progress import progress
from fedllm_sec.attacks.reconstruction.reading import Sent
from fedllm_sec.attacks.reconstruction.revealed import RevealedText
from fedllm_sec.attacks.reconstruction.second_layer import Check, check, next_layer
from fedllm_sec.attacks.reconstruction.whole_texts import WholeTexts, candidates
from fedllm_sec.core import Attack, Threat
from fedllm_sec.registry import attack
from fedllm_sec.updates.update_set import UpdateSet

Budget = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = tuple[int, ...]
METHOD = "span"


@attack(METHOD, paper="Petrov et al. 2024, arXiv:2405.15586 (DAGER)")
def span(*, budget: Budget = 2**21, tolerance: Share = 0.0) -> Attack:
    """Recover the sentences of a client's batch, exactly, where the rank of its update allows.

    DAGER: what training changed in the readers of a layer (LoRA's A, or the weights) has rows that are combinations of
    what the layer read. Where there are more rows than tokens, the rows span the space of all that was read, and so any
    guess can be checked. The first layer tells the bag of tokens, as in `lora_tokens`. The second one tells the order,
    for the hidden states that it reads depend on it: those of the right text lie in the space, and no others. Of a
    causal model sentences are grown token by token (`prefixes`), of an encoder looked for as a whole (`whole_texts`).

    Needs the base model, the adapter's configuration, SGD (or a single step of Adam, which tells less), and training
    without dropout. The bag alone is returned where the second layer was not trained or its rank is too low. The last
    token of a causal model's text is read by nobody: sentences end before it, and one that is the beginning of another
    is not seen. Texts of an encoder are single segments.

    Departs from the paper: singular values and distances are judged by the noise of rounding and not by fixed numbers
    (`second_layer`); the bag needs no full rank; an encoder's texts are found by Gauss-Newton descents on the distance
    and not by trying combinations; and adapters, weight decay and several local steps are reckoned with.

    Certificate: of the directions of the second layer's space the share that the sentences account for, times what the
    bag's certificate is. Where states drifted, in several local steps, it is the share of the bag that is in sentences.
    The bag's own where only the bag can be told. Certain: the bag is, it is all in sentences, one step was made, and
    the sentences have as many different states as the space has directions, all accounted for.

    Args:
        budget: tokens that may go through the first layer, for each client; the search ends then with what it has.
        tolerance: of a hidden state and of a gradient, relative: by how much what clients computed may differ from
            float32. bfloat16: 0.004.
    """

    def reconstruct_data(visible: UpdateSet, threat: Threat) -> list[RevealedText]:
        base, sent = base_of(threat, METHOD), as_sent(visible, threat)
        blocks = blocks_of(base, sent.threat, METHOD)
        return [sentences(replace(sent, row=row), base, blocks, budget, tolerance) for row in range(len(visible))]

    return Attack(reconstruct_data=reconstruct_data)


class Searched(NamedTuple):
    """What a search gave.

    Attributes:
        texts: those that passed, and how far the farthest of their states is from the space, relative.
        states: N of (D,), all that are told apart.
        stopped: why it ended before its end, or nothing.
    """

    texts: Mapping[Text, float]
    states: Sequence[Tensor]
    stopped: str


class Search(NamedTuple):
    """What a search is given.

    Attributes:
        sent: the update.
        base: the base model.
        blocks: compute what its layers read.
        second: tells which states the second one read.
        bag: (t,) the tokens that there are, in order.
        budget: tokens that may go through the first layer.
        tolerance: see `span`.
        tick: is called for each state that is found.
    """

    sent: Sent
    base: Base
    blocks: Blocks
    second: Check
    bag: Tensor
    budget: int
    tolerance: float
    tick: Callable[[], None]

    @property
    def generator(self) -> torch.Generator:
        """Of this client's own."""
        return self.sent.threat.generator(METHOD, self.sent.rows.clients[self.sent.row])


def sentences(sent: Sent, base: Base, blocks: Blocks | None, budget: int, tolerance: float) -> RevealedText:
    """What one client's update reveals."""
    began = time.perf_counter()
    second = check(
        sent, next_layer(base.family), base.atoms.width, METHOD, tolerance=tolerance, drifts=base.victim.steps > 1
    )
    words = replace(bag(sent, sent.row, base, None), method=METHOD)
    missing = lacking(second, words, base, blocks)
    if blocks is None or second is None or missing:
        return replace(words, why=f"{words.why}; no sentences: {missing}", seconds=time.perf_counter() - began)
    tokens = torch.tensor(sorted(token.id for token in words.tokens))
    with progress(f"{METHOD}: {words.client}", second.rank) as tick:
        search = Search(sent, base, replace(blocks, computed=0), second, tokens, budget, tolerance, tick)
        found = prefixes_of(search) if base.family.causal else whole_texts_of(search)
    return replace(told(words, found, second), seconds=time.perf_counter() - began)


def lacking(second: Check | None, words: RevealedText, base: Base, blocks: Blocks | None) -> str:
    """Why there can be no sentences, or nothing."""
    if blocks is None:
        return "the base has a single layer, and it is the second one that tells the order of tokens"
    if base.victim.optimizer != "sgd" and base.victim.steps > 1:
        return f"several steps of {base.victim.optimizer} do not leave the space of what was read"
    if second is None:
        return "the second layer's readers were not trained, or did not change"
    if not second.rank:
        return "what the second layer's readers changed by is no more than rounding"
    if not second.is_telling:
        space = second.spaces[0]
        return (
            f"the {space.rows} rows of {len(space.basis)} of the second layer have the rank {space.rank}, and may be "
            "of more states than they tell of (a LoRA rank above the number of tokens tells, and so do whole weights)"
        )
    return "" if words.tokens else "there are no tokens to make them of"


def prefixes_of(search: Search) -> Searched:
    """Sentences of a causal model."""
    longest = getattr(search.blocks.model.config, "max_position_embeddings", search.budget)
    given = (search.blocks, search.second, search.bag, search.budget, longest, search.tick, search.generator)
    grown = Prefixes(*given)
    grown.run()
    farthest = {text: max(each.distance for each in grown.along(text)) for text in grown.texts()}
    return Searched(farthest, [each.state for each in grown.told().values()], grown.stopped)


def whole_texts_of(search: Search) -> Searched:
    """Sentences of an encoder."""
    base, drifts = search.base, search.second.drifted and trains_embeddings(search.sent, search.base.family)
    first = check(search.sent, base.family, base.atoms.width, METHOD, tolerance=search.tolerance, drifts=drifts)
    if first is None or not first.is_telling:
        return Searched({}, [], "the first layer does not tell which token may be where")
    may = candidates(search.blocks, first, search.bag, len(base.atoms.positions))
    end = end_of(base.checkpoint.folder)
    end = end if end in search.bag else None
    texts = WholeTexts(search.blocks, search.second, may, end, search.budget, search.tick, search.generator)
    texts.run()
    farthest = {text: whole.distance for text, whole in texts.passed.items()}
    return Searched(farthest, [state for whole in texts.passed.values() for state in whole.states], texts.stopped)


def trains_embeddings(sent: Sent, family: Family) -> bool:
    """Whether what the first layer reads may have changed while it was trained."""
    parts = (family.words, family.positions, family.types, f"{family.norm}.weight", f"{family.norm}.bias")
    return any(name.endswith(f".{part}") for name in sent.rows.layout.sizes for part in parts if part)


def end_of(folder: Path) -> int | None:
    """The token with which a base's tokenizer ends a text; None where there is no tokenizer, or no such token."""
    from transformers import AutoTokenizer

    try:
        token: int | None = AutoTokenizer.from_pretrained(folder).sep_token_id
    except (OSError, ValueError, KeyError):
        return None
    return token


def told(words: RevealedText, found: Searched, second: Check) -> RevealedText:
    """The bag with the sentences, and how much both are to be trusted."""
    bag, used = {token.id for token in words.tokens}, {token for text in found.texts for token in text}
    states, texts = len(found.states), sorted(found.texts, key=lambda text: (found.texts[text], text))
    accounted = second.accounted(torch.stack(list(found.states))) if states else 0
    share = len(bag & used) / len(bag) if second.drifted else accounted / second.rank
    whole = accounted == second.rank == states and bag == used and not second.drifted
    count = f"{len(texts)} sentence{'s' * (len(texts) != 1)}"
    why = f"{count} with {states} hidden states, and the second layer read {second.rank} independent ones"
    if second.drifted:
        why = f"{count} with {len(bag & used)} of the {len(bag)} tokens; in several steps hidden states drift"
    return replace(
        words,
        certificate=words.certificate * share,
        certain=words.certain and whole,
        why="; ".join(filter(None, (words.why, why, found.stopped))),
        sentences=tuple(texts),
        sentence_scores=tuple(1 - found.texts[text] ** 2 for text in texts),
    )
