"""From updates to gradients, and the client's training as a function of its examples."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedllm_sec import InputError, attack
from fedllm_sec.attacks.reconstruction.gradients import examples_of, gradient, seen_by, shares, tensors
from fedllm_sec.attacks.reconstruction.local_steps import local_steps
from fedllm_sec.models import Shape, model
from fedllm_sec.updates import stack_updates
from fedllm_sec.victim import Victim
from tests.attacks.reconstruction.small_clients import (
    gradient_row,
    looked,
    perceptron,
    seeded,
    smooth_images,
    strided,
    threat_on,
    trained_row,
    victim_on,
    weights_of,
)
from tests.oracles import naive_reconstruction as naive

METHODS = ("dlg", "inverting_gradients", "first_layer", "revealing_labels")


def vector(tensors):
    return torch.cat([value.reshape(-1) for value in (tensors.values() if isinstance(tensors, dict) else tensors)])


def far(found, wanted):
    return float(((vector(found) - vector(wanted)).norm() / vector(wanted).norm()).detach())


def regression(seed=0, features=6, classes=4):
    return seeded(seed, lambda: nn.Sequential(nn.Flatten(), nn.Linear(features, classes)))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_factors_of_weights_and_gradients_have_their_closed_forms(steps):
    rate, momentum, decay = 0.1, 0.9, 0.05
    left = [steps - 1 - t for t in range(steps)]
    plain = shares(Victim(learning_rate=rate, steps=steps))
    assert plain.kept == 1
    assert plain.weights == pytest.approx([rate] * steps)
    rolling = shares(Victim(learning_rate=rate, steps=steps, momentum=momentum))
    assert rolling.weights == pytest.approx([rate * (1 - momentum ** (k + 1)) / (1 - momentum) for k in left])
    decayed = shares(Victim(learning_rate=rate, steps=steps, weight_decay=decay))
    assert decayed.kept == pytest.approx((1 - rate * decay) ** steps)
    assert decayed.weights == pytest.approx([rate * (1 - rate * decay) ** k for k in left])


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.1)])
def test_an_update_tells_the_weighted_mean_of_the_gradients_of_a_naive_sgd(momentum, decay):
    net, rng = regression(), np.random.default_rng(1)
    batches = [(rng.normal(size=(3, 6)), rng.integers(4, size=3)) for _ in range(4)]
    before = [value.double().numpy() for value in weights_of(net).values()]
    after, slopes = naive.local_sgd(*before, batches, 0.2, momentum, decay)
    row = {n: torch.tensor(a - b) for n, a, b in zip(weights_of(net), after, before, strict=True)}
    victim = Victim(learning_rate=0.2, steps=4, batch_size=3, momentum=momentum, weight_decay=decay)
    factors = np.array(shares(victim).weights)
    found = gradient(stack_updates([row], [1.0]), 0, weights_of(net), victim)
    for i, name in enumerate(found):
        wanted = sum(f * slope[i] for f, slope in zip(factors, slopes, strict=True)) / factors.sum()
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "known",
    [
        {"learning_rate": 0.1},
        {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.01},
        {"learning_rate": 1.0},
    ],
)
def test_one_step_of_the_real_trainer_tells_the_gradient_with_its_sign(known):
    net, x, y = strided(0), smooth_images(2, 3, 16, 0), torch.tensor([3, 7])
    victim = Victim(batch_size=2, **known)
    row = trained_row(net, x, y, victim)
    found = gradient(stack_updates([row], [2.0]), 0, weights_of(net), victim)
    true = {name: -value for name, value in gradient_row(net, x, y).items()}
    assert far(found, true) < 3e-5  # the client's weights are float32
    exact = gradient(stack_updates([gradient_row(net, x, y)], [2.0]), 0, weights_of(net), Victim())
    assert all(torch.equal(exact[name], true[name]) for name in true)


CLIENTS = {
    "one example": (1, {"steps": 5}, None),
    "one batch, again and again": (3, {"steps": 3, "batch_size": 3}, None),
    "an epoch of batches": (4, {"steps": 2, "batch_size": 2}, None),
    "epochs whose last batch is short": (3, {"steps": 5, "batch_size": 2}, None),
    "momentum and decay": (4, {"steps": 4, "batch_size": 2, "momentum": 0.9, "weight_decay": 0.1}, None),
    "clipped": (4, {"steps": 3, "batch_size": 2, "momentum": 0.5}, 0.3),
}


@pytest.mark.parametrize(("n", "known", "clip"), CLIENTS.values(), ids=CLIENTS)
@pytest.mark.parametrize("build", [strided, lambda seed: resnet(seed)], ids=["convolutions", "batch norm"])
def test_local_steps_make_of_the_true_examples_what_the_real_trainer_sent(build, n, known, clip):
    net, x, y = build(0), smooth_images(n, 3, 16, 2), torch.arange(n)
    victim = victim_on(net, (3, 16, 16), learning_rate=0.03, **known)
    rows = stack_updates([trained_row(net, x, y, victim, clip)], [float(n)])
    sent = gradient(rows, 0, weights_of(net), victim)
    made = local_steps(rows, victim, weights_of(net), clip, "test").gradient(x, y)
    assert far(made, sent) < 2e-4
    soft = local_steps(rows, victim, weights_of(net), clip, "test").gradient(x, functional.one_hot(y, 10).float())
    assert far(soft, made) < 1e-6


def resnet(seed):
    return seeded(seed, lambda: model.build("resnet20", {})(Shape((3, 16, 16), 10, None)))


def test_the_received_buffers_are_neither_used_up_nor_changed():
    net, x, y = resnet(0), smooth_images(2, 3, 16, 2), torch.arange(2)
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    victim = victim_on(net, (3, 16, 16), batch_size=2, buffers=buffers)
    before = {name: value.clone() for name, value in buffers.items()}
    client = local_steps(stack_updates([gradient_row(net, x, y)], [2.0]), victim, weights_of(net), None, "test")
    first, second = (vector(client.gradient(x, y)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)


def test_several_steps_can_be_differentiated_by_the_examples():
    net = perceptron(0, hidden=8, activation=nn.Tanh)
    victim = victim_on(net, (1, 8, 8), learning_rate=0.5, steps=3)
    rows = stack_updates([gradient_row(net, torch.zeros(1, 1, 8, 8), torch.tensor([1]))], [1.0])
    client = local_steps(rows, victim, weights_of(net), None, "test")
    generator = torch.Generator().manual_seed(0)
    x, along = torch.rand(1, 1, 8, 8, generator=generator), torch.randn(1, 1, 8, 8, generator=generator)

    def loss(x):
        return vector(client.gradient(x, torch.tensor([1]))).square().sum()

    (slope,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    step = 1e-2 * along
    difference = (loss(x.detach() + step) - loss(x.detach() - step)).item() / 2e-2
    assert (slope * along).sum().item() == pytest.approx(difference, rel=1e-2)


def test_dropout_is_left_out():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))
    victim, rows = victim_on(net, (1, 8, 8)), stack_updates([weights_of(net)], [1.0])
    client = local_steps(rows, victim, weights_of(net), None, "test")
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(vector(client.gradient(x, torch.tensor([0]))) for _ in range(2)))
    assert net[2].training  # the victim's own model is left alone


def test_only_the_tensors_that_are_asked_for_are_read():
    rows = stack_updates([{"a": torch.ones(2, 3), "b": torch.zeros(4)}], [1.0])
    read = []
    watched = rows.map(lambda block, span: read.append(span.tensor) or block)
    found = tensors(watched, 0, ["a"])
    assert found.keys() == {"a"}
    assert torch.equal(found["a"], torch.ones(2, 3))
    assert set(read) == {"a"}


@pytest.mark.parametrize(
    ("steps", "size", "claimed", "given", "n", "seen"),
    [
        (1, 4, 1, None, 4, 4),  # a batch, whatever is claimed
        (1, 4, 100, None, 4, 4),
        (5, 1, 1, None, 1, 5),
        (5, 1, 100, None, 5, 5),
        (10, 2, 4, None, 4, 20),
        (3, 4, 6, None, 6, 10),  # 4, 2, 4
        (3, 4, 6, 12, 12, 12),
    ],
)
def test_how_many_examples_a_client_has(steps, size, claimed, given, n, seen):
    victim = Victim(steps=steps, batch_size=size)
    assert examples_of(victim, claimed, given, "test") == n
    assert seen_by(victim, n) == seen


def unread(block, span):
    raise AssertionError("an update was read before all was checked")


def faulty(name, net, victim, reference=None, parameters=None):
    """Run an attack on an update that must not be read."""
    row = stack_updates([weights_of(net)], [1.0]).map(unread)
    return attack.build(name, parameters or {}).reconstruct_data(row, threat_on(reference or weights_of(net), victim))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("known", "message"),
    [
        (None, "is not told how the clients train: give the threat a Victim"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above zero"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_victim_that_is_missing_or_makes_no_sense_is_named(method, known, message):
    net = perceptron(0)
    victim = None if known is None else victim_on(net, (1, 8, 8), **known)
    with pytest.raises(InputError, match=f"{method}.*{message}"):
        faulty(method, net, victim)


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adam"}, "adam are not linear in them: .*optimizer=sgd, or give it gradients"),
        ({"optimizer": "adamw"}, "adamw are not linear"),
        ({"model": None}, r"give the victim its architecture \(Victim.model\)"),
        ({"shape": ()}, "give the victim their shape and the number of classes"),
        ({"classes": 0}, "number of classes"),
        ({"classes": 7}, r"makes \(1, 10\) of 1 inputs, not that many rows of classes=7"),
        ({"shape": (1, 9, 9)}, r"does not take 1 inputs of numbers of shape \(1, 9, 9\)"),
        ({"model": perceptron(0, hidden=50)}, "not of the victim's model: tensor '1.bias' has shape"),
        ({"model": nn.Linear(64, 10)}, "not of the victim's model: tensor 'bias' is missing"),
        ({"buffers": {"mean": torch.zeros(1)}}, "has no buffer 'mean'; leave it out"),
    ],
)
def test_a_victim_that_does_not_fit_is_named_before_an_update_is_read(method, change, message):
    net = perceptron(0)
    known = {"model": net, "shape": (1, 8, 8), "classes": 10, **change}
    with pytest.raises(InputError, match=f"{method}.*{message}"):
        faulty(method, perceptron(0), Victim(**known))


@pytest.mark.parametrize("method", METHODS)
def test_a_global_model_of_another_shape_is_refused(method):
    net = perceptron(0)
    with pytest.raises(InputError, match=f"{method}: the global model has no tensor '.*' of shape"):
        faulty(method, net, victim_on(net, (1, 8, 8)), reference={"strange": torch.zeros(2)})


@pytest.mark.parametrize("method", METHODS)
def test_more_examples_than_were_seen_are_refused(method):
    net = perceptron(0)
    with pytest.raises(InputError, match=rf"{method}\(examples=5\): 2 steps on 2 examples see 4 at most"):
        faulty(method, net, victim_on(net, (1, 8, 8), steps=2, batch_size=2), parameters={"examples": 5})


@pytest.mark.parametrize("method", METHODS[:3])
def test_a_model_of_tokens_is_refused(method):
    net = model.build("lr", {})(Shape((12,), 4, 50))
    with pytest.raises(InputError, match=r"does not take 1 inputs of numbers of shape \(12,\)"):
        faulty(method, net, Victim(model=net, shape=(12,), classes=4))


def test_a_decay_that_leaves_nothing_to_read_is_refused():
    net = perceptron(0)
    victim = victim_on(net, (1, 8, 8), learning_rate=1.0, weight_decay=100.0, steps=2)
    with pytest.raises(InputError, match="no gradient can be read from steps of learning_rate=1"):
        looked("dlg", net, weights_of(net), victim)
