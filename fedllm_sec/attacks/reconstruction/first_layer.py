"""Inputs of a linear first layer from its gradient, without a search: rows of the gradient are multiples of them.

Shapes: n examples, the layer's weight (m, d) and bias (m,).
"""

import math
import time
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fedllm_sec.attacks.reconstruction.gradients import shares
from fedllm_sec.attacks.reconstruction.last_layer import Head, bias_name, head_name
from fedllm_sec.attacks.reconstruction.local_steps import LocalSteps
from fedllm_sec.attacks.reconstruction.matching import Target, targets
from fedllm_sec.attacks.reconstruction.revealed import RevealedImages
from fedllm_sec.core import Attack, Threat
from fedllm_sec.registry import attack
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.update_set import UpdateSet

METHOD = "first_layer"
CERTAIN = 0.99  # of the layer's gradient, for the input of one example
WITNESSES = 3  # rows that must agree on an input; two of many mixtures come near one another by chance
LEGIBLE = 0.01  # of an input's length: a row that rounding moves further is not read
ROWS = 1000  # the strongest ones are enough


class Inputs(NamedTuple):
    """What the layer's gradient tells.

    Attributes:
        each: (k, d) inputs.
        witnesses: how many rows each is read from.
        alone: whether each is one example's, and not a mixture.
    """

    each: Tensor
    witnesses: tuple[int, ...]
    alone: bool


@attack(METHOD, paper="Geiping et al. 2020, arXiv:2003.14053 (proposition 3.1); Phong et al. 2018, eprint 2017/715")
def first_layer(*, examples: Annotated[int, Field(ge=1)] | None = None) -> Attack:
    """Read the inputs of a model whose first layer is linear with a bias: x = dW_i / db_i for any row i.

    One example: exact, and the mean of all rows weighted by db_i² is returned, in which rounding averages out. It stays
    exact over several local steps on that example, because each step's rows are multiples of the same x.

    Several examples: a row gives a mean of the inputs weighted by what each sends back to that unit. Behind a ReLU some
    units are open for one example alone; their rows are exact, and agree with one another, which mixtures do not. An
    input on which three rows agree up to rounding is taken for one example's (the paper does not go into this). Others
    are not found: with n examples a unit is open for one alone with a chance of about n / 2^n. Where there is none,
    above all for smooth activations and for logistic regression, one mixture is returned, and not vouched for.

    Labels come from the last layer's gradient, by least squares on what the inputs found make of it.

    Certificate: 1 - the part of [dW db] that lies outside the span of the inputs [x 1] that are returned. `certain`:
    for one example from 0.99; for several if rows agree, about those that are returned (`why` tells how many of n).

    Args:
        examples: how many different ones a client has; None: see `gradients.examples_of`.

    Raises:
        InputError: if the threat does not tell how clients train and with what model, no gradient can be read from
            their optimizer's steps, the updates are not of that model, or its first layer is another.
    """

    def reconstruct(visible: UpdateSet, threat: Threat) -> list[RevealedImages]:
        clients = targets(visible, threat, METHOD, examples=examples)
        layer = linear_first(clients[0].steps)
        last = head_name(visible.layout, clients[0].victim, None, METHOD)
        return [found_of(target, layer, target.head(last, METHOD)) for target in clients]

    return Attack(reconstruct_data=reconstruct)


def linear_first(client: LocalSteps) -> str:
    """The name of the first layer's weight.

    Raises:
        InputError: if the first layer with weights is not a linear one with a bias that reads the inputs as they are.
    """
    parts = ((name, part) for name, part in client.model.named_modules() if list(part.parameters(recurse=False)))
    name, layer = next(parts)
    remedy = "use dlg or inverting_gradients"
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise InputError(
            f"{METHOD}: the model's first layer, {name or 'itself'}, is no linear layer with a bias; {remedy}"
        )
    images = torch.randn(client.victim.batch_size, *client.victim.shape, generator=torch.Generator().manual_seed(0))
    seen = features_of(client, layer, images)
    if seen is None or seen.shape != images.flatten(1).shape or not torch.equal(seen, images.flatten(1)):
        raise InputError(f"{METHOD}: the model's first layer, {name}, does not read the inputs as they are; {remedy}")
    return f"{name}.weight" if name else "weight"


def features_of(client: LocalSteps, layer: nn.Module, images: Tensor) -> Tensor | None:
    """What goes into a layer for (n, *shape) images; None if it is not called."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    try:
        with torch.no_grad():
            functional_call(client.model, {**client.weights, **client.buffers}, (images,))
    finally:
        hook.remove()
    return seen[0] if seen else None


def found_of(target: Target, layer: str, head: Head) -> RevealedImages:
    """One client's inputs."""
    start = time.perf_counter()
    weight, bias = target.gradient[layer].double(), target.gradient[bias_name(layer)].double()
    inputs = inputs_of(weight, bias, target.examples, rounding(target, layer))
    certificate = spanned(weight, bias, inputs.each)
    images = inputs.each.float().reshape(-1, *target.steps.victim.shape)
    found, n = len(images), target.examples
    if not weight.any():
        why = "the layer has not changed: it tells nothing"
    elif n == 1:
        why = f"{certificate:.2%} of the layer's gradient are multiples of this input"
    elif inputs.alone:
        why = f"{found} of {n} examples: at least {min(inputs.witnesses)} units tell the same of each"
    else:
        why = f"a mixture of {n} examples: no {WITNESSES} units tell the same"
    return RevealedImages(
        client=target.client,
        method=METHOD,
        certificate=certificate,
        certain=inputs.alone and (n > 1 or certificate >= CERTAIN) and bool(weight.any()),
        why=why,
        seconds=time.perf_counter() - start,
        images=images,
        labels=labels_of(target, head, images),
        loss=1 - certificate,
    )


def rounding(target: Target, layer: str) -> float:
    """By how much an entry of the layer's gradient may be off: weights are sent in float32, and so are products."""
    victim, unit = target.steps.victim, torch.finfo(torch.float32).eps
    sent = float(target.steps.weights[layer].abs().max()) * math.sqrt(victim.steps) / shares(victim).total
    return unit * (sent + float(target.gradient[layer].abs().max()))


def inputs_of(weight: Tensor, bias: Tensor, examples: int, error: float) -> Inputs:
    """The inputs that rows of a layer's gradient tell.

    Args:
        weight: (m, d) float64 gradient.
        bias: (m,) float64 gradient.
        examples: n; at most so many are returned.
        error: of an entry.
    """
    if examples == 1 or not bias.any():
        return Inputs(joined(weight, bias)[None], (int(bias.count_nonzero()),), examples == 1)
    strongest = bias.abs().argsort(descending=True, stable=True)[:ROWS]
    strongest = strongest[bias[strongest] != 0]
    rows, shares_ = weight[strongest], bias[strongest]
    each = rows / shares_[:, None]
    off = error * (rows.shape[1] ** 0.5 + each.norm(dim=1)) / shares_.abs()
    left = off < LEGIBLE * each.norm(dim=1)
    groups: list[tuple[int, Tensor]] = []
    for row in range(len(each)):
        if left[row]:
            alike = left & ((each - each[row]).norm(dim=1) <= 2 * (off + off[row]))
            left &= ~alike
            if int(alike.sum()) >= WITNESSES:
                groups.append((int(alike.sum()), joined(rows[alike], shares_[alike])))
    if not groups:
        return Inputs(joined(weight, bias)[None], (len(strongest),), False)
    groups = sorted(groups, key=lambda group: -group[0])[:examples]
    return Inputs(torch.stack([x for _, x in groups]), tuple(count for count, _ in groups), True)


def joined(rows: Tensor, shares_: Tensor) -> Tensor:
    """(d,) the x for which rows are nearest to shares xᵀ: the mean of all row / share, weighted by share²."""
    total = shares_.square().sum()
    return shares_ @ rows / total if float(total) > 0 else torch.zeros_like(rows[0])


def spanned(weight: Tensor, bias: Tensor, inputs: Tensor) -> float:
    """How much of the length of [dW db] is in the span of the inputs [x 1], 0 to 1."""
    whole = torch.cat([weight, bias[:, None]], dim=1)
    length = float(whole.norm())
    if not length:
        return 0.0
    basis = torch.linalg.qr(torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1).T).Q
    outside = float((whole - whole @ basis @ basis.T).norm())
    return max(0.0, 1 - outside / length)


def labels_of(target: Target, head: Head, images: Tensor) -> Tensor:
    """(k,) int64 labels of inputs: dW = gᵀ z of the last layer is solved for g, whose least entry is the label.

    Exact if all inputs are there, and are no more than the layer's features; a guess else.
    """
    layer = target.steps.model.get_submodule(head.name.rpartition(".")[0])
    features = features_of(target.steps, layer, images)
    assert features is not None
    whole, known = head.whole, features.double()
    if head.bias is not None:
        known = torch.cat([known, torch.ones_like(known[:, :1])], dim=1)
    slopes: Tensor = torch.linalg.lstsq(known.T, whole.T, driver="gelsd").solution
    return slopes.argmin(dim=1)
