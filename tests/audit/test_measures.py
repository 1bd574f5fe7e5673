"""What the statistics say, against products that are formed, in float64 and in the plainest way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedllm_sec.audit import audit_adapters
from fedllm_sec.audit.peers import copies, outliers, robust_z, scores_of, z_of
from fedllm_sec.audit.policy import Thresholds
from tests.audit.corpus import LAYERS, RANK, TARGETS, config, name_of, state, write

SCALING = {"plain": 8 / RANK, "rslora": 8 / RANK**0.5}


def dense(tensors, layer, target, scaling, start=None):
    def product(of):
        a, b = (of[name_of(layer, part, target)].double().numpy() for part in ("lora_A", "lora_B"))
        return scaling * b @ a

    return product(tensors) - (product(start) if start is not None else 0)


def naive(product):
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    shares = s**2 / (s**2).sum()
    shares = shares[shares > 1e-20]
    best = (u[:, :4] * s[:4]) @ vt[:4]
    return {
        "norm": np.linalg.norm(product),
        "top1": shares[0],
        "rank": np.exp(-(shares * np.log(shares)).sum()),
        "kurtosis": (best**4).mean() / (best**2).mean() ** 2,
    }


@pytest.mark.parametrize("how", ["alone", "of a global", "rslora"])
def test_measures_are_those_of_the_products_themselves(tmp_path, how):
    start = state(99) if how == "of a global" else None
    settings = config(use_rslora=how == "rslora")
    states = [state(i, about=start, size=0.01 * (i + 1)) for i in range(3)]
    folders = [write(tmp_path / f"c{i}", each, settings) for i, each in enumerate(states)]
    server = write(tmp_path / "server", start, settings) if start else None
    found = audit_adapters(folders, reference=server).statistics
    scaling = SCALING["rslora" if how == "rslora" else "plain"]
    gram = np.zeros((3, 3))
    for layer in range(LAYERS):
        for target in TARGETS:
            column = found.modules.index(f"gpt_neox.layers.{layer}.{target}")
            products = [dense(each, layer, target, scaling, start) for each in states]
            gram += [[(one * other).sum() for other in products] for one in products]
            for row, each in enumerate(products):
                for name, value in naive(each).items():
                    assert found.measures[name][row, column] == pytest.approx(value, rel=1e-6), name
                a, b = (float(states[row][name_of(layer, p, target)].double().norm()) for p in ("lora_A", "lora_B"))
                assert found.measures["gauge"][row, column] == pytest.approx(np.log10(b / a), rel=1e-6)
                if start is not None:
                    slack, aligned = of_factors(states[row], start, layer, target, scaling, each)
                    assert found.measures["slack"][row, column] == pytest.approx(slack, rel=1e-6)
                    assert found.measures["aligned"][row, column] == pytest.approx(aligned, rel=1e-6)
    assert found.gram == pytest.approx(gram, rel=1e-6)


def of_factors(tensors, start, layer, target, scaling, product):
    a, b, ga, gb = (
        each[name_of(layer, part, target)].double().numpy()
        for each in (tensors, start)
        for part in ("lora_A", "lora_B")
    )
    norm = np.linalg.norm
    allowed = scaling * (norm(b - gb) * (norm(a - ga) + norm(ga)) + norm(gb) * norm(a - ga))
    return allowed / norm(product), (a * ga).sum() / norm(a) / norm(ga)


def test_signs_are_counted_against_the_majority_of_the_others(tmp_path):
    start = state(99)
    states = [state(i, about=start) for i in range(5)]
    folders = [write(tmp_path / f"c{i}", each) for i, each in enumerate(states)]
    found = audit_adapters(folders, reference=write(tmp_path / "server", start)).statistics
    rows = np.stack(
        [np.concatenate([np.sign(s[k].double() - start[k].double()).numpy().ravel() for k in start]) for s in states]
    )
    for row in range(5):
        others = np.sign(np.delete(rows, row, 0).sum(0))
        counted = (others != 0) & (rows[row] != 0)
        assert found.scores["signs"][row] == pytest.approx((rows[row] == others)[counted].mean(), abs=1e-12)


def vectors(seed, n=9, d=6):
    return np.random.default_rng(seed).normal(size=(n, d)) + 1.0


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_vectors_themselves(seed):
    x = vectors(seed)
    unknown = np.full(len(x), np.nan)
    found = scores_of(x @ x.T, unknown, unknown)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert found["norm"] == pytest.approx(np.log10(np.linalg.norm(x, axis=1)))
    centre = minimize(lambda p: np.linalg.norm(unit - p, axis=1).sum(), unit.mean(0), options={"gtol": 1e-9}).x
    for row in range(len(x)):
        others = np.delete(unit, row, 0)
        mean = others.sum(0)
        assert found["cosine"][row] == pytest.approx(unit[row] @ mean / np.linalg.norm(mean))
        nearest = np.sort(((others - unit[row]) ** 2).sum(1))[: len(x) // 2]
        assert found["krum"][row] == pytest.approx(nearest.mean())
        assert found["median"][row] == pytest.approx(np.linalg.norm(unit[row] - centre), abs=1e-4)
    assert np.isnan(found["signs"]).all()


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_scores_of_directions_do_not_depend_on_lengths_or_order(seed, scale):
    x = vectors(seed % 97)
    factors = np.random.default_rng(seed).uniform(0.1, 10, size=(len(x), 1))
    order = np.random.default_rng(seed).permutation(len(x))
    unknown = np.full(len(x), np.nan)
    one, other = (scores_of(y @ y.T, unknown, unknown) for y in (x, (scale * factors * x)[order]))
    for name in ("cosine", "median", "krum"):
        assert other[name] == pytest.approx(one[name][order], abs=1e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=30), st.floats(1e4, 1e9))
def test_no_single_value_moves_the_scale_of_a_robust_z_score(values, huge):
    z = robust_z(np.array([*values, huge]), 1.0)
    assert z[-1] == z.max()
    spread = np.ptp(values)
    assert z[-1] >= (huge - 1e3 - spread) / (1.4826 * spread + 1.0) * 0.5


def test_z_scores_are_refused_of_few_and_unknown_ones_do_not_count():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, np.nan])
    assert z_of({"krum": values}, 8) == {}
    z = z_of({"krum": np.append(values, 100.0)}, 8)["krum"]
    assert np.isnan(z[7])
    assert z[8] > 6
    assert [fault.rule for fault in outliers({"krum": values}, {"krum": np.full(8, 7.0)}, 0, Thresholds())] == ["P006"]


def test_an_update_of_length_zero_is_no_direction_and_no_copy():
    x = vectors(0)
    x[3] = x[5] = 0
    unknown = np.full(len(x), np.nan)
    found = scores_of(x @ x.T, unknown, unknown)
    assert all(np.isnan(found[name][3]) for name in ("norm", "cosine", "median", "krum"))
    rest = np.delete(x, [3, 5], 0)
    assert np.delete(found["krum"], [3, 5]) == pytest.approx(scores_of(rest @ rest.T, unknown[:7], unknown[:7])["krum"])
    assert copies(x @ x.T, tuple("abcdefghi"), Thresholds()) == {}


def test_memory_does_not_change_what_is_found(tmp_path):
    start = state(99)
    folders = [write(tmp_path / f"c{i}", state(i, about=start)) for i in range(9)]
    server = write(tmp_path / "server", start)
    much, little = (audit_adapters(folders, reference=server, memory=m).statistics for m in ("512MiB", "1MiB"))
    assert little.gram == pytest.approx(much.gram, rel=1e-9)
    for name, values in much.measures.items():
        assert little.measures[name] == pytest.approx(values, rel=1e-9, nan_ok=True)
