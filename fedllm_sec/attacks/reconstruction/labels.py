"""Revealing labels: which classes a client trained on, and how often each, from the gradient of the last layer alone.

The gradient is a mean of g_i z_iᵀ (see `last_layer`), so its columns lie in the span of the g_i, each of which has one
negative entry, the class of its example. A class is revealed if the span has a vector with that one negative entry: a
linear program for each class.

Shapes: C classes, h features (with the bias one more), n examples, S the rank.
"""

import time
from collections.abc import Callable
from typing import Annotated, NamedTuple

from pydantic import Field

from fedllm_sec.attacks.reconstruction.counts import class_counts
from fedllm_sec.attacks.reconstruction.gradients import examples_of, seen_by, victim_of
from fedllm_sec.attacks.reconstruction.last_layer import Head, head_name, head_of
from fedllm_sec.attacks.reconstruction.progress import progress
from fedllm_sec.attacks.reconstruction.revealed import RevealedLabels
from fedllm_sec.attacks.reconstruction.span import REVEALED, Space, margin, span_of
from fedllm_sec.core import Attack, Threat
from fedllm_sec.registry import attack
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

METHOD = "revealing_labels"
SOUND = 0.7  # of C; of a higher rank, absent classes were found too
TRUSTED = 0.6  # a certificate from which the method vouches
MOST = 20_000  # classes; what has more is a vocabulary


class Facts(NamedTuple):
    """What a head reveals: fields of `RevealedLabels`."""

    certificate: float
    certain: bool
    why: str
    present: tuple[int, ...]
    counts: tuple[int, ...] | None


@attack(METHOD, paper="Dang et al. 2021, arXiv:2111.00556; counts: cf. Ma et al. 2023, openreview.net FIrQfNSOoTr")
def revealing_labels(*, layer: str | None = None, examples: Annotated[int, Field(ge=1)] | None = None) -> Attack:
    """Tell which classes a client trained on, and how many examples of each, from the last layer's update.

    Which: a singular value decomposition, and a linear program for each class. The paper solves for feasibility, behind
    a perceptron; here the program seeks the largest margin (`margin`), in which noise shows, and the bias is a feature
    more. Of a rank S above 0.7 C absent classes have vectors of their own too, and the counts tell which are there.
    Below, that happens rarely: where examples of one class differ in what a trained head gives the others. So classes
    are `certain` if S is n and below min(C - 1, h), and the bias says the same (see `contradicted`).

    How many: equally many of each, where n classes are found; else from the bias (`counts`). Counts are of all steps
    together, so that an example counts in each epoch anew. `certain` is about the classes; `why` says whether counts
    are to be trusted.

    Local steps move the features, and what the model gives each class, a little each, so that K steps on the same n
    examples leave a rank of up to K n. Every direction is still a mix of vectors with one negative entry, but the last
    ones are as small as rounding. So the n strongest are taken, and the certificate tells how much stronger than the
    next one they are.

    Adam: its first step tells hardly more than the signs of a gradient. The classes whose bias the client raised
    (without a bias: whose row, all in all) are a guess, and nothing measures it; classes that the batch has fewer of
    than the model expects are missed.

    Certificate: 1 - the larger one of the span's noise and of how far the classes are from adding up to zero, which
    they do under softmax. Where counts tell which: at most 1 - twice the distance of a count from a whole number.

    Args:
        layer: the name of the last layer's weight; None: it is looked for (see `last_layer.head_name`).
        examples: n, how many different ones a client has; None: see `gradients.examples_of`.

    Raises:
        InputError: if the threat does not tell how clients train, or the update has no such layer.
    """

    def reconstruct(visible: UpdateSet, threat: Threat) -> list[RevealedLabels]:
        victim = victim_of(threat, METHOD)
        name = head_name(visible.layout, victim, layer, METHOD)
        classes = dict(visible.layout.shapes)[name][0]
        if classes > MOST:
            raise InputError(f"{METHOD}: {name} has {classes:,} rows, a vocabulary; name a layer of classes: layer=...")
        numbers = [examples_of(victim, claim, examples, METHOD) for claim in visible.num_samples.tolist()]
        found = []
        for row, (client, n) in enumerate(zip(visible.clients, numbers, strict=True)):
            start = time.perf_counter()
            head = head_of(visible, row, threat, victim, name, METHOD)
            with progress(f"{METHOD}: {client}", classes) as advance:
                facts = labels_of(head, n, victim, advance)
            certificate, certain, why, present, counts = facts
            seconds = time.perf_counter() - start
            found.append(RevealedLabels(client, METHOD, certificate, certain, why, seconds, present, counts))
        return found

    return Attack(reconstruct_data=reconstruct)


def labels_of(head: Head, examples: int, victim: Victim, advance: Callable[[], None] = lambda: None) -> Facts:
    """What one head's gradient reveals.

    Args:
        head: of one client.
        examples: n, how many different ones it has.
        victim: how it trained.
        advance: called for each class that is tried.
    """
    if not head.whole.any():
        return Facts(0.0, False, "the last layer has not changed: it tells nothing", (), None)
    if victim.optimizer != "sgd":
        return raised(head, victim)
    fault = doubt(head)
    space = span_of(head, examples, victim)
    classes, rank = space.basis.shape
    negative = surely(head, space.floor) if fault is None else set()
    if len(negative) == examples:
        told = how_many(head, examples, victim, negative)
        return facts(balance(head), True, "as many classes as examples push their own bias", negative, told)
    if rank > SOUND * classes or rank >= classes - 1:
        return by_counts(head, examples, victim, negative, f"rank {rank} of {classes} classes is too high to tell")
    found = negative | {c for c in range(classes) if shown(space, c, advance)}
    fault = fault or doubt_about(space, len(found), examples) or contradicted(head, found)
    told = how_many(head, examples, victim, found if fault is None else None)
    why = fault or f"rank {rank} of {classes} classes: each has a vector of its own"
    return facts(min(balance(head), 1 - space.noise), fault is None, why, found, told)


def facts(
    certificate: float, certain: bool, why: str, found: set[int], told: tuple[tuple[int, ...] | None, str]
) -> Facts:
    """Put together; `told` are counts and what is to be said of them."""
    return Facts(certificate, certain, f"{why}; {told[1]}", tuple(sorted(found)), told[0])


def how_many(head: Head, examples: int, victim: Victim, present: set[int] | None) -> tuple[tuple[int, ...] | None, str]:
    """How often each class was trained on in all local steps, and what is to be said of that.

    Args:
        head: of one client.
        examples: n.
        victim: how it trained.
        present: the classes, where they are certain.
    """
    seen, classes = seen_by(victim, examples), len(head.weight)
    if present is not None and len(present) == examples and seen % examples == 0:
        return tuple(seen // examples * (c in present) for c in range(classes)), "as many examples as classes"
    counts = class_counts(head, seen, victim.steps, present)
    return (counts.each, f"counts: {counts.why}") if counts else (None, "how many is not told")


def by_counts(head: Head, examples: int, victim: Victim, negative: set[int], why: str) -> Facts:
    """The same where the span tells nothing: a class is there if it is counted."""
    fault = doubt(head)
    counts = class_counts(head, seen_by(victim, examples), victim.steps)
    if counts is None:
        return facts(0.0, False, why, negative, (None, fault or "without a bias nothing tells counts"))
    found = negative | {c for c, count in enumerate(counts.each) if count}
    certificate = max(0.0, min(balance(head), 1 - 2 * counts.distance))
    told = counts.each, f"counts: {fault or counts.why}"
    return facts(certificate, counts.certain and fault is None, why, found, told)


def balance(head: Head) -> float:
    """How much like a gradient under softmax it is, 0 to 1: then its classes add up to zero."""
    return max(0.0, 1 - head.imbalance)


def shown(space: Space, c: int, advance: Callable[[], None]) -> bool:
    """Whether the span reveals class c."""
    advance()
    return margin(space, c) > REVEALED


def surely(head: Head, floor: float) -> set[int]:
    """Classes with a negative gradient of their bias: nothing but their own examples makes it negative."""
    return set() if head.bias is None else set((head.bias < -floor).nonzero().flatten().tolist())


def raised(head: Head, victim: Victim) -> Facts:
    """A guess from the signs of an update that is no gradient: the classes that the client made more likely."""
    slopes = head.weight.sum(dim=1) if head.bias is None else head.bias
    found = tuple((slopes < 0).nonzero().flatten().tolist())
    return Facts(0.0, False, f"a guess: of steps of {victim.optimizer} only signs are read", found, None)


def doubt(head: Head) -> str | None:
    """Why an update is none of a softmax head; None if it is one."""
    if balance(head) < TRUSTED:
        return "the classes' gradients do not add up to zero: noise, or no softmax"
    return None


def doubt_about(space: Space, found: int, examples: int) -> str | None:
    """Why classes are not certain; None if they are."""
    rank = space.basis.shape[1]
    if not found:
        return "no class has a vector of its own: noise, or other classes than these"
    if found > examples:
        return f"{found} classes were found of {examples} examples: the client may have more"
    if space.full:
        return f"the rank is all that the layer allows, {rank}: more examples than that may be behind it"
    if rank < examples:
        return f"{examples} examples left a rank of {rank}: some are alike, or lost in rounding"
    if 1 - space.noise < TRUSTED:
        return f"the first direction that is left out is {space.noise:.2f} of the last one that is not"
    return None


def contradicted(head: Head, found: set[int]) -> str | None:
    """A class whose own row does not bear out that it is there; None if there is none.

    Its bias has a negative gradient where its examples are more than the model expects, as they are of a head that does
    not know them yet. Without a bias the row's part along the sum of the absent rows stands for it, which are multiples
    of mean features: less than half of what an absent row has on average (of an untrained head 1 - C / n of it).
    """
    slopes, most = head.bias, 0.0
    if slopes is None:
        absent = [c for c in range(len(head.weight)) if c not in found]
        slopes = head.weight @ head.weight[absent].sum(dim=0)
        most = float(slopes[absent].mean()) / 2
    wrong = [c for c in sorted(found) if float(slopes[c]) >= most]
    return f"the row of class {wrong[0]} speaks against it" if wrong else None
