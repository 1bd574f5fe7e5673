"""Federated averaging written out, in any precision: no framework, one client after another. All are held to it."""

import torch
from torch import Tensor

from bench_peers.given import Given
from bench_peers.networks import NETWORKS


def naive(given: Given, dtype: torch.dtype) -> dict[str, Tensor]:
    """The final model, float64; clients train in `dtype` and are averaged in float64.

    The float32 one shows how far rounding alone takes a model from the float64 one: training magnifies it.
    """
    model = NETWORKS[given.facts["model"]]().to(dtype)
    x, state = given.x.to(dtype), {name: value.double() for name, value in given.initial.items()}
    shares = torch.from_numpy(given.weights / given.weights.sum())
    for number in range(1, given.facts["rounds"] + 1):
        average = {name: torch.zeros_like(value) for name, value in state.items()}
        for client, share in enumerate(shares):
            model.load_state_dict(state)
            for batch in given.batches(number, client):
                loss = torch.nn.functional.cross_entropy(model(x[batch]), given.y[batch])
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                        parameter.sub_(gradient, alpha=given.facts["learning_rate"])
            for name, value in model.state_dict().items():
                average[name] += share * value.double()
        state = average
    return state
