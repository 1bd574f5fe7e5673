"""The order of a text from the coefficients of its tokens and of its positions: planted, and of real reviews."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm_sec.attacks.reconstruction import order as module
from tests.attacks.reconstruction.clients import look, lora_client
from tests.attacks.reconstruction.test_real_models import reviews, tokens

DOUBLE = torch.float64


def order(tokens, positions, noise=1e-4):
    return module.order(tokens, positions, torch.full_like(tokens, noise), torch.full_like(positions, noise))


def planted(text, rows, seed, noise=0.0):
    """Coefficients of a text's tokens, in the order of their first coming, and of its positions."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randn(len(text), rows, generator=generator, dtype=DOUBLE)
    distinct = list(dict.fromkeys(text))
    sums = torch.stack([positions[[p for p, t in enumerate(text) if t == token]].sum(dim=0) for token in distinct])
    sums = sums + noise * torch.randn(sums.shape, generator=generator, dtype=DOUBLE)
    return sums, positions, tuple(distinct.index(token) for token in text)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(0, 1000))
def test_a_planted_text_is_read(text, seed):
    sums, positions, truth = planted(text, 12, seed)
    assert order(sums, positions) == truth


@given(st.permutations(range(9)), st.integers(0, 1000))
def test_noise_of_a_thousandth_does_not_matter_and_that_of_a_half_makes_nothing_up(text, seed):
    sums, positions, truth = planted(text, 6, seed, noise=1e-3)
    assert order(sums, positions, 2e-3) == truth
    sums, positions, truth = planted(text, 6, seed, noise=0.5)
    assert order(sums, positions, 1.0) in (truth, None)


def test_positions_of_several_texts_are_no_text():
    """Where two texts have a token each at a position, its coefficients are their sum."""
    (sums, positions, _), (other_sums, others, _) = (planted(range(6), 4, seed) for seed in (0, 1))
    assert order(torch.cat([sums, other_sums]), positions + others) is None
    assert order(sums, positions[:4]) is None  # two tokens have no position of their own
    assert order(sums[:4], positions) is None


def test_positions_behind_the_text_are_not_missed():
    sums, positions, truth = planted(range(6), 4, 0)
    assert order(sums, torch.cat([positions, 1e-5 * torch.ones(30, 4, dtype=DOUBLE)])) == truth


def test_single_numbers_do_not_tell_where_a_token_is_that_comes_twice():
    sums, positions, truth = planted([0, 1, 2, 3], 1, 0)
    assert order(sums, positions) == truth
    sums, positions, _ = planted([0, 1, 2, 1], 1, 0)
    assert order(sums, positions) is None


def test_what_can_be_read_in_two_ways_is_not():
    """Two tokens twice each, at four positions that all count alike."""
    assert order(torch.full((2, 3), 2.0, dtype=DOUBLE), torch.ones(4, 3, dtype=DOUBLE)) is None


@pytest.mark.parametrize(("words", "r"), [(20, 2), (60, 2), (60, 4)])
def test_a_real_review_is_read_word_for_word_from_a_rank_far_below_its_length(words, r, minilm, shared_data, tmp_path):
    (text,) = tokens(minilm, [[x for x in reviews(shared_data, 900, words) if len(x.split()) >= 0.6 * words][10]])
    sent = lora_client(tmp_path, minilm, [text], kind="bert", r=r)
    found = look(sent)
    assert found.rank == 2 * r < len(text) / 2
    assert found.sentences == (tuple(text),)
    assert found.sentence_scores[0] > 0.99


def test_two_reviews_keep_their_order(minilm, shared_data, tmp_path):
    sent = lora_client(tmp_path, minilm, tokens(minilm, reviews(shared_data, 2, 12)), kind="bert")
    found = look(sent)
    assert {token.id for token in found.tokens} == sent.tokens
    assert found.sentences == ()
