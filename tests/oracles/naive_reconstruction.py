"""Reconstruction, written from its papers in plain float64: what is minimised, what SGD sends, what a head reveals.

Gradients are lists of arrays. Softmax regression, logits = x Wᵀ + b, is small enough to be differentiated by hand.
"""

import numpy as np
from scipy.optimize import nnls


def matching_loss(made, sent):
    """Zhu et al. 2019, equation 4: the sum over layers of squared distances."""
    return sum(float(((one - other) ** 2).sum()) for one, other in zip(made, sent, strict=True))


def cosine(made, sent):
    """The cosine between two gradients, over all layers together."""
    dot = sum(float((one * other).sum()) for one, other in zip(made, sent, strict=True))
    lengths = [np.sqrt(sum(float((part**2).sum()) for part in whole)) for whole in (made, sent)]
    return dot / (lengths[0] * lengths[1])


def total_variation(images):
    """The mean absolute difference of vertical neighbours, plus that of horizontal ones, of (n, C, H, W)."""
    down, across = [], []
    for image in images:
        for channel in image:
            height, width = channel.shape
            down += [abs(channel[i + 1, j] - channel[i, j]) for i in range(height - 1) for j in range(width)]
            across += [abs(channel[i, j + 1] - channel[i, j]) for i in range(height) for j in range(width - 1)]
    return np.mean(down) + np.mean(across)


def geiping_loss(made, sent, images, weight):
    """Geiping et al. 2020, equation 4."""
    return 1 - cosine(made, sent) + weight * total_variation(images)


def softmax(logits):
    """Probabilities, row by row."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def regression_gradient(weight, bias, x, y):
    """Of the mean cross entropy of softmax regression: for each example (p - e_y) xᵀ, and p - e_y."""
    grad_weight, grad_bias = np.zeros_like(weight), np.zeros_like(bias)
    for example, label in zip(x, y, strict=True):
        slope = softmax((weight @ example + bias)[None])[0]
        slope[label] -= 1
        grad_weight += np.outer(slope, example) / len(x)
        grad_bias += slope / len(x)
    return grad_weight, grad_bias


def local_sgd(weight, bias, batches, rate, momentum=0.0, decay=0.0):
    """What SGD on softmax regression makes of its weights, and the gradient of each step."""
    values, velocity, slopes = [weight.copy(), bias.copy()], [0.0, 0.0], []
    for x, y in batches:
        slopes.append(regression_gradient(*values, x, y))
        for i, slope in enumerate(slopes[-1]):
            velocity[i] = momentum * velocity[i] + slope + decay * values[i]
            values[i] = values[i] - rate * velocity[i]
    return values, slopes


def revealed(gradient, rank, nearest=1e-6):
    """Dang et al. 2021: classes c for which the span of the first `rank` left singular vectors, P, separates row c.

    There is r with (P r)_c < 0 <= (P r)_j for all other j, unless row c of P is a combination of the other rows with
    weights that are not negative (Farkas): non-negative least squares tells, without a linear program.
    """
    left = np.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
    found = set()
    for c in range(len(left)):
        distance = nnls(np.delete(left, c, axis=0).T, left[c], maxiter=100 * len(left))[1]
        if distance > nearest * np.linalg.norm(left[c]):
            found.add(c)
    return found


def counts(probabilities, bias_gradient):
    """n_c = n (mean p_c - db_c), for known (n, C) probabilities."""
    return len(probabilities) * (probabilities.mean(axis=0) - bias_gradient)
