"""Inverting gradients: images are searched for whose gradient points where the client's does, and that are smooth."""

import math
import time
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedllm_sec.attacks.reconstruction.matching import (
    Found,
    Target,
    analytic_labels,
    best_of,
    revealed,
    targets,
    telling_layer,
    told_nothing,
)
from fedllm_sec.attacks.reconstruction.progress import progress
from fedllm_sec.attacks.reconstruction.revealed import RevealedImages
from fedllm_sec.core import Attack, Threat
from fedllm_sec.registry import attack, did_you_mean
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

METHOD = "inverting_gradients"
DECAY = 0.1  # of the step size, at these parts of the search
AT = (3 / 8, 5 / 8, 7 / 8)
TRIES = 20  # to deal labels in a new way

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Classes = tuple[Annotated[int, Field(ge=0)], ...]


class Search(NamedTuple):
    """How images are searched for; see `inverting_gradients`."""

    iterations: int
    total_variation: float
    step: float
    signed: bool
    bounds: tuple[Tensor, Tensor] | None


@attack(METHOD, paper="Geiping et al. 2020, arXiv:2003.14053")
def inverting_gradients(
    *,
    iterations: Count = 4800,
    restarts: Count = 1,
    total_variation: NotNegative = 1e-4,
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1,
    signed: bool = True,
    labels: Literal["analytic"] | Mapping[str, Classes] = "analytic",
    examples: Count | None = None,
    unroll: bool = True,
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None,
) -> Attack:
    """Search for images whose gradient has the direction of the client's (equation 4 of the paper).

    min over x of 1 - <grad(x), g> / |grad(x)| |g| + total_variation TV(x), by Adam on the signs of the slopes, from x
    of N(0, 1), with a step that becomes a tenth after 3/8, 5/8 and 7/8 of the iterations. After each one x goes back
    into the victim's bounds. TV is the mean absolute difference of neighbouring pixels, down plus across. Defaults are
    those of the authors' script.

    Federated averaging: of an update of several local steps, x is sought whose *update* has the client's direction,
    through all of its steps (section 6 of the paper). The client's batches are taken to be the examples in their order,
    the same in each epoch (see `local_steps`); labels are dealt to batches in their order, and otherwise in restarts.
    It costs `steps` times as much.

    Certificate: 1 - the sine of the angle between the two gradients, which does not depend on their lengths: clipping
    does no harm. `certain` from 0.99, if there are no more pixels than numbers in g. On the small network of our tests
    0.99 went with 15 to 22 dB, 0.996 with 26 and more, 0.999 with 35. It tells that these images explain the update,
    not that no others do.

    Args:
        iterations: of Adam.
        restarts: searches from other starts, at most.
        total_variation: the weight of smoothness.
        step: Adam's, in the units of an input.
        signed: whether Adam is given the signs of the slopes.
        labels: `analytic`: from the last layer: exact for one example, a count for several (see `counts`). Or the
            labels of each client, by its name.
        examples: how many different ones a client has; None: see `gradients.examples_of`.
        unroll: False: an update of several local steps is taken for one step on all examples.
        max_grad_norm: the length to which clients clip their gradients; None: what the victim says. Of one step only
            the direction counts, and it makes no difference.

    Raises:
        InputError: if the threat does not tell how clients train and with what model, no gradient can be read from
            their optimizer's steps, the updates are not of that model, or labels are missing or unfit.
    """

    def reconstruct(visible: UpdateSet, threat: Threat) -> list[RevealedImages]:
        clients = targets(visible, threat, METHOD, examples=examples, unroll=unroll, max_grad_norm=max_grad_norm)
        how = Search(iterations, total_variation, step, signed, checked(clients[0].victim, total_variation))
        if isinstance(labels, str):
            layer = telling_layer(clients, METHOD)
            return [found_of(target, analytic_labels(target, layer, METHOD), how, restarts) for target in clients]
        known = [given(labels, target) for target in clients]
        return [found_of(target, y, how, restarts) for target, y in zip(clients, known, strict=True)]

    return Attack(reconstruct_data=reconstruct)


def given(labels: Mapping[str, Classes], target: Target) -> Tensor:
    """(n,) int64 labels of one client.

    Raises:
        InputError: if there are none, not as many as examples, or one is no class.
    """
    client, n, classes = target.client, target.examples, target.victim.classes
    if client not in labels:
        raise InputError(f"{METHOD}(labels=...): there are none of {client!r}{did_you_mean(client, labels)}")
    mine = labels[client]
    if len(mine) != n:
        raise InputError(f"{METHOD}(labels=...): {client} has {n} examples, and {len(mine)} labels are given")
    if max(mine) >= classes:
        raise InputError(f"{METHOD}(labels=...): {client}: {max(mine)} is no class; there are 0 to {classes - 1}")
    return torch.tensor(mine)


def checked(victim: Victim, weight: float) -> tuple[Tensor, Tensor] | None:
    """The victim's bounds, as tensors that broadcast to an image.

    Raises:
        InputError: if they do not, or are the wrong way round; or for the total variation of what is no image.
    """
    if weight and len(victim.shape) < 2:
        raise InputError(
            f"{METHOD}(total_variation={weight:g}): inputs of shape {victim.shape} have no rows and columns; "
            "set it to 0"
        )
    if victim.bounds is None:
        return None
    try:
        low, high = (torch.broadcast_to(bound.float(), victim.shape) for bound in victim.bounds)
    except RuntimeError:
        shapes = ", ".join(str(tuple(bound.shape)) for bound in victim.bounds)
        raise InputError(f"{METHOD}: bounds of shapes {shapes} do not fit inputs of {victim.shape}") from None
    if not bool((low < high).all()):
        raise InputError(f"{METHOD}: the victim's bounds are the wrong way round: first black, then white")
    return low, high


def found_of(target: Target, labels: Tensor, how: Search, restarts: int) -> RevealedImages:
    """One client's images."""
    start = time.perf_counter()
    hands: list[Tensor] = []

    def once(restart: int) -> Found:
        generator = target.threat.generator(METHOD, target.client, restart)
        hands.append(dealt(labels, hands, target.steps.victim.batch_size, generator))
        return search(target, hands[-1], generator, how)

    return revealed(target, METHOD, told_nothing(target) or best_of(target, restarts, once), start)


def dealt(labels: Tensor, before: list[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """Labels in an order that deals them to batches as none before did: first as they are, then at random.

    Where there is no other order, or none is found in some tries, it is one of those before.
    """

    def batches(order: Tensor) -> list[list[int]]:
        return [sorted(order[start : start + size].tolist()) for start in range(0, len(order), size)]

    tried = [batches(order) for order in before]
    order = labels
    for _ in range(TRIES):
        if batches(order) not in tried:
            break
        order = labels[torch.randperm(len(labels), generator=generator)]
    return order


def search(target: Target, labels: Tensor, generator: torch.Generator, how: Search) -> Found:
    """One search; the images with the least loss on its way.

    1 - cosine is reckoned as half the squared distance of the two directions, which rounds less.

    Args:
        target: the client.
        labels: (n,) int64.
        generator: of the start.
        how: its settings.
    """
    wanted = target.flat
    wanted = wanted / wanted.norm()
    images = torch.randn(target.shape, generator=generator)
    images = (images if how.bounds is None else clamped(images, how.bounds)).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=how.step)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(how.iterations * part) for part in AT], DECAY)
    best, far, found = math.inf, math.inf, images.detach().clone()
    with progress(f"{METHOD}: {target.client}", how.iterations) as advance:
        for _ in range(how.iterations):
            made = target.made_by(images, labels)
            away = (made / made.norm().clamp(min=torch.finfo(made.dtype).tiny) - wanted).square().sum()
            loss = away / 2 + (how.total_variation * variation(images) if how.total_variation else 0.0)
            if loss.item() < best:
                best, far, found = loss.item(), away.item(), images.detach().clone()
            (slope,) = torch.autograd.grad(loss, images)
            images.grad = slope.sign() if how.signed else slope
            optimizer.step()
            decay.step()
            if how.bounds is not None:
                with torch.no_grad():
                    images.copy_(clamped(images, how.bounds))
            advance()
    return Found(found, labels, best, unturned(far))


def clamped(images: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """(n, *shape) images, each value the nearest within bounds."""
    return torch.minimum(torch.maximum(images, bounds[0]), bounds[1])


def variation(images: Tensor) -> Tensor:
    """Total variation of (..., H, W): the mean absolute difference of neighbours, down plus across."""
    down, across = images.diff(dim=-2).abs(), images.diff(dim=-1).abs()
    return (down.mean() if down.numel() else 0.0) + (across.mean() if across.numel() else images.sum() * 0)


def unturned(away: float) -> float:
    """1 - the sine of the angle between two directions: how much one explains of the other; 0 beyond a right angle.

    Args:
        away: their squared distance, 0 to 4.
    """
    return 1 - math.sqrt(away * (1 - away / 4)) if away < 2 else 0.0
