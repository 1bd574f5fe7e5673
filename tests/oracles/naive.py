"""Methods written from their papers in plain float64, on dense (n, d) arrays, with no thought for memory."""

import numpy as np


def krum_scores(updates, f):
    """Blanchard et al. 2017, section 4: s(i) = sum over the n - f - 2 closest j != i of |V_i - V_j|^2."""
    n = len(updates)
    scores = []
    for i in range(n):
        distances = sorted(float(((updates[i] - updates[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(distances[: n - f - 2]))
    return np.array(scores)


def multi_krum(updates, f, m):
    """The plain mean of the m rows with the lowest scores, and which they are."""
    kept = sorted(np.argsort(krum_scores(updates, f), kind="stable")[:m].tolist())
    return updates[kept].mean(axis=0), kept


def fedavg(updates, num_samples):
    """McMahan et al. 2017: the mean weighted by sample counts."""
    return np.average(updates, axis=0, weights=num_samples)
