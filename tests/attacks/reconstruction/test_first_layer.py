"""Inputs of a linear first layer: exact for one example, and what of several can be told."""

import pytest
import torch
from torch import nn

from fedllm_sec import InputError, attack
from fedllm_sec.attacks.reconstruction.first_layer import WITNESSES
from fedllm_sec.models import Shape, model
from fedllm_sec.updates import stack_updates
from tests.attacks.reconstruction.small_clients import (
    errors,
    gradient_row,
    looked,
    noise_row,
    perceptron,
    seeded,
    smooth_images,
    strided,
    threat_on,
    trained_row,
    victim_on,
    weights_of,
)

NAME = "first_layer"
SHAPE = (1, 8, 8)
ACTIVATIONS = [nn.ReLU, nn.Sigmoid, nn.GELU]


def client(seed, n=1, activation=nn.ReLU, **known):
    labels = torch.randint(10, (n,), generator=torch.Generator().manual_seed(seed))
    return perceptron(seed, activation=activation, **known), smooth_images(n, 1, 8, seed), labels


def most(found, true):
    """The largest difference of a pixel."""
    return float((found - true).abs().max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_one_example_is_exact(seed, activation):
    net, x, y = client(seed, activation=activation)
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE))
    assert most(found.images, x) < 1e-5
    assert torch.equal(found.labels, y)
    assert found.certain
    assert found.certificate > 0.9999
    assert found.images.dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("known", "least"),
    [
        ({"learning_rate": 0.1}, 1e-5),
        ({"learning_rate": 0.01}, 1e-4),  # what is sent is weights in float32: the smaller the step, the coarser
        ({"learning_rate": 0.1, "steps": 5, "momentum": 0.9}, 1e-5),
        ({"learning_rate": 0.1, "steps": 5, "momentum": 0.9, "weight_decay": 0.01}, 1e-5),
    ],
)
def test_what_the_real_trainer_sends_is_as_exact_as_its_rounding(known, least, activation):
    net, x, y = client(1, activation=activation)
    victim = victim_on(net, SHAPE, **known)
    found = looked(NAME, net, trained_row(net, x, y, victim), victim)
    assert most(found.images, x) < least
    assert torch.equal(found.labels, y)
    assert found.certain


def test_each_row_is_the_input_times_its_bias():
    """Proposition 3.1, in float64, for a layer whose gradient is known in closed form: softmax regression."""
    net = seeded(0, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    x, y = smooth_images(1, 1, 8, 0), torch.tensor([4])
    row = gradient_row(net, x, y)
    for weight, bias in zip(row["1.weight"].double(), row["1.bias"].double(), strict=True):
        torch.testing.assert_close(weight / bias, x.double().flatten(), rtol=1e-5, atol=1e-6)
    found = looked(NAME, net, row, victim_on(net, SHAPE))
    assert most(found.images, x) < 1e-5
    assert found.labels.tolist() == [4]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_units_that_are_open_for_one_example_alone_tell_it_exactly(n, seed):
    net, x, y = client(10 + seed, n, hidden=200)
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE, batch_size=n))
    error, order = errors(found.images, x)
    assert error.max() < 1e-10
    assert found.certain
    assert f"{len(found.images)} of {n} examples: at least" in found.why
    if len(found.images) == n:
        assert torch.equal(found.labels, y[order])
        assert found.certificate > 0.999


def test_all_of_two_are_found_and_after_several_steps_as_well():
    net, x, y = client(12, 2, hidden=200)
    victim = victim_on(net, SHAPE, batch_size=2, learning_rate=0.1, steps=3)
    for row, known in ((gradient_row(net, x, y), victim_on(net, SHAPE, batch_size=2)),
                       (trained_row(net, x, y, victim), victim)):  # fmt: skip
        found = looked(NAME, net, row, known)
        error, order = errors(found.images, x)
        assert len(found.images) == 2
        assert error.max() < 1e-9
        assert torch.equal(found.labels, y[order])
        assert found.certificate > 0.999


def test_nothing_that_is_vouched_for_of_a_batch_is_a_mixture():
    """Two hundred batches: how many images are returned, and that each of them is a client's."""
    returned = 0
    for seed in range(40):
        for n in (2, 3, 4, 6, 8):
            net, x, y = client(seed, n, hidden=60)
            found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE, batch_size=n))
            if found.certain:
                returned += len(found.images)
                assert errors(found.images, x)[0].max() < 1e-8, (seed, n)
    assert returned > 100


@pytest.mark.parametrize("net", [perceptron(0, activation=nn.Sigmoid), perceptron(1, activation=nn.GELU),
                                 seeded(0, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))])  # fmt: skip
def test_a_mixture_is_not_vouched_for(net):
    x, y = smooth_images(4, 1, 8, 0), torch.arange(4)
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE, batch_size=4))
    assert found.images.shape == (1, *SHAPE)
    assert not found.certain
    assert found.why == f"a mixture of 4 examples: no {WITNESSES} units tell the same"
    assert found.certificate < 0.9


@pytest.mark.parametrize("n", [1, 4])
def test_noise_is_not_vouched_for(n):
    net = perceptron(0)
    found = looked(NAME, net, noise_row(net), victim_on(net, SHAPE, batch_size=n))
    assert not found.certain
    assert found.certificate < 0.1


def test_of_a_noisy_gradient_the_certificate_says_how_noisy_it_is():
    net, x, y = client(0)
    row, noise = gradient_row(net, x, y), noise_row(net, 1, scale=1.0)
    share = 0.2 * row["1.weight"].norm() / noise["1.weight"].norm()
    noisy = {name: row[name] + share * noise[name] for name in row}
    found = looked(NAME, net, noisy, victim_on(net, SHAPE))
    assert found.certificate == pytest.approx(0.8, abs=0.05)
    assert not found.certain
    assert found.loss == pytest.approx(1 - found.certificate)


def test_an_update_of_zero_tells_nothing():
    net = perceptron(0)
    row = {name: 0 * value for name, value in weights_of(net).items()}
    for n in (1, 3):
        found = looked(NAME, net, row, victim_on(net, SHAPE, batch_size=n))
        assert (found.certificate, found.certain) == (0.0, False)
        assert found.why == "the layer has not changed: it tells nothing"
        assert bool(found.images.isfinite().all())


class Scaled(nn.Module):
    """Divides its inputs before it reads them."""

    def __init__(self):
        super().__init__()
        self.layers = perceptron(0)

    def forward(self, x):
        return self.layers(x / 255)


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (strided(0), (3, 16, 16), "first layer, 0, is no linear layer with a bias; use dlg or inverting_gradients"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)), SHAPE, "first layer, 1, is no linear layer"),
        (Scaled(), SHAPE, "first layer, layers.1, does not read the inputs as they are; use dlg"),
        (nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)), SHAPE, "does not read the inputs as they"),
    ],
)
def test_another_first_layer_is_refused_before_an_update_is_read(net, shape, message):
    def unread(block, span):
        raise AssertionError("read")

    rows = stack_updates([weights_of(net)], [1.0]).map(unread)
    with pytest.raises(InputError, match=message):
        attack.build(NAME, {}).reconstruct_data(rows, threat_on(weights_of(net), victim_on(net, shape)))


def test_a_model_that_is_a_single_layer():
    net = seeded(0, lambda: nn.Linear(64, 10))
    x, y = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([7])
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, (64,)))
    assert most(found.images, x) < 1e-5
    assert found.labels.tolist() == [7]


def test_the_same_again_is_the_same_to_the_bit_and_rows_are_apart():
    net, x, y = client(0, 2)
    rows = stack_updates([gradient_row(net, x[i : i + 1], y[i : i + 1]) for i in range(2)], [1.0, 1.0])
    threat = threat_on(weights_of(net), victim_on(net, SHAPE), clients=2)
    state = torch.random.get_rng_state()
    one, again = (attack.build(NAME, {}).reconstruct_data(rows, threat) for _ in range(2))
    for i in range(2):
        assert torch.equal(one[i].images, again[i].images)
        assert most(one[i].images, x[i : i + 1]) < 1e-5
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_real_digit_of_a_real_task(shared_data):
    from fedllm_sec.tasks import task

    work = task.build("mnist", {})
    arrays = work.read(str(shared_data / "mnist" / "mnist.npz"), "train").rows([0])
    net = seeded(0, lambda: model.build("lr", {})(Shape(work.shape, 10, None)))
    victim = victim_on(net, work.shape, learning_rate=0.03, steps=4)
    x = work.prepare(arrays.x)
    found = looked(NAME, net, trained_row(net, x, arrays.y, victim), victim)
    assert most(found.images, x) < 1e-4
    assert torch.equal(found.labels, arrays.y)
    assert found.certain
