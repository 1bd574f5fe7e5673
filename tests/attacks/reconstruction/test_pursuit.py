"""The pursuit against the paper's algorithm, on planted problems, and against chance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedllm_sec.attacks.reconstruction.dictionary import Dictionary
from fedllm_sec.attacks.reconstruction.lenses import Exact
from fedllm_sec.attacks.reconstruction.pursuit import Pursuit
from tests.oracles import naive_pursuit


def dictionary(atoms, positions=None, memory=2**30):
    width = atoms.shape[1]
    none = torch.zeros(0, width, dtype=torch.float64)
    return Dictionary(
        source=lambda start, stop: atoms[start:stop].float(),
        size=len(atoms),
        width=width,
        positions=none if positions is None else positions.double(),
        constants=none,
        memory=memory,
        causal=True,
    )


def planted(size, width, rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(size, width, generator=generator).float()
    chosen = torch.randperm(size, generator=generator)[:tokens]
    mixed = torch.randn(rows, tokens, generator=generator).double() @ atoms[chosen].double()
    return atoms, chosen.tolist(), mixed


def exact(rows):
    return Exact([rows], [torch.zeros_like(rows)])


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), tokens=st.integers(1, 10))
@settings(max_examples=25, deadline=None)
def test_the_choices_are_the_papers(seed, rows, tokens):
    """Step by step, against a version that projects everything anew; as long as it leaves something to explain."""
    atoms, _, mixed = planted(120, 40, rows, tokens, seed)
    pursuit = Pursuit(exact(mixed), dictionary(atoms))
    expected, told = naive_pursuit.pursue(mixed.numpy(), atoms.double().numpy(), tokens)
    for choice, score in zip(expected, told, strict=True):
        deficits, _ = pursuit.deficits(pursuit.lens.directions(pursuit.basis))
        assert 1 - float(deficits.min()) == pytest.approx(score, abs=1e-4)
        close = 1 - float(deficits.min()) - (1 - deficits[choice])
        assert close == pytest.approx(0, abs=1e-4)  # the oracle's choice is ours, or one just as near
        pursuit.picks.append(choice)
        pursuit.take(atoms[choice].double()[None])


@given(seed=st.integers(0, 10**6), rows=st.sampled_from([2, 4, 16, 64]), tokens=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_what_was_planted_is_found_and_its_number_is_not_told(seed, rows, tokens):
    """Below half of (width + rows) atoms, far above the rank or far below it: these, and no others."""
    atoms, chosen, mixed = planted(3000, 128, rows, min(tokens, 24 if rows < 4 else 40), seed)
    pursuit = Pursuit(exact(mixed), dictionary(atoms))
    picks = pursuit.run()
    assert {pick.token for pick in picks} == set(chosen)
    assert pursuit.explained > 1 - 1e-6
    assert min(pick.score for pick in picks) > 0.99


def test_the_order_of_rows_and_their_scale_change_nothing():
    atoms, chosen, mixed = planted(1000, 64, 4, 12, 0)
    turned = (mixed * -7.5)[[2, 0, 3, 1]]
    one, other = (Pursuit(exact(rows), dictionary(atoms)).run() for rows in (mixed, turned))
    assert {p.token for p in one} == {p.token for p in other} == set(chosen)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_noise_is_not_taken_for_tokens(rows):
    atoms, _, _ = planted(5000, 128, 1, 1, 0)
    for seed in range(5):
        noise = torch.randn(rows, 128, generator=torch.Generator().manual_seed(100 + seed)).double()
        pursuit = Pursuit(exact(noise), dictionary(atoms))
        assert pursuit.run() == []
        assert pursuit.explained == 0


def test_half_noise_lowers_the_scores_and_the_certificate():
    atoms, chosen, mixed = planted(3000, 128, 16, 20, 1)
    noise = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(2)).double()
    noisy = mixed + 0.3 * mixed.norm() / noise.norm() * noise
    pursuit = Pursuit(exact(noisy), dictionary(atoms))
    picks = pursuit.run()
    found = {pick.token for pick in picks}
    assert found <= set(chosen)
    assert len(found) >= 17
    assert 0.8 < pursuit.explained < 0.97
    assert max(pick.score for pick in picks) < 0.999


def test_the_score_of_a_token_is_what_it_would_be_taken_with_last():
    atoms, chosen, mixed = planted(400, 96, 6, 10, 3)
    noisy = mixed + 0.05 * torch.randn(mixed.shape, generator=torch.Generator().manual_seed(0)).double()
    pursuit = Pursuit(exact(noisy), dictionary(atoms), picks=chosen)
    judged = pursuit.judge()
    taken = [pick.token for pick in judged]
    for pick in judged[::3]:
        expected = naive_pursuit.standing(noisy.numpy(), atoms.double().numpy(), taken, pick.token)
        assert pick.score == pytest.approx(expected, abs=1e-3)


def test_deficits_of_chance_are_beta():
    """The threshold's distribution, by simulation."""
    rng = np.random.default_rng(1)
    width, directions = 60, 7
    drawn = []
    for _ in range(1000):
        space, _ = np.linalg.qr(rng.standard_normal((width, directions)))
        vector = rng.standard_normal(width)
        drawn.append(1 - np.sum((space.T @ vector) ** 2) / (vector @ vector))
    law = stats.beta((width - directions) / 2, directions / 2)
    assert stats.kstest(drawn, law.cdf).pvalue > 0.01
    atoms, _, mixed = planted(1000, width, 1, 1, 0)
    limit = Pursuit(exact(mixed), dictionary(atoms)).chance(directions, 0)
    assert law.cdf(limit) == pytest.approx(1e-3 / 1000)


def test_positions_are_found_with_the_tokens():
    """Where positions are added, those of the longest text are part of the rows."""
    atoms, chosen, mixed = planted(2000, 128, 4, 15, 4)
    positions = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    weights = torch.randn(4, 11, generator=torch.Generator().manual_seed(6)).double()
    rows = mixed + weights @ positions[:11].double()
    pursuit = Pursuit(exact(rows), dictionary(atoms, positions))
    assert {pick.token for pick in pursuit.run()} == set(chosen)
    assert pursuit.length >= 11


def test_the_dictionary_is_walked_in_blocks_to_the_same_end():
    atoms, chosen, mixed = planted(3000, 128, 4, 15, 7)
    asked = []

    def source(start, stop):
        asked.append(stop - start)
        return atoms[start:stop]

    small = 128 * 4 * 500  # bytes of 500 atoms
    walked = Dictionary(source, 3000, 128, *(torch.zeros(0, 128, dtype=torch.float64),) * 2, small, True)
    assert {pick.token for pick in Pursuit(exact(mixed), walked).run()} == set(chosen)
    assert max(asked) == 500


def test_weight_decay_is_found_by_least_squares():
    atoms, chosen, mixed = planted(2000, 128, 8, 30, 8)
    received = torch.randn(8, 128, generator=torch.Generator().manual_seed(9)).double()
    decayed = mixed - 3.0 * received
    assert not Pursuit(Exact([decayed], [received]), dictionary(atoms)).explained
    pursuit = Pursuit(Exact([decayed], [received], decay=True), dictionary(atoms))
    assert {pick.token for pick in pursuit.run()} == set(chosen)
    assert pursuit.explained > 1 - 1e-6
