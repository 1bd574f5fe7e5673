"""Every defense against the naive version of its paper, in float64: one round, without the noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_sec import InputError, Round, aggregate, defense
from tests.conftest import dense, stacked
from tests.oracles import naive, naive_coordinates, naive_history

SEEDS = range(3)


def random_rows(n, d, seed):
    """Clients that broadly agree, two that are far off (one long, one turned round), and honest counts."""
    generator = np.random.default_rng([n, d, seed])
    rows = generator.normal(size=d) + 0.8 * generator.normal(size=(n, d))
    if n > 4:
        rows[generator.integers(n)] *= 6
        rows[generator.integers(n)] *= -1.5
    return rows, generator.integers(1, 60, size=n).astype(float)


def run(name, parameters, rows, counts=None, round=None):
    """The result, computed in blocks of at most seven columns."""
    updates = stacked(rows, counts)
    updates = replace(updates, budget=replace(updates.budget, memory=updates.files * 8 * 4 * 7))
    return dense(aggregate(updates, round or Round(), [defense.build(name, parameters)]))[0]


def same(result, expected, rtol=1e-9):
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=1e-12 * np.abs(expected).max())


def shuffled(round, name, n):
    """The order in which a defense of this name takes n rows."""
    return torch.randperm(n, generator=round.generator(name)).tolist()


# name, parameters, the least n, what the paper's method makes of (rows, counts, round)
ONE_ROUND = [
    ("krum", {"f": 1}, 4, lambda x, c, r: naive.multi_krum(x, 1, 1)[0]),
    ("krum", {"f": 2, "m": 3}, 5, lambda x, c, r: naive.multi_krum(x, 2, 3)[0]),
    ("bulyan", {"f": 0}, 3, lambda x, c, r: naive.bulyan(x, 0)[0]),
    ("bulyan", {"f": 1}, 7, lambda x, c, r: naive.bulyan(x, 1)[0]),
    ("bulyan", {"f": 2}, 11, lambda x, c, r: naive.bulyan(x, 2)[0]),
    ("mda", {"f": 1}, 3, lambda x, c, r: naive.mda(x, 1)[0]),
    ("mda", {"f": 3}, 7, lambda x, c, r: naive.mda(x, 3)[0]),
    ("cge", {"f": 1}, 3, lambda x, c, r: naive.cge(x, 1)[0]),
    ("cge", {"f": 3}, 7, lambda x, c, r: naive.cge(x, 3)[0]),
    ("dnc", {"f": 1}, 3, lambda x, c, r: naive.dnc(x, 1)[0]),
    ("dnc", {"f": 3, "c": 0.5}, 7, lambda x, c, r: naive.dnc(x, 3, 0.5)[0]),
    ("dnc", {"f": 2, "c": 1.6}, 7, lambda x, c, r: naive.dnc(x, 2, 1.6)[0]),
    ("nnm", {"f": 1}, 3, lambda x, c, r: naive.nnm(x, 1).mean(axis=0)),
    ("nnm", {"f": 3}, 7, lambda x, c, r: naive.nnm(x, 3).mean(axis=0)),
    ("bucketing", {}, 2, lambda x, c, r: naive.bucketing(x, 2, shuffled(r, "bucketing", len(x))).mean(axis=0)),
    (
        "bucketing",
        {"bucket_size": 3},
        3,
        lambda x, c, r: naive.bucketing(x, 3, shuffled(r, "bucketing", len(x))).mean(axis=0),
    ),
    ("rfa", {}, 3, lambda x, c, r: naive.weiszfeld(x)),
    ("rfa", {"weights": "samples"}, 3, lambda x, c, r: naive.weiszfeld(x, c)),
    ("rfa", {"nu": 0.5, "iterations": 3}, 3, lambda x, c, r: naive.weiszfeld(x, None, 0.5, 3)),
    ("rfa", {"iterations": 1, "weights": "samples"}, 3, lambda x, c, r: naive.weiszfeld(x, c, iterations=1)),
    (
        "geometric_median",
        {"f": 1},
        3,
        lambda x, c, r: naive.geometric_median_of_means(x, 3, shuffled(r, "geometric_median", len(x))),
    ),
    (
        "geometric_median",
        {"f": 1, "buckets": 5, "nu": 0.1, "iterations": 4},
        5,
        lambda x, c, r: naive.geometric_median_of_means(x, 5, shuffled(r, "geometric_median", len(x)), 0.1, 4),
    ),
    ("median", {}, 1, lambda x, c, r: naive_coordinates.coordinate_median(x)),
    ("trimmed_mean", {"f": 1}, 3, lambda x, c, r: naive_coordinates.trimmed_mean(x, 1)),
    ("trimmed_mean", {"f": 3}, 7, lambda x, c, r: naive_coordinates.trimmed_mean(x, 3)),
    ("slsgd", {}, 3, lambda x, c, r: naive_coordinates.slsgd(x)),
    ("slsgd", {"f": 2, "alpha": 0.5}, 5, lambda x, c, r: naive_coordinates.slsgd(x, 2, 0.5)),
    ("norm_clipping", {}, 1, lambda x, c, r: naive.norm_clipping(x, c)),
    ("norm_clipping", {"norm": 2.5}, 1, lambda x, c, r: naive.norm_clipping(x, c, 2.5)),
    ("weak_dp", {"std": 0.0}, 1, lambda x, c, r: naive.norm_clipping(x, c)),
    ("weak_dp", {"norm": 1.0, "std": 0.0}, 1, lambda x, c, r: naive.norm_clipping(x, c, 1.0)),
    ("robust_learning_rate", {}, 4, lambda x, c, r: naive_coordinates.robust_learning_rate(x, c, 4)),
    ("robust_learning_rate", {"threshold": 2}, 2, lambda x, c, r: naive_coordinates.robust_learning_rate(x, c, 2)),
    ("residual_reweighting", {}, 3, lambda x, c, r: naive_coordinates.residual_reweighting(x)[0]),
    (
        "residual_reweighting",
        {"bound": 0.7, "threshold": 0.5},
        4,
        lambda x, c, r: naive_coordinates.residual_reweighting(x, 0.7, 0.5)[0],
    ),
    ("flame", {"std": 0.0}, 3, lambda x, c, r: naive.flame(x)[0]),
    ("centered_clipping", {}, 1, lambda x, c, r: naive_history.CenteredClipping()(x, range(len(x)))),
    (
        "centered_clipping",
        {"tau": 1.5, "iterations": 4},
        1,
        lambda x, c, r: naive_history.CenteredClipping(1.5, 4)(x, range(len(x))),
    ),
    ("three_sigma", {}, 1, lambda x, c, r: naive_history.ThreeSigma()(x, range(len(x)))[0]),
    ("three_sigma", {"bound": 1.5}, 3, lambda x, c, r: naive_history.ThreeSigma(1.5)(x, range(len(x)))[0]),
    ("foolsgold", {}, 1, lambda x, c, r: naive_history.FoolsGold()(x, range(len(x)))[0]),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("more", "d"), [(0, 9), (1, 40), (4, 40), (5, 3)])
@pytest.mark.parametrize(
    ("name", "parameters", "least", "oracle"),
    ONE_ROUND,
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_one_round(tmp_path, name, parameters, least, oracle, more, d, seed):
    rows, counts = random_rows(least + more, d, seed)
    round = Round(1, tmp_path, seed)
    same(run(name, parameters, rows, counts, round), oracle(rows, counts, round))


@pytest.mark.parametrize(("name", "parameters"), [case[:2] for case in ONE_ROUND if case[2] <= 9])
def test_only_where_it_says_so_do_claimed_counts_weigh(tmp_path, name, parameters):
    weighs = {"norm_clipping", "weak_dp", "robust_learning_rate"}
    by_samples = name in weighs or parameters.get("weights") == "samples"
    rows, _ = random_rows(9, 12, 0)
    plain = run(name, parameters, rows, None, Round(1, tmp_path / "plain"))
    liar = run(name, parameters, rows, [1.0] * 8 + [1e6], Round(1, tmp_path / "liar"))
    assert np.allclose(plain, liar, rtol=1e-12, atol=0) != by_samples


@pytest.mark.parametrize("seed", SEEDS)
def test_the_geometric_median_is_the_minimum_that_another_method_finds(seed):
    rows, counts = random_rows(7, 5, seed)
    result = run("rfa", {"weights": "samples"}, rows, counts)
    other = naive.geometric_median_by_descent(rows, counts)
    np.testing.assert_allclose(result, other, atol=1e-4)
    cost = naive.geometric_median_cost(result, rows, counts)
    assert cost <= naive.geometric_median_cost(other, rows, counts) + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_mixing_and_bucketing_hand_on_the_papers_rows(seed):
    rows, counts = random_rows(9, 12, seed)
    mixed = defense.build("nnm", {"f": 2}).before(stacked(rows, counts), Round())
    np.testing.assert_allclose(dense(mixed), naive.nnm(rows, 2), rtol=1e-9)
    round = Round(4, seed=seed)
    buckets = defense.build("bucketing", {"bucket_size": 4}).before(stacked(rows, counts), round)
    np.testing.assert_allclose(
        dense(buckets), naive.bucketing(rows, 4, shuffled(round, "bucketing", 9)), rtol=1e-9, atol=1e-12
    )
    clipped = defense.build("norm_clipping", {"norm": 3.0}).before(stacked(rows, counts), Round())
    np.testing.assert_allclose(dense(clipped), naive.clip_rows(rows, 3.0)[0], rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_mixing_before_a_robust_mean(seed):
    rows, counts = random_rows(9, 12, seed)
    chain = [defense.build("nnm", {"f": 2}), defense.build("trimmed_mean", {"f": 2})]
    expected = naive_coordinates.trimmed_mean(naive.nnm(rows, 2), 2)
    same(dense(aggregate(stacked(rows, counts), Round(), chain))[0], expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "parameters", "oracle"),
    [
        ("krum", {"f": 2, "m": 4}, lambda x: naive.multi_krum(x, 2, 4)[1]),
        ("mda", {"f": 2}, lambda x: naive.mda(x, 2)[1]),
        ("cge", {"f": 2}, lambda x: naive.cge(x, 2)[1]),
        ("dnc", {"f": 2}, lambda x: naive.dnc(x, 2)[1]),
        ("three_sigma", {}, lambda x: naive_history.ThreeSigma()(x, range(len(x)))[1]),
    ],
)
def test_those_kept_are_the_papers(tmp_path, name, parameters, oracle, seed):
    rows, counts = random_rows(11, 15, seed)
    kept = defense.build(name, parameters).before(stacked(rows, counts), Round(dir=tmp_path, seed=seed))
    assert list(kept.clients) == [f"client_{i}" for i in oracle(rows)]


@pytest.mark.parametrize("seed", range(10))
def test_three_sigma_leaves_two_clients_alone(seed):
    """Both are equally far from their mean: only rounding could tell them apart."""
    rows, _ = random_rows(2, 40, seed)
    same(run("three_sigma", {}, rows), rows.mean(axis=0))


@pytest.mark.parametrize("seed", SEEDS)
def test_dnc_on_some_columns_finds_planted_rows_and_repeats_itself(seed):
    rows = np.random.default_rng(seed).normal(size=(9, 200))
    rows[[2, 5]] += 30
    method = defense.build("dnc", {"f": 2, "iterations": 3, "columns": 40})
    kept = method.before(stacked(rows), Round(seed=seed)).clients
    assert set(kept) == {f"client_{i}" for i in range(9)} - {"client_2", "client_5"}
    outlying = np.random.default_rng(seed).normal(size=(9, 200))
    chosen = [method.before(stacked(outlying), Round(seed=s)).clients for s in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1  # the columns are drawn anew for another seed
    one_draw = defense.build("dnc", {"f": 2, "columns": 40}).before(stacked(outlying), Round()).clients
    assert len(one_draw) == 7


def trusting(reference=None, trusted=None, **options):
    """A round in which the server has a model, or an update of its own."""
    rows = {"reference": reference, "trusted": trusted}
    return Round(**{name: stacked(row[None]) for name, row in rows.items() if row is not None}, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_fltrust(seed):
    rows, counts = random_rows(7, 20, seed)
    trusted = rows.mean(axis=0) + 0.3 * np.random.default_rng(seed).normal(size=20)
    expected, scores = naive.fltrust(rows, trusted)
    assert scores.min() == 0 < scores.max()
    same(run("fltrust", {}, rows, counts, trusting(trusted=trusted)), expected)


def test_fltrust_trusts_nobody_who_points_away_and_none_that_is_zero():
    rows = -np.abs(np.random.default_rng(0).normal(size=(4, 6)))
    rows[3] = 0
    assert not run("fltrust", {}, rows, None, trusting(trusted=np.ones(6))).any()
    rows[0] = 2
    np.testing.assert_allclose(run("fltrust", {}, rows, None, trusting(trusted=np.ones(6))), np.ones(6))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("index", "parameters"), [(1, {}), (7, {"norm": 0.5, "growth": 0.3}), (90, {"norm": 1e3})])
def test_crfl_clips_the_new_model(seed, index, parameters):
    rows, counts = random_rows(5, 20, seed)
    reference = np.random.default_rng(seed).normal(size=20)
    result = run("crfl", {"std": 0.0, **parameters}, rows, counts, trusting(reference, index=index))
    same(result, naive_coordinates.crfl(naive.fedavg(rows, counts), reference, index, **parameters))


@pytest.mark.parametrize(("name", "parameters", "missing"), [("crfl", {}, "reference"), ("fltrust", {}, "trusted")])
def test_what_the_server_must_know_is_asked_for(name, parameters, missing):
    with pytest.raises(InputError, match=name):
        run(name, parameters, np.ones((5, 6)))


@pytest.mark.parametrize("name", ["fl_wbc", "soteria", "top_k", "update_noise"])
def test_defenses_of_the_client_are_no_aggregation(name):
    with pytest.raises(InputError, match="while a client trains"):
        run(name, {}, np.ones((5, 6)))
