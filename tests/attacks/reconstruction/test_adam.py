"""What several steps of Adam tell: against torch's own Adam, quadrature and planted inputs."""

import numpy as np
import pytest
import torch
from scipy import integrate

from fedllm_sec.attacks.reconstruction.adam import Adam
from fedllm_sec.attacks.reconstruction.likeliest import without
from fedllm_sec.attacks.reconstruction.rays import curve, one_sided, path, rays

DOUBLE = torch.float64


def torch_adam(gradients, rate, start, dtype=torch.float32):
    """How torch's AdamW moves float32 weights that are given these gradients in turn, by how much."""
    weight = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    for gradient in gradients:
        weight.grad = gradient.to(dtype)
        optimizer.step()
    return (weight.detach() - start).double()


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_the_mean_move_is_adams(steps):
    ratio = torch.linspace(-0.3, 0.3, 61, dtype=DOUBLE)
    gradients = [1e3 * (1 + t * ratio) for t in range(steps)]  # so large that eps is nothing
    moved = torch_adam(gradients, 1.0, torch.zeros(61))
    assert path(ratio, steps, (0.9, 0.999))[0] == pytest.approx((-moved / steps).numpy(), abs=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_what_eps_takes_from_it(steps):
    """eps is 1e-8, gradients are 1e-5: a thousandth of the move."""
    ratio = torch.linspace(-0.3, 0.3, 61, dtype=DOUBLE)
    move, damped = path(ratio, steps, (0.9, 0.999))
    moved = torch_adam([1e-5 * (1 + t * ratio) for t in range(steps)], 1.0, torch.zeros(61), DOUBLE)
    taken = move + moved / steps
    assert taken == pytest.approx((1e-3 * damped).numpy(), rel=0.02, abs=1e-7)


def test_a_curve_gives_what_it_was_made_of():
    told = curve(5)
    x = torch.tensor([-3.0, -0.02, 0.0, 0.05, 2.0], dtype=DOUBLE)
    for found, made in zip(told.at(x), path(x, 5, (0.9, 0.999)), strict=True):
        assert found == pytest.approx(made.numpy(), rel=1e-4)
    assert 0.05 < float(told.ratio[told.peak]) < 0.2


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 40])
def test_gradients_lie_on_a_ray_of_their_moves(steps):
    """Planted gradients of either sign, with changes from nothing to many times themselves."""
    generator = torch.Generator().manual_seed(steps)
    g, size = (torch.randn(1, 4000, generator=generator, dtype=DOUBLE) for _ in range(2))
    g = 1e-3 * g.sign() * g.abs().clamp(min=0.1)
    h = g.abs() * size * 10 ** torch.linspace(-4, 1, 4000, dtype=DOUBLE)
    moved = -torch_adam([g + t * h for t in range(steps)], 1.0, torch.zeros(1, 4000), DOUBLE) / steps
    told = rays(moved, torch.full_like(moved, 1e-9), steps)
    right = told.possible & (told.side == g.sign())

    def nearest(eps):
        missed = (told.ratio * g + eps * told.shift - h).abs() / (g.abs() + h.abs())
        return torch.where(right, missed, torch.inf).amin(dim=0)[0]

    assert float(nearest(1e-8).quantile(0.98)) < 3e-3
    assert float(nearest(1e-8).median()) < 1e-4
    assert float(nearest(1e-8).median()) < float(nearest(0.0).median()) / 2
    assert int(told.possible.sum(dim=0).min()) >= 1


def test_a_move_above_the_peak_is_taken_for_it():
    told = rays(torch.tensor([[1.2, -1.2]], dtype=DOUBLE), torch.full((1, 2), 1e-5, dtype=DOUBLE), 5)
    assert told.possible[:, 0].tolist() == [[True, False], [False, False], [False, True], [False, False]]
    assert all(bool(torch.isfinite(values).all()) for values in (told.ratio, told.shift, told.noise, told.steep))


def test_a_move_smaller_than_any_is_that_of_no_gradient():
    """Two steps of Adam move by an eighth of their most at least, but for eps."""
    told = rays(torch.tensor([[0.01, -0.01]], dtype=DOUBLE), torch.full((1, 2), 1e-5, dtype=DOUBLE), 2)
    assert told.possible[:, 0].tolist() == [[True, False], [False, False], [False, True], [False, False]]
    assert float(told.ratio[0].amax()) < -1e4


@pytest.mark.parametrize("t", [-50.0, -29.0, -9.0, -5.0, -1.0, 0.0, 0.7, 4.0, 12.0])
def test_moments_by_quadrature(t):
    def integral(power):
        """Without exp(-t²/2)."""
        return integrate.quad(lambda z: z**power * np.exp(z * t - z**2 / 2), 0, max(t, 0) + 12, limit=500, epsabs=0)[0]

    mass, mean, variance = one_sided(torch.tensor(t, dtype=DOUBLE))
    first = integral(2) / integral(1)
    assert float(mass) == pytest.approx(np.log(integral(1)) - t * t / 2 - np.log(2 * np.pi) / 2, rel=2e-3)
    assert float(mean) == pytest.approx(first, rel=2e-3)
    assert float(variance) == pytest.approx(integral(3) / integral(1) - first**2, rel=1e-2)


def test_moments_far_away():
    mass, mean, variance = one_sided(torch.tensor([1e8, -1e8], dtype=DOUBLE))
    assert mean.tolist() == [1e8, pytest.approx(2e-8)]
    assert variance.tolist() == [1.0, pytest.approx(2e-16)]
    assert mass[0].item() == pytest.approx(np.log(1e8))


def planted(inputs=40, drift=0.03):
    """Gradients of 8 rows that are combinations of inputs, the moves of five steps, and a basis of the inputs."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(inputs, 384, generator=generator).double()
    first, change = (
        1e-5 * torch.randn(8, len(inputs), generator=generator).double() @ inputs / len(inputs) ** 0.5 for _ in range(2)
    )
    received = 0.05 * torch.randn(8, 384, generator=generator)
    moved = torch_adam([first + drift * t * change for t in range(5)], 1e-4, received)
    noise = torch.full((8, 384), 2e-9, dtype=DOUBLE)
    lens = Adam(moved, torch.ones(384, dtype=DOUBLE), 5e-4, 5, noise)
    return first, moved, lens, torch.linalg.qr(inputs.T)[0]


def cosine(rows, truth):
    return float(((rows * truth).sum(dim=1) / (rows.norm(dim=1) * truth.norm(dim=1))).mean())


def test_several_steps_tell_more_than_signs_and_all_once_the_inputs_are_known():
    first, moved, lens, basis = planted()
    assert cosine(-moved.sign(), first) < 0.81
    assert cosine(lens.rows, first) > 0.84
    before = lens.likelihood
    lens.look(basis, steps=100)
    assert cosine(lens.rows, first) > 0.999
    assert lens.likelihood > before + 1000
    assert lens.explained(basis) > 0.97


def test_an_input_that_is_missing_shows_and_one_that_is_not_there_is_not_missed():
    _, _, lens, basis = planted()
    lens.look(basis, steps=100)
    assert lens.loss(basis[:, 1:]) > 100
    stranger = torch.randn(384, 1, generator=torch.Generator().manual_seed(2)).double()
    more = torch.linalg.qr(torch.cat([basis, stranger], dim=1))[0]
    lens.look(more, steps=100)
    assert lens.loss(more[:, :-1]) < 25


def test_inputs_that_are_not_there_explain_nothing():
    _, _, lens, _ = planted()
    wrong = torch.linalg.qr(torch.randn(384, 100, generator=torch.Generator().manual_seed(3)).double())[0]
    lens.look(wrong, steps=100)
    assert lens.explained(wrong) < 0.35
    assert lens.explained(torch.eye(384, dtype=DOUBLE)[:, :192]) == 0.0  # of so many anything can be made


def test_a_direction_is_taken_out_of_a_basis():
    basis = torch.linalg.qr(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).double())[0]
    direction = basis @ torch.nn.functional.normalize(torch.arange(1.0, 7.0).double(), dim=0)
    left = without(basis, direction)
    assert left.T @ left == pytest.approx(np.eye(5), abs=1e-12)
    assert left @ left.T + torch.outer(direction, direction) == pytest.approx((basis @ basis.T).numpy(), abs=1e-12)
