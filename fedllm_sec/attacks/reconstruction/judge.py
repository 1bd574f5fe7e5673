"""How much of the truth an attack has revealed: its findings compared with what a client really trained on.

All numbers are finite. They are for whoever runs an experiment: an attacker does not have them.

Shapes: n revealed examples, m true ones.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm_sec.attacks.reconstruction.revealed import RevealedImages, RevealedLabels, RevealedText
from fedllm_sec.updates.errors import InputError

Bounds = tuple[Tensor, Tensor]  # black and white, as the model takes them
Matrix = NDArray[np.float64]
GREY = 0.5  # what a pixel counts as that is no number
FINEST = 1e-15  # a squared error below is one of rounding: 150 dB
GAUSSIAN = 11  # pixels of the window of SSIM, with a deviation of 1.5 (Wang et al. 2004, section III C)
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}  # our names, and the library's


class Pair(NamedTuple):
    """A revealed image and the true one that it is taken for.

    Attributes:
        revealed: its place.
        true: the other's.
        mse: mean squared error of pixels from 0 (black) to 1 (white).
        psnr: 10 log10(1 / mse) dB, at most 150.
        ssim: structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861), 1 for equal images; None where
            these are no images, or smaller than 3 x 3.
    """

    revealed: int
    true: int
    mse: float
    psnr: float
    ssim: float | None


def visible_prefix(ids: Sequence[int], causal: bool) -> tuple[int, ...]:
    """The tokens of a text that an update can tell of.

    In a causal language model nobody reads the last token (the position that would has nothing left to predict), and it
    is in no gradient of a layer that reads tokens.
    """
    return tuple(ids[:-1]) if causal else tuple(ids)


def judge_images(
    revealed: RevealedImages, truth: Tensor, labels: Tensor, bounds: Bounds | None = None
) -> dict[str, float]:
    """Compare images with those that were trained on, each with one at most, so that the mean squared error is least.

    Args:
        revealed: n of them.
        truth: (m, *shape) as the model takes them, m >= 1.
        labels: (m,) int64.
        bounds: see `pixels`; None: the least and the greatest value of all the truth.

    Returns:
        `matched`: the share of the true images that are in a pair. Where there are pairs, their means: `mse`, `psnr`
        (dB), `ssim` (see `Pair`), and `label_accuracy`, the share of pairs with the right label.

    Raises:
        InputError: if there is no truth, its shape is another, or it has no range.
    """
    pairs = match_images(revealed, truth, bounds)
    measured = {"matched": len(pairs) / len(truth)}
    if pairs:
        agree = [float(revealed.labels[pair.revealed] == labels[pair.true]) for pair in pairs]
        measured |= {"mse": mean([pair.mse for pair in pairs]), "psnr": mean([pair.psnr for pair in pairs])}
        measured["label_accuracy"] = mean(agree)
    if similar := [pair.ssim for pair in pairs if pair.ssim is not None]:
        measured["ssim"] = mean(similar)
    return measured


def match_images(revealed: RevealedImages, truth: Tensor, bounds: Bounds | None = None) -> list[Pair]:
    """The min(n, m) pairs with the least sum of squared errors, in the order of the revealed images.

    Arguments and errors are those of `judge_images`.
    """
    from scipy.optimize import linear_sum_assignment

    if not len(truth) or revealed.images.shape[1:] != truth.shape[1:]:
        raise InputError(
            f"images of shape {tuple(revealed.images.shape)} cannot be compared with {tuple(truth.shape)}: "
            "give the examples that the client trained on, as the model takes them"
        )
    if not len(revealed.images):
        return []
    bounds = bounds or (truth.min(), truth.max())
    found, true = pixels(revealed.images, bounds), pixels(truth, bounds)
    exact = "donot_use_mm_for_euclid_dist"  # a product of matrices makes 1e-8 of nothing
    errors = torch.cdist(found.flatten(1), true.flatten(1), compute_mode=exact).square() / true[0].numel()
    pairs = []
    for row, column in zip(*linear_sum_assignment(errors.numpy()), strict=True):
        mse = float(errors[row, column])
        psnr = 10 * float(np.log10(1 / max(mse, FINEST)))
        pairs.append(Pair(int(row), int(column), mse, psnr, similarity(found[row], true[column])))
    return pairs


def pixels(x: Tensor, bounds: Bounds) -> Tensor:
    """Inputs as float64 pixels: 0 where they are as `bounds[0]`, 1 as `bounds[1]`; what lies outside is cut off.

    Whoever draws them does so too. What is no number is grey, so that a diverged search neither gains nor fails by it.

    Raises:
        InputError: if white is not above black.
    """
    low, high = (bound.detach().cpu().double() for bound in bounds)
    if not bool((low < high).all()):
        raise InputError("bounds: white is not above black everywhere: give what the model takes for both")
    return ((x.detach().cpu().double() - low) / (high - low)).nan_to_num(nan=GREY).clamp(0, 1)


def similarity(one: Tensor, other: Tensor) -> float | None:
    """SSIM of two images (C, H, W) or (H, W) in 0..1; see `Pair`.

    Images of less than 11 pixels have Gaussian windows no room for: theirs are squares, as large as there is room for.
    """
    from skimage.metrics import structural_similarity

    side = min(one.shape[-2:], default=0)
    if one.dim() not in (2, 3) or side < 3:
        return None
    wang: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    window = wang if side >= GAUSSIAN else {"win_size": side - (side + 1) % 2}
    axis = 0 if one.dim() == 3 else None
    return float(structural_similarity(one.numpy(), other.numpy(), data_range=1.0, channel_axis=axis, **window))


def judge_labels(revealed: RevealedLabels, truth: Tensor) -> dict[str, float]:
    """Compare classes with those of the examples that were trained on.

    Args:
        revealed: which, and how often where the method tells.
        truth: (m,) int64, the label of every example of every batch.

    Returns:
        `label_recall` and `label_precision` of the set of classes, `label_exact`: 1 where that set is right; and, where
        counts were revealed, `label_count_l1`: the sum over all classes of how far the count is off.
    """
    true, present = Counter(truth.tolist()), set(revealed.present)
    measured = {
        "label_recall": share(len(present & true.keys()), len(true), len(present)),
        "label_precision": share(len(present & true.keys()), len(present), len(true)),
        "label_exact": float(present == true.keys()),
    }
    if revealed.counts is not None:
        named = revealed.present if len(revealed.counts) == len(revealed.present) else range(len(revealed.counts))
        found = dict(zip(named, revealed.counts, strict=True))
        off = [abs(found.get(label, 0) - true[label]) for label in {*found, *true}]
        measured["label_count_l1"] = float(sum(off))
    return measured


def judge_text(revealed: RevealedText, truth: Sequence[Sequence[int]]) -> dict[str, float]:
    """Compare tokens and sentences with the texts that were trained on.

    Args:
        revealed: a bag of tokens, and sentences where the method found any.
        truth: token ids of each text, as far as they can be seen (`visible_prefix`).

    Returns:
        `token_recall` and `token_precision` of distinct tokens. Of sentences, where any were found, one text for each,
        so that the sum is greatest, and then divided by the larger number of both (a text that is missing counts as 0,
        and so does a sentence too many): `rouge_1`, `rouge_2`, `rouge_l` (F1; Lin 2004, ROUGE), `exact`, and `prefix`:
        the share of a text that its sentence has right from the beginning to the first error. All are from 0 to 1.
    """
    bag, true = {token.id for token in revealed.tokens}, {token for text in truth for token in text}
    measured = {
        "token_recall": share(len(bag & true), len(true), len(bag)),
        "token_precision": share(len(bag & true), len(bag), len(true)),
    }
    if not revealed.sentences:  # nothing is claimed of their order
        return measured
    rouge = rouge_scores()
    measures = [*ROUGE, "exact", "prefix"]
    table = np.zeros((len(measures), len(truth), len(revealed.sentences)))
    for row, text in enumerate(truth):
        for column, sentence in enumerate(revealed.sentences):
            equal = tuple(text) == tuple(sentence)
            parts = [1.0] * len(ROUGE) if equal else rouge(text, sentence)  # a lone token has no bigram to agree in
            table[:, row, column] = [*parts, float(equal), common_prefix(text, sentence)]
    return measured | {name: assigned(scores) for name, scores in zip(measures, table, strict=True)}


class Spaces:
    """A tokenizer for rouge-score: its texts are token ids with spaces between them."""

    def tokenize(self, text: str) -> list[str]:
        """Split at the spaces."""
        return text.split()


def rouge_scores() -> Callable[[Sequence[int], Sequence[int]], list[float]]:
    """What gives the F1 of ROUGE-1, ROUGE-2 and ROUGE-L of a sentence for a text, both token ids."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE.values()), tokenizer=Spaces())

    def scores(text: Sequence[int], sentence: Sequence[int]) -> list[float]:
        if not set(text) & set(sentence):  # most pairs; the library would fill a table for each
            return [0.0] * len(ROUGE)
        found = scorer.score(" ".join(map(str, text)), " ".join(map(str, sentence)))
        return [float(found[name].fmeasure) for name in ROUGE.values()]

    return scores


def common_prefix(text: Sequence[int], sentence: Sequence[int]) -> float:
    """The share of a text that a sentence begins with."""
    pairs = enumerate(zip(text, sentence, strict=False))
    right = next((place for place, (true, said) in pairs if true != said), min(len(text), len(sentence)))
    return share(right, len(text), len(sentence))


def assigned(scores: Matrix) -> float:
    """The greatest sum of scores with one of each row and column, by the larger number of both; 1 of nothing."""
    from scipy.optimize import linear_sum_assignment

    if not max(scores.shape):
        return 1.0
    return float(scores[linear_sum_assignment(scores, maximize=True)].sum() / max(scores.shape))


def share(part: int, whole: int, other: int) -> float:
    """`part / whole`; of nothing it is 1 where the other side has nothing either, else 0."""
    return part / whole if whole else float(not other)


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return float(np.mean(values))
