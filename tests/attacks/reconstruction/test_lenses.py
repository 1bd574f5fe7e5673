"""What is left of a gradient after one step, against torch's own optimizers."""

import torch

from fedllm_sec.attacks.reconstruction.lenses import Exact, first_step
from tests.attacks.reconstruction.test_adam import torch_adam


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


def test_a_whole_weight_is_kept_as_its_row_space():
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(500, 7, generator=generator).double() @ torch.randn(7, 64, generator=generator).double()
    lens = Exact([wide], [torch.zeros_like(wide)])
    assert lens.rows.shape == (7, 64)
    beside = wide - wide @ torch.linalg.pinv(lens.rows) @ lens.rows
    assert float(beside.norm() / wide.norm()) < 1e-9
