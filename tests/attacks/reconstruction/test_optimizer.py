"""Which optimizer made an update, from its values."""

import pytest
import torch

from fedllm_sec import InputError, stack_updates
from fedllm_sec.attacks.reconstruction.optimizer import commonest, guesses


def moved(optimizer, steps, rate=3e-4, drift=0.03):
    """What torch's optimizer does to weights whose gradients drift a little."""
    generator = torch.Generator().manual_seed(0)
    first, change = (1e-5 * torch.randn(20_000, generator=generator) for _ in range(2))
    weight = torch.nn.Parameter(0.05 * torch.randn(20_000, generator=generator))
    start = weight.detach().clone()
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]([weight], lr=rate)
    for step in range(steps):
        weight.grad = first + drift * step * change
        made.step()
    return stack_updates([{"w": weight.detach() - start}], [1.0])


@pytest.mark.parametrize("steps", [1, 5])
def test_sgd_and_adam_are_told_apart(steps):
    assert [guess.optimizer for guess in guesses(moved("sgd", steps, rate=0.1), None, None, None)] == ["sgd"]
    assert {guess.optimizer for guess in guesses(moved("adamw", steps), None, None, None)} == {"adamw"}


@pytest.mark.parametrize("steps", [1, 5])
def test_the_learning_rate_and_the_steps_follow_from_one_another(steps):
    updates = moved("adam", steps)
    (by_steps,) = guesses(updates, "adam", None, steps)
    assert by_steps.learning_rate == pytest.approx(3e-4, rel=2e-3)
    (by_rate,) = guesses(updates, "adam", 3e-4, None)
    assert by_rate.steps == steps
    assert not by_rate.told
    assert [guess.steps for guess in guesses(updates, None, None, None)] == [1, 5]  # both are tried


def test_what_is_told_is_taken():
    (guess,) = guesses(moved("sgd", 1), "adamw", 1e-3, 7)
    assert guess == ("adamw", 1e-3, 7, True)
    assert str(guess) == "taken for 7 steps of adamw at a learning rate of 0.001"
    (guess,) = guesses(moved("sgd", 1), None, None, None)
    assert str(guess) == "taken for 1 step of sgd (guessed from the update's values)"


def test_the_mode_is_that_of_the_densest_part():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.rand(1000, generator=generator), 0.7 + 1e-4 * torch.randn(1000, generator=generator)])
    assert commonest(values.double()) == pytest.approx(0.7, abs=1e-4)


def test_an_update_of_zero_is_nobodys():
    updates = stack_updates([{"w": torch.zeros(5)}], [1.0])
    assert [guess.optimizer for guess in guesses(updates, None, None, None)] == ["sgd"]


@pytest.mark.parametrize(
    ("optimizer", "rate", "steps", "told"),
    [
        ("adagrad", None, None, "sgd, adam or adamw"),
        ("adam", -1.0, None, "learning_rate=-1.0: must be above zero"),
        ("adam", 1e-3, 0, "steps=0: must be above zero"),
    ],
)
def test_what_cannot_be_is_refused(optimizer, rate, steps, told):
    with pytest.raises(InputError, match=told):
        guesses(moved("sgd", 1), optimizer, rate, steps)
