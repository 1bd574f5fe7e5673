"""What Adam's moves tell: against torch's own Adam, quadrature and simulation."""

import numpy as np
import pytest
import torch
from scipy import integrate

from fedllm_sec.attacks.reconstruction.lenses import Adam, Exact, drift, first_step, mean_move, one_sided_moments

DOUBLE = torch.float64


def torch_adam(gradients, rate, start):
    """How torch's AdamW moves float32 weights that are given these gradients in turn."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    for gradient in gradients:
        weight.grad = gradient.float()
        optimizer.step()
    return (weight.detach() - start).double()


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_the_mean_move_is_adams(steps):
    ratio = torch.linspace(-0.3, 0.3, 61, dtype=DOUBLE)
    gradients = [1e3 * (1 + t * ratio) for t in range(steps)]  # so large that eps is nothing
    moved = torch_adam(gradients, 1.0, torch.zeros(61))
    assert mean_move(ratio, steps, (0.9, 0.999)) == pytest.approx((-moved / steps).numpy(), abs=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_the_drift_is_the_inverse(steps):
    """Up to where F has its peak; beyond it another ratio gives the same move, and the nearer to zero is taken."""
    ratio = torch.linspace(-0.2, 0.2, 41, dtype=DOUBLE)
    moved = mean_move(ratio, steps, (0.9, 0.999))
    found = drift(moved, steps, (0.9, 0.999))
    assert mean_move(found, steps, (0.9, 0.999)) == pytest.approx(moved.numpy(), abs=1e-5)
    rising = ratio <= ratio[moved.argmax()] - 0.02
    assert found[rising] == pytest.approx(ratio[rising].numpy(), abs=1e-4)


@pytest.mark.parametrize("t", [-5.0, -1.0, 0.0, 0.7, 4.0, 12.0])
def test_moments_by_quadrature(t):
    def integral(power):
        return integrate.quad(lambda z: z**power * np.exp(-((z - t) ** 2) / 2), 0, max(t, 0) + 12, limit=200)[0]

    mean, square = one_sided_moments(torch.tensor(t, dtype=DOUBLE))
    assert float(mean) == pytest.approx(integral(2) / integral(1), rel=1e-6)
    assert float(square) == pytest.approx(integral(3) / integral(1), rel=1e-6)


def test_the_first_step_gives_the_gradient_away():
    """Adam's first step is said to be the sign of the gradient; eps tells the rest."""
    generator = torch.Generator().manual_seed(0)
    gradient = 1e-5 * torch.randn(4, 384, generator=generator).double()
    received = 0.05 * torch.randn(4, 384, generator=generator)
    rows = first_step(torch_adam([gradient], 3e-4, received), received.double(), 3e-4)
    cosines = (rows * gradient).sum(dim=1) / (rows.norm(dim=1) * gradient.norm(dim=1))
    signs = (gradient.sign() * gradient).sum(dim=1) / (384**0.5 * gradient.norm(dim=1))
    assert float(cosines.min()) > 0.999
    assert float(signs.max()) < 0.85


def test_several_steps_tell_more_than_signs_and_most_once_the_inputs_are_known():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 384, generator=generator).double()
    first, change = (1e-5 * torch.randn(8, 40, generator=generator).double() @ inputs / 40**0.5 for _ in range(2))
    received = 0.05 * torch.randn(8, 384, generator=generator)
    moved = torch_adam([first + 0.03 * t * change for t in range(5)], 1e-4, received)
    lens = Adam(moved, torch.ones(384, dtype=DOUBLE), 5e-4, 5)

    def cosine(rows):
        return float(((rows * first).sum(dim=1) / (rows.norm(dim=1) * first.norm(dim=1))).mean())

    assert cosine(-moved.sign()) < 0.81
    assert cosine(lens.evidence) > 0.84
    before = lens.evidence.clone()
    lens.look(torch.linalg.qr(inputs.T)[0], steps=50)
    assert cosine(lens.rows) > 0.95
    assert torch.equal(lens.evidence, before)  # what is judged by does not lean to what was found


def test_a_whole_weight_is_kept_as_its_row_space():
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(500, 7, generator=generator).double() @ torch.randn(7, 64, generator=generator).double()
    lens = Exact([wide], [torch.zeros_like(wide)])
    assert lens.rows.shape == (7, 64)
    beside = wide - wide @ torch.linalg.pinv(lens.rows) @ lens.rows
    assert float(beside.norm() / wide.norm()) < 1e-9
