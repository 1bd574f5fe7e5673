"""What the two searches for images share: what they are given, how a result is judged, and what one is made of.

Shapes: n images of `shape`, d parameters.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.counts import class_counts
from fedllm_sec.attacks.reconstruction.gradients import (
    Tensors,
    check_linear,
    examples_of,
    gradient,
    model_of,
    received_weights,
    victim_of,
)
from fedllm_sec.attacks.reconstruction.last_layer import Head, bias_name, head_name, head_of, label_of_one
from fedllm_sec.attacks.reconstruction.local_steps import LocalSteps, local_steps
from fedllm_sec.attacks.reconstruction.revealed import RevealedImages
from fedllm_sec.core import Threat
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

CERTAIN = 0.99  # of the gradient's length: what explains so much is taken for the client's


class Found(NamedTuple):
    """Where one search ended.

    Attributes:
        images: (n, *shape).
        labels: (n,) int64.
        loss: what the method minimises.
        share: how much of the gradient it explains, 0 to 1.
    """

    images: Tensor
    labels: Tensor
    loss: float
    share: float


@dataclass(frozen=True)
class Target:
    """One client's gradient, and what is needed to match it.

    Attributes:
        client: its name.
        row: its place among the visible rows.
        steps: its training, to be differentiated.
        examples: n.
        visible: the rows; this client's is read when its gradient is first asked for.
        threat: what the attacker knows.
        victim: how the client trains.
    """

    client: str
    row: int
    steps: LocalSteps
    examples: int
    visible: UpdateSet
    threat: Threat
    victim: Victim

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all its images: (n, *shape)."""
        return (self.examples, *self.victim.shape)

    @cached_property
    def gradient(self) -> Tensors:
        """What it sent, as a mean gradient."""
        return gradient(self.visible, self.row, self.steps.weights, self.victim)

    @cached_property
    def flat(self) -> Tensor:
        """(d,) the same as one vector, in the order of the model's parameters."""
        return torch.cat([part.reshape(-1) for part in self.gradient.values()])

    def made_by(self, images: Tensor, targets: Tensor) -> Tensor:
        """(d,) the gradient that such examples make, with its graph."""
        return torch.cat([part.reshape(-1) for part in self.steps.gradient(images, targets)])

    def head(self, layer: str, method: str) -> Head:
        """Its last layer."""
        return head_of(self.visible, self.row, self.threat, self.victim, layer, method)


def targets(
    visible: UpdateSet,
    threat: Threat,
    method: str,
    *,
    examples: int | None,
    unroll: bool = True,
    max_grad_norm: float | None = None,
) -> list[Target]:
    """All visible clients, once everything that a user can get wrong has been checked; no update is read.

    Args:
        visible: updates.
        threat: with a victim that has a model.
        method: for messages.
        examples: of each client; None: see `gradients.examples_of`.
        unroll: differentiate through the local steps; otherwise an update is taken for one step on all examples.
        max_grad_norm: to which clients clip their gradients; None: what the victim says.

    Raises:
        InputError: for a victim that is missing, or not like these updates.
    """
    victim = victim_of(threat, method)
    check_linear(victim, method)
    names = [name for name, _ in model_of(victim, visible.layout, method).named_parameters()]
    weights = received_weights(threat, visible, names, method)
    steps = local_steps(visible, victim, weights, max_grad_norm or victim.max_grad_norm, method)
    if not unroll and victim.steps > 1:
        steps = steps.as_one_step()
    return [
        Target(client, row, steps, examples_of(victim, claim, examples, method), visible, threat, victim)
        for row, (client, claim) in enumerate(zip(visible.clients, visible.num_samples.tolist(), strict=True))
    ]


def telling_layer(clients: Sequence[Target], method: str) -> str:
    """The name of the last layer, if it tells the labels of these clients.

    Raises:
        InputError: if there is none, or it has no bias and a client has several examples.
    """
    layout, victim = clients[0].visible.layout, clients[0].victim
    name = head_name(layout, victim, None, method)
    several = max(target.examples for target in clients)
    if several > 1 and bias_name(name) not in dict(layout.shapes):
        raise InputError(
            f"{method}: the last layer, {name}, has no bias and tells the label of one example, not of {several}; have "
            "labels searched for too (dlg with label=joint), or give them (inverting_gradients with labels=...)"
        )
    return name


def analytic_labels(target: Target, layer: str, method: str) -> Tensor:
    """(n,) int64 labels that the last layer tells: of one example exactly, of several by counts, in order."""
    head = target.head(layer, method)
    counts = class_counts(head, target.examples, target.victim.steps)
    if target.examples == 1 or counts is None:
        return torch.tensor([label_of_one(head)])
    return torch.arange(len(counts.each)).repeat_interleave(torch.tensor(counts.each))[: target.examples]


def best_of(target: Target, restarts: int, search: Callable[[int], Found]) -> Found:
    """The search that ended with the least loss; no more are made once one explains the gradient."""
    best: Found | None = None
    for restart in range(restarts):
        found = search(restart)
        if best is None or not best.loss <= found.loss:  # a loss that is no number is beaten by any
            best = found
        if best.share >= CERTAIN:
            break
    assert best is not None
    return best


def told_nothing(target: Target) -> Found | None:
    """What is found of an update of zero, which any search would leave as it began; None for another."""
    if target.flat.any():
        return None
    return Found(torch.zeros(target.shape), torch.zeros(target.examples, dtype=torch.int64), 0.0, 0.0)


def revealed(target: Target, method: str, found: Found, start: float) -> RevealedImages:
    """The result of one client, and whether it is vouched for.

    Args:
        start: when its search began, by `time.perf_counter`.
    """
    unknown, known = found.images.numel(), int(target.flat.count_nonzero())
    share = f"explains {found.share:.2%} of the gradient"
    if not known:
        why = "the update is zero: it tells nothing"
    elif found.share < CERTAIN:
        why = f"{share}, and {CERTAIN:.0%} are asked for: the search went astray, or the update is no such gradient"
    elif known < unknown:
        why = f"{share}, but so may others: {unknown:,} unknown pixels, and {known:,} numbers that are not zero"
    else:
        why = f"{share}; whether other images do so too is not looked at"
    return RevealedImages(
        client=target.client,
        method=method,
        certificate=found.share,
        certain=found.share >= CERTAIN and unknown <= known,
        why=why,
        seconds=time.perf_counter() - start,
        images=found.images.detach().float(),
        labels=found.labels,
        loss=found.loss,
    )
