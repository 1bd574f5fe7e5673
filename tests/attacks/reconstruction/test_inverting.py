"""Inverting gradients: images of one step and of several, in bounds, with labels that are known or read."""

import math

import pytest
import torch
from torch import nn

from fedllm_sec import InputError, attack
from fedllm_sec.attacks.reconstruction.inverting import dealt, unturned, variation
from fedllm_sec.updates import stack_updates
from fedllm_sec.victim import Victim
from tests.attacks.reconstruction.small_clients import (
    errors,
    gradient_row,
    looked,
    noise_row,
    perceptron,
    psnr,
    smooth_images,
    strided,
    threat_on,
    trained_row,
    victim_on,
    weights_of,
)
from tests.oracles import naive_reconstruction as naive

NAME = "inverting_gradients"
SHAPE = (3, 16, 16)
PAPER = {"iterations": 600, "total_variation": 1e-3}
SHORT = {"iterations": 200, "total_variation": 1e-3, "restarts": 2}


def client(seed, n=1):
    labels = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:n]
    return strided(seed), smooth_images(n, 3, 16, 50 + seed), labels


@pytest.mark.parametrize(("seed", "signed"), [(0, True), (1, True), (2, True), (0, False)])
def test_a_gradient_gives_its_image_away(seed, signed):
    net, x, y = client(seed)
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE), signed=signed, **PAPER)
    assert psnr(found.images, x) >= 25
    assert torch.equal(found.labels, y)
    assert found.certain
    assert found.certificate > 0.99


def test_less_smoothing_is_sharper():
    net, x, y = client(0)
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE), iterations=600)
    assert psnr(found.images, x) >= 32
    assert found.certificate > 0.998


@pytest.mark.parametrize(
    ("known", "clip"),
    [({"learning_rate": 0.01}, None), ({"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1}, 0.5)],
    ids=["small", "decayed and clipped"],
)
def test_one_step_of_the_real_trainer_gives_it_away_too(known, clip):
    net, x, y = client(1)
    victim = victim_on(net, SHAPE, **known)
    found = looked(NAME, net, trained_row(net, x, y, victim, clip), victim, iterations=400)
    assert psnr(found.images, x) >= 25
    assert torch.equal(found.labels, y)
    assert found.certain


SEVERAL = {
    "one image, two steps": (1, {"learning_rate": 1.0, "steps": 2}),
    "one image, five steps": (1, {"learning_rate": 0.1, "steps": 5}),
    "two images, a batch each": (2, {"learning_rate": 0.3, "steps": 2}),
    "two images, three epochs": (2, {"learning_rate": 0.2, "steps": 3, "batch_size": 2}),
}


@pytest.mark.parametrize(("n", "known"), SEVERAL.values(), ids=SEVERAL)
def test_differentiating_through_the_steps_beats_taking_them_for_one(n, known):
    net, x, y = client(0, n)
    victim = victim_on(net, SHAPE, **known)
    row = trained_row(net, x, y, victim)
    through = looked(NAME, net, row, victim, samples=float(n), **SHORT)
    as_one = looked(NAME, net, row, victim, samples=float(n), unroll=False, **{**SHORT, "restarts": 1})
    assert psnr(through.images, x) > 20
    assert psnr(through.images, x) > psnr(as_one.images, x) + 5
    assert through.certain
    assert not as_one.certain
    assert through.certificate > 0.99 > as_one.certificate
    assert torch.equal(through.labels, y[errors(through.images, x)[1]])


def test_labels_are_dealt_to_batches_as_they_are_and_then_in_other_ways():
    labels, generator = torch.tensor([0, 1, 2, 3]), torch.Generator().manual_seed(0)
    hands = []
    for _ in range(6):
        hands.append(dealt(labels, hands, 2, generator))
    assert torch.equal(hands[0], labels)
    assert (
        len({tuple(tuple(sorted(batch.tolist())) for batch in hand.split(2)) for hand in hands}) == 6
    )  # all there are
    assert torch.equal(dealt(labels, hands, 4, generator).sort().values, labels)


def test_steps_that_are_clipped():
    net, x, y = client(0)
    victim = victim_on(net, SHAPE, learning_rate=0.3, steps=2)
    row = trained_row(net, x, y, victim, max_grad_norm=0.5)
    told = looked(NAME, net, row, victim, max_grad_norm=0.5, **SHORT)
    assert psnr(told.images, x) > 20
    assert told.certain


def test_labels_can_be_given():
    net, x, y = client(2, n=2)
    victim = victim_on(net, SHAPE, batch_size=2)
    row = gradient_row(net, x, y)
    found = looked(NAME, net, row, victim, iterations=300, labels={"client_0": tuple(y.tolist())})
    assert torch.equal(found.labels, y)
    assert psnr(found.images, x) > 20


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"client_1": (0,)}, "there are none of 'client_0'; did you mean 'client_1'"),
        ({"client_0": (0, 1)}, "client_0 has 1 examples, and 2 labels are given"),
        ({"client_0": (10,)}, "client_0: 10 is no class; there are 0 to 9"),
        ({"client_0": (-1,)}, "greater than or equal to 0"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    net = strided(0)
    with pytest.raises(InputError, match=message):
        looked(NAME, net, weights_of(net), victim_on(net, SHAPE), labels=labels)


def test_the_loss_is_the_papers():
    net, x, y = client(1)
    row = gradient_row(net, x, y)
    found = looked(NAME, net, row, victim_on(net, SHAPE), iterations=20, total_variation=0.3)
    made, sent = (
        [-value.double().numpy() for value in each.values()]
        for each in (gradient_row(net, found.images, found.labels), row)
    )
    assert found.loss == pytest.approx(naive.geiping_loss(made, sent, found.images.double().numpy(), 0.3), rel=1e-3)
    assert found.certificate == pytest.approx(1 - math.sqrt(1 - naive.cosine(made, sent) ** 2), abs=1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 4), (1, 1, 4, 1)])
def test_total_variation_is_the_naive_one(shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [naive.total_variation(images.numpy())] if min(shape[2:]) > 1 else []
    wanted = parts[0] if parts else float(images.flatten().diff().abs().mean())
    assert float(variation(images)) == pytest.approx(wanted)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.1, 1.0, 1.5, 2.0, 3.1])
def test_the_certificate_is_one_minus_the_sine(angle):
    away = (math.cos(angle) - 1) ** 2 + math.sin(angle) ** 2
    assert unturned(away) == pytest.approx(1 - math.sin(angle) if angle < math.pi / 2 else 0.0, abs=1e-9)


def test_images_stay_within_bounds_that_may_differ_by_channel():
    net, x, y = client(0)
    low, high = torch.tensor([-1.0, 0.0, 0.2])[:, None, None], torch.tensor([0.5, 0.1, 0.9])[:, None, None]
    victim = Victim(model=net, shape=SHAPE, classes=10, bounds=(low, high))
    found = looked(NAME, net, gradient_row(net, x, y), victim, iterations=30)
    assert bool(((found.images >= low) & (found.images <= high)).all())
    free = looked(NAME, net, gradient_row(net, x, y), Victim(model=net, shape=SHAPE, classes=10), iterations=30)
    assert bool((free.images < -1).any())


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((torch.zeros(5), torch.ones(5)), r"bounds of shapes \(5,\), \(5,\) do not fit inputs of \(3, 16, 16\)"),
        ((torch.tensor(1.0), torch.tensor(0.0)), "bounds are the wrong way round: first black, then white"),
    ],
)
def test_bounds_that_do_not_fit_are_named(bounds, message):
    net = strided(0)
    with pytest.raises(InputError, match=message):
        looked(NAME, net, weights_of(net), Victim(model=net, shape=SHAPE, classes=10, bounds=bounds))


def test_inputs_without_rows_and_columns_have_no_total_variation():
    net = nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))
    victim = Victim(model=net, shape=(64,), classes=10)
    with pytest.raises(
        InputError, match=r"total_variation=0.0001\): inputs of shape \(64,\) have no rows and columns; set"
    ):
        looked(NAME, net, weights_of(net), victim)
    assert looked(NAME, net, gradient_row(net, torch.rand(1, 64), torch.tensor([1])), victim, iterations=2,
                  total_variation=0).images.shape == (1, 64)  # fmt: skip


def test_noise_is_explained_by_no_image():
    net, x, _ = client(0)
    found = looked(NAME, net, noise_row(net), victim_on(net, SHAPE), iterations=200)
    assert found.certificate < 0.1
    assert not found.certain
    assert psnr(found.images, x) < 15


def test_an_update_of_zero_tells_nothing():
    net = strided(0)
    row = {name: 0 * value for name, value in weights_of(net).items()}
    found = looked(NAME, net, row, victim_on(net, SHAPE))
    assert (found.certificate, found.certain, found.why) == (0.0, False, "the update is zero: it tells nothing")


def test_the_same_again_is_the_same_to_the_bit_and_others_start_elsewhere():
    net, x, y = client(1)
    row, victim = gradient_row(net, x, y), victim_on(net, SHAPE)
    state = torch.random.get_rng_state()
    one, again, other = (looked(NAME, net, row, victim, iterations=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, again.images)
    assert one.loss == again.loss
    assert not torch.equal(one.images, other.images)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_restarts_keep_the_best():
    net, x, y = client(1)
    row, victim = gradient_row(net, x, y), victim_on(net, SHAPE)
    one, three = (looked(NAME, net, row, victim, iterations=10, restarts=restarts) for restarts in (1, 3))
    assert three.loss <= one.loss


def test_each_visible_row_has_a_result_of_its_own():
    net, x, y = client(1, n=2)
    rows = [gradient_row(net, x[i : i + 1], y[i : i + 1]) for i in range(2)]
    updates = stack_updates(rows, [1.0, 1.0], ["ann", "bob"])
    threat = threat_on(weights_of(net), victim_on(net, SHAPE), clients=2)
    found = attack.build(NAME, {"iterations": 150}).reconstruct_data(updates, threat)
    assert [each.client for each in found] == ["ann", "bob"]
    assert [psnr(each.images, x[i : i + 1]) > 20 for i, each in enumerate(found)] == [True, True]
    assert [int(each.labels) for each in found] == y.tolist()


def test_a_last_layer_without_a_bias_tells_one_label_only():
    net = perceptron(0, bias=False)
    victim = victim_on(net, (1, 8, 8), batch_size=2)
    with pytest.raises(InputError, match=r"the last layer, 5.weight, has no bias .* or give them"):
        looked(NAME, net, weights_of(net), victim)


def test_parameters_are_checked():
    for wrong in ({"iterations": 0}, {"restarts": 0}, {"total_variation": -1}, {"step": 0}, {"labels": "soft"}):
        with pytest.raises(InputError, match=rf"{NAME}\("):
            attack.build(NAME, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_the_bar_holds_for_ten_networks(seed):
    net, x, y = client(seed)
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE), **PAPER)
    assert psnr(found.images, x) >= 25
    assert found.certain


@pytest.mark.slow
def test_real_photographs_of_a_real_task(shared_data):
    from fedllm_sec.tasks import task

    work = task.build("cifar10", {})
    arrays = work.read(str(shared_data / "cifar10" / "cifar10_test_jpg.parquet"), "test").rows([3, 7])
    x = work.prepare(arrays.x)
    black, white = (work.prepare(torch.full((1, *work.shape), value, dtype=torch.uint8))[0] for value in (0, 255))
    for i in range(2):
        net = strided(i, side=32)
        victim = Victim(learning_rate=0.05, model=net, shape=work.shape, classes=10, bounds=(black, white))
        found = looked(NAME, net, trained_row(net, x[i : i + 1], arrays.y[i : i + 1], victim), victim, iterations=1200)
        shown = (found.images - black) / (white - black)
        assert psnr(shown, arrays.x[i : i + 1].float() / 255) > 20
        assert int(found.labels) == int(arrays.y[i])
