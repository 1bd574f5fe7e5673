"""The Frechet distance of Gaussians: against scipy's matrix square root and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from fedllm_sec.training.frechet import Gaussian, frechet_distance, gaussian, principal_components

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 8)


def covariance(random, k, rank=None):
    factor = random.normal(size=(k, rank or k)) * np.exp(random.normal(size=(k, 1)))
    return factor @ factor.T


def tensors(mean, covariance):
    return Gaussian(torch.tensor(mean), torch.tensor(covariance))


@settings(max_examples=60, deadline=None)
@given(seeds, sizes)
def test_it_is_that_of_the_matrix_square_root_and_is_symmetric(seed, k):
    random = np.random.default_rng(seed)
    (m, n), c, d = random.normal(size=(2, k)), covariance(random, k), covariance(random, k)
    expected = np.square(m - n).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)
    one, other = tensors(m, c), tensors(n, d)
    tolerance = 1e-5 * (1 + np.trace(c + d))  # a square root of a product of ill-conditioned matrices has no more
    assert frechet_distance(one, other) == pytest.approx(expected, abs=tolerance)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), abs=1e-9 * tolerance / 1e-5)


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, st.booleans())
def test_closed_forms(seed, k, singular):
    random = np.random.default_rng(seed)
    m, n = random.normal(size=(2, k))
    c = covariance(random, k, rank=max(k - 1, 1) if singular else k)
    same = frechet_distance(tensors(m, c), tensors(n, c))  # equal covariances: the means alone
    assert same == pytest.approx(np.square(m - n).sum(), abs=1e-7 * (1 + np.trace(c)))
    a, b = random.exponential(size=(2, k)) * (random.random((2, k)) > 0.2)
    turn = np.linalg.qr(random.normal(size=(k, k)))[0]  # covariances that commute: diagonal in some basis
    found = frechet_distance(tensors(m, turn * a @ turn.T), tensors(n, turn * b @ turn.T))
    expected = np.square(m - n).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert found == pytest.approx(expected, abs=1e-6 * (1 + a.sum() + b.sum()))


def test_it_is_the_transport_of_a_sample_in_one_dimension():
    """The 2-Wasserstein distance of two normals on the line, by their quantiles."""
    from scipy.stats import norm

    levels = (np.arange(200_000) + 0.5) / 200_000
    by_quantiles = np.square(norm.ppf(levels, 1, 2) - norm.ppf(levels, -0.5, 0.7)).mean()
    one, other = (tensors(np.array([mean]), np.array([[std**2]])) for mean, std in ((1.0, 2.0), (-0.5, 0.7)))
    assert frechet_distance(one, other) == pytest.approx(by_quantiles, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_distance(value):
    fine = gaussian(torch.rand(9, 3, dtype=torch.float64))
    assert np.isnan(frechet_distance(fine, Gaussian(fine.mean * value, fine.covariance)))
    assert np.isnan(frechet_distance(Gaussian(fine.mean, fine.covariance * value), fine))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 12), st.integers(1, 15))
def test_components_are_those_of_the_singular_value_decomposition(seed, n, d, count):
    """Both ways round: more points than coordinates, and fewer."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, d)) * 3.0 ** -np.arange(d)
    basis = principal_components(torch.tensor(x), count).numpy()
    k = min(count, max(n - 1, 1), d)
    assert basis.shape == (d, k)
    np.testing.assert_allclose(basis.T @ basis, np.eye(k), atol=1e-9)
    values, vectors = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[1:]
    if n == 1:
        return
    kept = np.linalg.norm((x - x.mean(axis=0)) @ basis, axis=0)
    np.testing.assert_allclose(kept, values[:k], rtol=1e-3, atol=1e-6 * values[0])
    np.testing.assert_allclose(abs(vectors[0] @ basis[:, 0]), 1, rtol=1e-3)


@given(seeds, st.integers(1, 20), sizes)
def test_moments_are_numpys(seed, n, k):
    x = np.random.default_rng(seed).normal(size=(n, k))
    found = gaussian(torch.tensor(x))
    np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=1e-12)
    expected = np.cov(x.T).reshape(k, k) if n > 1 else np.zeros((k, k))
    np.testing.assert_allclose(found.covariance, expected, atol=1e-12)
