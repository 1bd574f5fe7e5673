"""Deep leakage from gradients: examples are searched for whose gradient is the client's, by its distance."""

import math
import time
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

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
from fedllm_sec.registry import attack
from fedllm_sec.updates.update_set import UpdateSet

METHOD = "dlg"
INNER = 20  # L-BFGS iterations in one step of the search
EXACT = 1e-10  # of the gradient's squared length: float32 tells no smaller distance
PATIENCE = 5  # steps in which a search must come nearer
NEARER = 0.99  # by this factor

Count = Annotated[int, Field(ge=1)]


@attack(METHOD, paper="Zhu et al. 2019, arXiv:1906.08935; idlg: Zhao et al. 2020, arXiv:2001.02610")
def dlg(
    *,
    iterations: Count = 300,
    restarts: Count = 3,
    label: Literal["joint", "idlg"] = "joint",
    examples: Count | None = None,
    unroll: bool = True,
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None,
) -> Attack:
    """Search for images and labels whose gradient is the client's, with L-BFGS (equation 4 of the paper).

    min over x and y of |grad(x, softmax y) - g|², from x and y of N(0, 1) (the paper's algorithm 1). Smooth models and
    few examples: with ReLU, or where weights are small, it often goes astray, and `inverting_gradients` does better.

    Departures: L-BFGS has a line search (strong Wolfe), without which it ran off from three of six starts in our trial;
    it ends early, once it is exact or comes no nearer; the best of some restarts is kept. Of several examples all are
    moved at once, where the paper turns to one after another: their order is arbitrary, and nothing guarantees that
    they are found; the certificate tells.

    Several local steps are differentiated through (see `local_steps`), which neither paper does.

    Certificate: 1 - |g' - g| / |g|, g' being the gradient of what was found. `certain` from 0.99, if there are no more
    pixels than numbers in g. It tells that these examples explain the update, not that no others do. Of clients that
    clip their gradients it is low unless that is told.

    Args:
        iterations: steps of the search, of 20 L-BFGS iterations each, as in the authors' code.
        restarts: searches from other starts, at most.
        label: `joint`: soft labels are searched for too. `idlg`: they are read from the last layer: exact for one
            example, a count for several (see `counts`).
        examples: how many different ones a client has; None: see `gradients.examples_of`.
        unroll: False: an update of several local steps is taken for one step on all examples.
        max_grad_norm: the length to which clients clip their gradients; None: what the victim says. What is found is
            compared as clipped.

    Raises:
        InputError: if the threat does not tell how clients train and with what model, no gradient can be read from
            their optimizer's steps, or the updates are not of that model.
    """

    def reconstruct(visible: UpdateSet, threat: Threat) -> list[RevealedImages]:
        clients = targets(visible, threat, METHOD, examples=examples, unroll=unroll, max_grad_norm=max_grad_norm)
        layer = telling_layer(clients, METHOD) if label == "idlg" else None
        return [found_of(target, layer, iterations, restarts) for target in clients]

    return Attack(reconstruct_data=reconstruct)


def found_of(target: Target, layer: str | None, iterations: int, restarts: int) -> RevealedImages:
    """One client's examples; labels are those that `layer` tells, if there is one."""
    start = time.perf_counter()
    labels = None if layer is None else analytic_labels(target, layer, METHOD)

    def once(restart: int) -> Found:
        return search(target, labels, target.threat.generator(METHOD, target.client, restart), iterations)

    return revealed(target, METHOD, told_nothing(target) or best_of(target, restarts, once), start)


def search(target: Target, labels: Tensor | None, generator: torch.Generator, iterations: int) -> Found:
    """One search.

    Args:
        target: the client.
        labels: (n,) int64, kept as they are; None: soft ones are searched for.
        generator: of the start.
        iterations: steps, at most.
    """
    wanted = target.flat
    length = float(wanted.square().sum())
    classes = target.steps.victim.classes
    images = torch.randn(target.shape, generator=generator).requires_grad_()
    soft = torch.randn(target.examples, classes, generator=generator).requires_grad_()
    moved = [images, soft] if labels is None else [images]
    optimizer = torch.optim.LBFGS(moved, lr=1, max_iter=INNER, line_search_fn="strong_wolfe")

    def probabilities() -> Tensor:
        return soft.softmax(dim=1) if labels is None else one_hot(labels, classes).float()

    def distance() -> Tensor:
        loss = (target.made_by(images, probabilities()) - wanted).square().sum()
        for part, slope in zip(moved, torch.autograd.grad(loss, moved), strict=True):
            part.grad = slope
        return loss.detach()

    losses: list[float] = []
    best = math.inf, images.detach().clone(), probabilities().detach()
    with progress(f"{METHOD}: {target.client}", iterations) as advance:
        for _ in range(iterations):
            optimizer.step(distance)  # type: ignore[no-untyped-call]
            losses.append(float(distance()))
            advance()
            if losses[-1] < best[0]:
                best = losses[-1], images.detach().clone(), probabilities().detach()
            if ended(losses, length):
                break
    loss, found, likely = best
    share = max(0.0, 1 - math.sqrt(loss / length)) if math.isfinite(loss) else 0.0
    return Found(found, likely.argmax(dim=1), loss, share)


def ended(losses: list[float], length: float) -> bool:
    """Whether a search is exact, has run off, or comes no nearer."""
    last = losses[-1]
    if not math.isfinite(last) or last < EXACT * length:
        return True
    return len(losses) > PATIENCE and last > NEARER * losses[-1 - PATIENCE]
