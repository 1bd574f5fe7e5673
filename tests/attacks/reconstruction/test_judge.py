"""What is revealed against the truth: closed forms, cases by hand, and naive versions written from the definitions."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_sec import InputError
from fedllm_sec.attacks.reconstruction.judge import (
    judge_images,
    judge_labels,
    judge_text,
    match_images,
    pixels,
    visible_prefix,
)
from fedllm_sec.attacks.reconstruction.revealed import FoundToken, RevealedImages, RevealedLabels, RevealedText

WHO = ("client_00", "planted", 1.0, True, "it was planted", 0.0)
BLACK_AND_WHITE = (torch.tensor(0.0), torch.tensor(1.0))
texts = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=6).map(tuple), min_size=1, max_size=4)


def images(x, labels=None, loss=0.0):
    return RevealedImages(*WHO, x, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels, loss)


def random_images(n, seed=0, shape=(1, 12, 12)):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))


def text(bag, sentences=()):
    return RevealedText(*WHO, tuple(FoundToken(id, 1.0, 1.0) for id in bag), tuple(map(tuple, sentences)), 1)


def zeros(n):
    return torch.zeros(n, dtype=torch.int64)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("offset", [0.5, 0.1, 1e-3])
def test_an_even_offset_has_closed_forms(offset):
    true = torch.full((1, 1, 16, 16), 0.25, dtype=torch.float64)
    measured = judge_images(images(true + offset), true, zeros(1), BLACK_AND_WHITE)
    assert measured["mse"] == pytest.approx(offset**2)
    assert measured["psnr"] == pytest.approx(-20 * np.log10(offset))
    stable = 0.01**2  # of Wang et al.: flat images have luminance alone
    both = 0.25 * (0.25 + offset)
    assert measured["ssim"] == pytest.approx((2 * both + stable) / (0.25**2 + (0.25 + offset) ** 2 + stable))


def naive_ssim(one, other):
    """Wang et al. 2004, equations 13 to 16, pixel by pixel: windows of 11 x 11 that lie within the image."""
    places = np.arange(-5, 6)
    window = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for row in range(5, one.shape[0] - 5):
        for column in range(5, one.shape[1] - 5):
            x, y = (each[row - 5 : row + 6, column - 5 : column + 6] for each in (one, other))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            both = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


@pytest.mark.parametrize("shape", [(1, 16, 14), (3, 13, 13)])
def test_ssim_is_that_of_the_paper(shape):
    true, found = random_images(1, 1, shape), random_images(1, 2, shape) * 0.3 + random_images(1, 1, shape) * 0.7
    expected = np.mean(
        [naive_ssim(a.double().numpy(), b.double().numpy()) for a, b in zip(true[0], found[0], strict=True)]
    )
    measured = judge_images(images(found), true, zeros(1), BLACK_AND_WHITE)
    assert measured["ssim"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("side", "known"), [(2, False), (3, True), (8, True), (10, True), (11, True)])
def test_small_images_have_a_smaller_window_or_none(side, known):
    true = random_images(2, shape=(1, side, side))
    measured = judge_images(images(true), true, zeros(2), BLACK_AND_WHITE)
    assert ("ssim" in measured) == known
    if known:
        assert measured["ssim"] == pytest.approx(1.0)


def test_inputs_are_brought_back_to_pixels_by_the_bounds():
    raw = random_images(3, shape=(3, 11, 11))
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    bounds = (0 - mean) / std, (1 - mean) / std
    torch.testing.assert_close(pixels((raw - mean) / std, bounds), raw.double(), atol=1e-6, rtol=0)
    noisy = raw + 0.1 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(5))
    plain = judge_images(images(noisy), raw, zeros(3), BLACK_AND_WHITE)
    scaled = judge_images(images((noisy - mean) / std), (raw - mean) / std, zeros(3), bounds)
    assert scaled == pytest.approx(plain, rel=1e-4)


def test_what_lies_outside_is_cut_off_and_what_is_no_number_is_grey():
    true = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    wild = torch.tensor([[[-7.0, float("inf")], [float("-inf"), 1e30]]])
    assert judge_images(images(wild), true, zeros(1), BLACK_AND_WHITE)["mse"] == 0
    nothing = torch.full((1, 2, 2), float("nan"))
    assert judge_images(images(nothing), true, zeros(1), BLACK_AND_WHITE)["mse"] == 0.25


@pytest.mark.parametrize("count", [2, 4, 6])
def test_the_matching_is_the_best_of_all(count):
    """Four true images; of six found ones four count, of two both."""
    true, found = random_images(4, 3, (5, 5)), random_images(count, 4, (5, 5))
    errors = ((found[:, None] - true[None]).double() ** 2).mean(dim=(2, 3)).numpy()
    if count <= 4:
        best = min(np.mean([errors[i, j] for i, j in enumerate(order)]) for order in permutations(range(4), count))
    else:
        best = min(np.mean([errors[i, j] for j, i in enumerate(order)]) for order in permutations(range(count), 4))
    measured = judge_images(images(found), true, zeros(4), BLACK_AND_WHITE)
    assert measured["mse"] == pytest.approx(best)
    assert measured["matched"] == min(count, 4) / 4


def test_labels_are_judged_with_their_images():
    true, order = random_images(4), [2, 0, 3, 1]
    labels = torch.tensor([5, 6, 7, 8])
    assert judge_images(images(true[order], labels[order]), true, labels, BLACK_AND_WHITE)["label_accuracy"] == 1
    said = labels[order].clone()
    said[0] = 5
    assert judge_images(images(true[order], said), true, labels, BLACK_AND_WHITE)["label_accuracy"] == 0.75
    assert [pair.true for pair in match_images(images(true[order]), true, BLACK_AND_WHITE)] == order


@given(st.integers(0, 2**31), st.permutations(range(4)), st.permutations(range(4)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_images_does_not_matter_and_perfect_ones_have_the_best_values(seed, one, other):
    true, labels = random_images(4, seed), torch.tensor([1, 2, 3, 4])
    found = images(random_images(4, seed + 1)[one], labels[one])
    first = judge_images(images(random_images(4, seed + 1), labels), true, labels, BLACK_AND_WHITE)
    assert judge_images(found, true[other], labels[other], BLACK_AND_WHITE) == pytest.approx(first)
    perfect = judge_images(images(true[one], labels[one]), true[other], labels[other], BLACK_AND_WHITE)
    assert perfect == pytest.approx({"matched": 1, "label_accuracy": 1, "mse": 0, "psnr": 150, "ssim": 1})
    assert perfect["psnr"] > first["psnr"]
    assert perfect["ssim"] > first["ssim"]


def test_where_no_image_was_found_nothing_is_said_of_images():
    assert judge_images(images(torch.zeros(0, 1, 4, 4)), random_images(2, shape=(1, 4, 4)), zeros(2)) == {"matched": 0}


def test_without_bounds_the_truth_gives_the_range():
    true = random_images(2) * 6 - 3
    low, high = true.min(), true.max()
    found = images(true + 0.2)
    assert judge_images(found, true, zeros(2)) == judge_images(found, true, zeros(2), (low, high))


@pytest.mark.parametrize(
    ("truth", "message"),
    [(torch.zeros(0, 1, 4, 4), "cannot be compared"), (torch.zeros(2, 3, 4, 4), "cannot be compared"),
     (torch.ones(2, 1, 4, 4), "white is not above black")],
)  # fmt: skip
def test_a_truth_that_does_not_fit_is_told(truth, message):
    with pytest.raises(InputError, match=message):
        judge_images(images(torch.zeros(1, 1, 4, 4)), truth, zeros(2))


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("present", "counts", "truth", "expected"),
    [
        ((1, 4), None, [4, 4, 1], (1, 1, 1, None)),
        ((1, 4), (1, 2), [4, 4, 1], (1, 1, 1, 0)),
        ((1, 4), (0, 1, 0, 0, 2), [4, 4, 1], (1, 1, 1, 0)),  # of all classes
        ((1, 4), (3, 2), [4, 4, 1], (1, 1, 1, 2)),
        ((1, 2), (2, 1), [4, 4, 1], (1 / 2, 1 / 2, 0, 1 + 1 + 2)),
        ((0,), (5,), [4, 4, 1], (0, 0, 0, 8)),
        ((0, 1, 2, 3), None, [1], (1, 1 / 4, 0, None)),
        ((), (), [1], (0, 0, 0, 1)),
    ],
)
def test_labels_by_hand(present, counts, truth, expected):
    measured = judge_labels(RevealedLabels(*WHO, present, counts), torch.tensor(truth))
    names = ("label_recall", "label_precision", "label_exact", "label_count_l1")
    assert measured == {name: value for name, value in zip(names, expected, strict=True) if value is not None}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.randoms())
def test_all_labels_in_any_order_have_the_best_values(truth, random):
    shuffled = random.sample(truth, len(truth))
    present = tuple(sorted(set(truth)))
    found = RevealedLabels(*WHO, present, tuple(truth.count(label) for label in present))
    best = {"label_recall": 1, "label_precision": 1, "label_exact": 1, "label_count_l1": 0}
    assert judge_labels(found, torch.tensor(shuffled)) == best


# ---------------------------------------------------------------- text


def naive_lcs(one, other):
    """By the recursion of its definition."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + naive_lcs(one[1:], other[1:])
    return max(naive_lcs(one[1:], other), naive_lcs(one, other[1:]))


def naive_overlap(one, other, n):
    """How many n-grams agree, each used once."""
    grams = [[tuple(each[i : i + n]) for i in range(len(each) - n + 1)] for each in (one, other)]
    left, agree = list(grams[1]), 0
    for gram in grams[0]:
        if gram in left:
            left.remove(gram)
            agree += 1
    return agree, len(grams[0]), len(grams[1])


def f1(agree, first, second):
    return 2 * agree / (first + second) if agree else 0.0


def naive_scores(true, said):
    if true == said:
        return {"rouge_1": 1, "rouge_2": 1, "rouge_l": 1, "exact": 1, "prefix": 1}
    same = 0
    while same < min(len(true), len(said)) and true[same] == said[same]:
        same += 1
    return {
        "rouge_1": f1(*naive_overlap(true, said, 1)),
        "rouge_2": f1(*naive_overlap(true, said, 2)),
        "rouge_l": f1(naive_lcs(true, said), len(true), len(said)),
        "exact": 0,
        "prefix": same / len(true),
    }


def naive_best(truth, sentences, measure):
    """The best of all ways to match, by trying all of them."""
    scores = [[naive_scores(true, said)[measure] for said in sentences] for true in truth]
    short, long = sorted((len(truth), len(sentences)))
    sums = [
        sum(scores[i][j] if len(truth) <= len(sentences) else scores[j][i] for i, j in enumerate(order))
        for order in permutations(range(long), short)
    ]
    return max(sums) / long


@given(texts, st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=6).map(tuple), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_sentences_are_scored_as_a_naive_judge_does(truth, sentences):
    measured = judge_text(text((), sentences), truth)
    for measure in ("rouge_1", "rouge_2", "rouge_l", "exact", "prefix"):
        assert measured[measure] == pytest.approx(naive_best(truth, sentences, measure)), measure


def test_text_by_hand():
    truth = [(1, 2, 3, 4), (5, 6)]
    measured = judge_text(text([1, 2, 9], [(5, 6), (1, 2, 4)]), truth)
    assert measured == pytest.approx(
        {
            "token_recall": 2 / 6,
            "token_precision": 2 / 3,
            "rouge_1": (6 / 7 + 1) / 2,
            "rouge_2": (2 / 5 + 1) / 2,
            "rouge_l": (6 / 7 + 1) / 2,
            "exact": 1 / 2,
            "prefix": (2 / 4 + 1) / 2,
        }
    )


def test_a_bag_claims_no_order_and_a_sentence_too_many_costs():
    truth = [(1, 2, 3)]
    bag = judge_text(text([1, 2, 3]), truth)
    assert bag == {"token_recall": 1, "token_precision": 1}
    assert judge_text(text([1, 2, 3], [(1, 2, 3), (7, 8)]), truth)["rouge_l"] == 0.5
    assert judge_text(text([1, 2, 3], [(1, 2, 3)]), [*truth, (7, 8)])["exact"] == 0.5


def test_nothing_said_of_something_is_worth_nothing_and_nothing_of_nothing_is_right():
    assert set(judge_text(text([]), [(1, 2)]).values()) == {0.0}
    assert set(judge_text(text([4], [(4,)]), [()]).values()) == {0.0}
    assert set(judge_text(text([], [()]), [()]).values()) == {1.0}


@given(texts, st.randoms())
@settings(max_examples=40, deadline=None)
def test_perfect_texts_in_any_order_have_the_best_values_and_others_words_none(truth, random):
    bag = sorted({token for each in truth for token in each})
    found = text(random.sample(bag, len(bag)), random.sample(truth, len(truth)))
    assert set(judge_text(found, truth).values()) == {1.0}
    others = [tuple(token + 10 for token in each) for each in truth]
    assert set(judge_text(found, others).values()) == {0.0}


@given(texts, texts, st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_texts_and_sentences_does_not_matter(truth, sentences, random):
    bag = [token for each in sentences for token in each]
    first = judge_text(text(dict.fromkeys(bag), sentences), truth)
    shuffled = text(dict.fromkeys(random.sample(bag, len(bag))), random.sample(sentences, len(sentences)))
    assert judge_text(shuffled, random.sample(truth, len(truth))) == pytest.approx(first)


def test_the_last_token_of_a_causal_model_is_not_to_be_seen():
    assert visible_prefix([4, 5, 6], causal=True) == (4, 5)
    assert visible_prefix([4, 5, 6], causal=False) == (4, 5, 6)
    assert visible_prefix([], causal=True) == ()


def test_tokens_are_whole_numbers_and_not_digits():
    """1 2 and 12 have digits in common, but no token."""
    measured = judge_text(text([12], [(12, 3)]), [(1, 2)])
    assert measured["token_recall"] == measured["rouge_1"] == 0
