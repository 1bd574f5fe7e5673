"""Deep leakage from gradients, on the network for which the paper's authors show it."""

import pytest
import torch

from fedllm_sec import InputError, attack
from fedllm_sec.attacks.reconstruction.matching import targets
from fedllm_sec.updates import stack_updates
from tests.attacks.reconstruction.small_clients import (
    errors,
    gradient_row,
    lenet,
    looked,
    noise_row,
    perceptron,
    smooth_images,
    threat_on,
    trained_row,
    victim_on,
    weights_of,
)
from tests.oracles import naive_reconstruction as naive

SHAPE = (1, 16, 16)


def client(seed, n=1):
    labels = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:n]
    return lenet(seed), smooth_images(n, 1, 16, 100 + seed), labels


@pytest.mark.parametrize(("seed", "label"), [(0, "joint"), (1, "joint"), (2, "joint"), (0, "idlg")])
def test_a_gradient_gives_its_image_away(seed, label):
    net, x, y = client(seed)
    found = looked("dlg", net, gradient_row(net, x, y), victim_on(net, SHAPE), label=label)
    assert errors(found.images, x)[0].max() < 1e-5
    assert torch.equal(found.labels, y)
    assert found.certain
    assert found.certificate > 0.999
    assert found.images.dtype == torch.float32
    assert "100.00% of the gradient" in found.why or "99.9" in found.why


@pytest.mark.parametrize(
    "known",
    [
        {"learning_rate": 0.01},
        {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"learning_rate": 0.05, "steps": 2},
    ],
    ids=["small step", "decayed", "two steps"],
)
def test_what_the_real_trainer_sends_gives_it_away_too(known):
    net, x, y = client(1)
    victim = victim_on(net, SHAPE, **known)
    found = looked("dlg", net, trained_row(net, x, y, victim), victim, label="idlg")
    assert errors(found.images, x)[0].max() < 1e-5
    assert torch.equal(found.labels, y)
    assert found.certain


def test_of_three_steps_that_are_taken_for_one_less_is_explained():
    net, x, y = client(1)
    victim = victim_on(net, SHAPE, learning_rate=0.05, steps=3)
    row = trained_row(net, x, y, victim)
    found = looked("dlg", net, row, victim, label="idlg", iterations=10, restarts=1, unroll=False)
    assert not found.certain
    assert errors(found.images, x)[0].max() > 1e-3


def test_a_clipped_gradient_gives_it_away_if_the_length_is_told():
    net, x, y = client(1)
    victim = victim_on(net, SHAPE, learning_rate=0.1)
    row = trained_row(net, x, y, victim, max_grad_norm=1.0)
    told = looked("dlg", net, row, victim, label="idlg", max_grad_norm=1.0)
    assert errors(told.images, x)[0].max() < 1e-4
    assert told.certain
    untold = looked("dlg", net, row, victim, label="idlg", iterations=5, restarts=1)
    assert not untold.certain


def test_a_batch_is_found_together():
    net, x, y = client(2, n=2)
    found = looked("dlg", net, gradient_row(net, x, y), victim_on(net, SHAPE, batch_size=2))
    error, order = errors(found.images, x)
    assert error.max() < 1e-4
    assert torch.equal(found.labels, y[order])
    assert found.certain


def test_the_loss_is_the_papers():
    net, x, y = client(1)
    row = gradient_row(net, x, y)
    found = looked("dlg", net, row, victim_on(net, SHAPE), iterations=3, restarts=1, label="idlg")
    made = gradient_row(net, found.images, found.labels)
    wanted = naive.matching_loss(*([-value.double().numpy() for value in each.values()] for each in (made, row)))
    length = naive.matching_loss([-value.double().numpy() for value in row.values()], [0.0] * len(row))
    assert found.loss == pytest.approx(wanted, rel=1e-3)
    assert found.certificate == pytest.approx(1 - (wanted / length) ** 0.5, abs=1e-3)
    assert 0 < found.certificate < 1


def test_noise_is_explained_by_no_image():
    net, x, _ = client(0)
    found = looked("dlg", net, noise_row(net), victim_on(net, SHAPE), iterations=10, restarts=1)
    assert found.certificate < 0.1
    assert not found.certain
    assert "99% are asked for" in found.why
    assert errors(found.images, x)[0].max() > 0.01


def test_a_noisy_gradient_is_not_vouched_for():
    net, x, y = client(1)
    row, noise = gradient_row(net, x, y), noise_row(net, seed=3, scale=0.1)
    noisy = {name: row[name] + noise[name] for name in row}
    found = looked("dlg", net, noisy, victim_on(net, SHAPE), iterations=10, restarts=1)
    assert not found.certain
    assert found.certificate < 0.9


def test_an_update_of_zero_tells_nothing():
    net = lenet(0)
    found = looked("dlg", net, {name: 0 * value for name, value in weights_of(net).items()}, victim_on(net, SHAPE))
    assert (found.certificate, found.certain, found.why) == (0.0, False, "the update is zero: it tells nothing")
    assert found.images.shape == (1, *SHAPE)


def test_more_pixels_than_numbers_are_not_vouched_for():
    net = perceptron(0, hidden=4)
    x, y = smooth_images(40, 1, 8, 0), torch.arange(40) % 10
    victim = victim_on(net, (1, 8, 8), batch_size=40)
    row = gradient_row(net, x, y)
    found = looked("dlg", net, row, victim, iterations=30, restarts=1)
    assert not found.certain


def test_the_same_again_is_the_same_to_the_bit_and_others_start_elsewhere():
    net, x, y = client(1)
    row, victim = gradient_row(net, x, y), victim_on(net, SHAPE)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    few = {"iterations": 2, "restarts": 1}
    one, again = (looked("dlg", net, row, victim, **few) for _ in range(2))
    assert torch.equal(one.images, again.images)
    assert one.loss == again.loss
    assert not torch.equal(one.images, looked("dlg", net, row, victim, seed=1, **few).images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_each_visible_row_has_a_result_of_its_own():
    net, x, y = client(1, n=2)
    rows = [gradient_row(net, x[i : i + 1], y[i : i + 1]) for i in range(2)]
    updates = stack_updates(rows, [1.0, 1.0], ["ann", "bob"])
    found = attack.build("dlg", {"label": "idlg"}).reconstruct_data(
        updates, threat_on(weights_of(net), victim_on(net, SHAPE), clients=2)
    )
    assert [each.client for each in found] == ["ann", "bob"]
    assert [each.method for each in found] == ["dlg", "dlg"]
    for i, each in enumerate(found):
        assert errors(each.images, x[i : i + 1])[0].max() < 1e-5
        assert each.labels.tolist() == [int(y[i])]
        assert each.seconds > 0


def test_a_last_layer_without_a_bias_tells_one_label_only():
    net = perceptron(0, bias=False)
    victim = victim_on(net, (1, 8, 8), batch_size=2)
    with pytest.raises(
        InputError, match=r"dlg: the last layer, 5.weight, has no bias .* not of 2; have labels searched"
    ):
        looked("dlg", net, weights_of(net), victim, label="idlg")
    x, y = smooth_images(1, 1, 8, 0), torch.tensor([6])
    found = looked("dlg", net, gradient_row(net, x, y), victim_on(net, (1, 8, 8)), label="idlg", iterations=1)
    assert found.labels.tolist() == [6]


def test_parameters_are_checked():
    for wrong in ({"iterations": 0}, {"restarts": 0}, {"label": "soft"}, {"max_grad_norm": 0}):
        with pytest.raises(InputError, match=r"dlg\("):
            attack.build("dlg", wrong)


def test_nothing_is_read_before_it_is_needed():
    net = lenet(0)
    read = []
    rows = stack_updates([weights_of(net)], [1.0]).map(lambda block, span: read.append(span) or block)
    (target,) = targets(rows, threat_on(weights_of(net), victim_on(net, SHAPE)), "dlg", examples=None)
    assert not read
    assert target.flat.shape == (sum(value.numel() for value in net.parameters()),)
    assert read


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_three_starts_are_enough(seed):
    net, x, y = client(seed)
    found = looked("dlg", net, gradient_row(net, x, y), victim_on(net, SHAPE))
    assert errors(found.images, x)[0].max() < 1e-3
    assert torch.equal(found.labels, y)
    assert found.certain


@pytest.mark.slow
def test_real_digits_of_a_real_task(shared_data):
    from fedllm_sec.tasks import task

    work = task.build("mnist", {})
    arrays = work.read(str(shared_data / "mnist" / "mnist.npz"), "train").rows([0, 1, 2])
    prepared = work.prepare(arrays.x)
    for i in range(3):
        net = lenet(i, side=28)
        victim = victim_on(net, work.shape, learning_rate=0.1)
        x, y = prepared[i : i + 1], arrays.y[i : i + 1]
        found = looked("dlg", net, trained_row(net, x, y, victim), victim)
        assert errors(found.images, x)[0].max() < 1e-3
        assert torch.equal(found.labels, y)
        assert found.certain
