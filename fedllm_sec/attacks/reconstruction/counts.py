"""How many examples of each class: n_c = n (p_c - db_c), from a head's gradient and what the model gave each class.

p_c is the mean over the examples of the probability that the received model gives class c. An attacker cannot run the
model on examples that it does not have, but the gradient tells what went into the head: for a class that is absent the
row of the weight's gradient, divided by its bias', is a weighted mean of the examples' features. We put the mean of
these through the head. (Of six untrained heads and 32 examples, a uniform p had counts wrong by 1 to 7, and this one by
0 or 1.) Ma et al. 2023 do so for each class by itself and solve for the counts; in our trial that erred more often.
A client that clips its gradients makes them shorter, and the counts wrong.

Shapes: C classes, h features.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.last_layer import Head

FLAT = 0.25  # a head that gives a class so much more than its share knows its examples too well
CLOSE = 0.15  # to a whole number: what is further is doubtful
SPREAD = 0.5  # examples: what features of single rows make of it


class Counts(NamedTuple):
    """How many examples of each class.

    Attributes:
        each: C numbers that add up to n.
        certain: whether rounding is safe, and the estimate of p is one.
        why: in words.
        distance: of the estimates from whole numbers, at most.
    """

    each: tuple[int, ...]
    certain: bool
    why: str
    distance: float


def class_counts(head: Head, examples: int, steps: int = 1, present: Collection[int] | None = None) -> Counts | None:
    """Count classes; None for a head that has no bias, and no class that is known to be absent.

    Over several steps p changes; it is taken halfway between the received head and the one that was sent. Classes with
    a negative gradient of their bias are surely present, because only examples of a class can make it negative.

    Args:
        head: with the gradient of a mean over examples.
        examples: n.
        steps: of the client.
        present: classes that are known to be there, and no others; None: unknown.
    """
    with_bias = head if head.bias is not None else supplied(head, present)
    if with_bias is None or with_bias.bias is None:
        return None
    bias, spread = with_bias.bias, 0.0
    p = torch.full_like(bias, 1 / len(bias))
    rows = torch.tensor([c for c in range(len(p)) if bias[c] > 0 and (present is None or c not in present)])
    if len(rows):
        features = head.weight[rows] / bias[rows, None]
        mean = head.weight[rows].sum(dim=0) / bias[rows].sum()
        p = probabilities(head, mean, steps)
        spread = examples * float((probabilities(head, features, steps) - p).abs().max())
    estimate = examples * (p - bias)
    least = torch.zeros(len(bias), dtype=torch.int64)
    most = torch.full_like(least, examples)
    if present is not None:
        absent = [c for c in range(len(bias)) if c not in present]
        most[absent] = 0
        least[list(present)] = 1
    else:
        least[bias < -1e-6 * bias.abs().max()] = 1
    each = rounded(estimate, examples, least, most)
    distance = float((estimate - torch.tensor(each)).abs().max())
    return Counts(each, *judged(distance, spread, float(p.max()) - 1 / len(p), len(rows)), distance)


def judged(distance: float, spread: float, above: float, rows: int) -> tuple[bool, str]:
    """Whether counts are vouched for, and the reason."""
    if above > FLAT:
        return False, "the received head knows its classes too well for counts: absent ones leave no trace"
    if rows < 2:
        return False, "all but one class are in the batch: nothing tells what the model gave them"
    if spread > SPREAD:
        return False, f"the classes' rows tell counts that differ by {spread:.1f} examples"
    if distance > CLOSE:
        return False, f"a count is {distance:.2f} from a whole number"
    return True, f"all counts are within {distance:.2f} of whole numbers"


def probabilities(head: Head, features: Tensor, steps: int) -> Tensor:
    """(..., C) what the head gives each class for (..., h) features, on average over the client's steps."""
    offset = 0.0 if head.offset is None else head.offset
    first = (features @ head.received.T + offset).softmax(dim=-1)
    if steps == 1:
        return first
    moved = head.received - head.scale * head.weight
    shift = 0.0 if head.offset is None or head.bias is None else head.offset - head.scale * head.bias
    return (first + (features @ moved.T + shift).softmax(dim=-1)) / 2


def supplied(head: Head, present: Collection[int] | None) -> Head | None:
    """A head without a bias as if it had one, whose gradient is told by the rows of absent classes.

    dW_c = p_c z for an absent class, with z the mean feature and p_c = softmax(W z)_c: a fixed point that is found in
    a few rounds, from equal p. Then db_c = <dW_c, z> / |z|². None where no class is known to be absent: the scale of
    the features, and with it of the counts, cannot be told.
    """
    absent = [c for c in range(len(head.weight)) if present is not None and c not in present]
    if not absent:
        return None
    p = torch.full((len(head.weight),), 1 / len(head.weight), dtype=head.weight.dtype)
    mean = torch.zeros_like(head.weight[0])
    for _ in range(50):
        mean = head.weight[absent].sum(dim=0) / p[absent].sum()
        p = (p + (head.received @ mean).softmax(dim=0)) / 2
    if not float(mean.square().sum()) > 0:
        return None
    return Head(head.name, head.weight, head.weight @ mean / mean.square().sum(), head.received, None, head.scale)


def rounded(estimate: Tensor, total: int, least: Tensor, most: Tensor) -> tuple[int, ...]:
    """The whole numbers next to an estimate that lie within bounds and add up to a total.

    Each is rounded down; what is missing goes, one by one, to whoever has most to gain, and what is too much is taken
    from whoever has least to lose.
    """
    counts = estimate.floor().long().clamp(min=least, max=most)
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        may = counts < most if step > 0 else counts > least
        if not may.any():
            break  # more classes are present than examples: the claim about n is wrong
        gain = torch.where(may, step * (estimate - counts), -torch.inf)
        counts[int(gain.argmax())] += step
    return tuple(counts.tolist())
