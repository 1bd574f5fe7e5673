"""Rank-aware order-recursive matching pursuit as its paper has it: dense, float64, nothing updated or blocked."""

import numpy as np


def orth(columns):
    u, values, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, values > 1e-10 * values[0]] if values.size and values[0] > 0 else u[:, :0]


def scores(rows, atoms, taken):
    """|P d|² / |d|² of every atom d beside the span of those taken; P is on the space of what is left of the rows."""
    basis = orth(atoms[taken].T) if taken else np.zeros((atoms.shape[1], 0))
    beside = np.eye(atoms.shape[1]) - basis @ basis.T
    left, own = orth(beside @ rows.T), atoms @ beside
    return np.array([0.0 if i in taken else np.sum((left.T @ d) ** 2) / max(d @ d, 1e-300) for i, d in enumerate(own)])


def pursue(rows, atoms, count):
    """The first `count` choices (Davies and Eldar 2012, Algorithm 3) and the score of each."""
    taken, told = [], []
    for _ in range(count):
        each = scores(rows, atoms, taken)
        taken.append(int(each.argmax()))
        told.append(each.max())
    return taken, told


def standing(rows, atoms, taken, one):
    """The score that an atom would have, were all the others taken."""
    return scores(rows, atoms, [other for other in taken if other != one])[one]
