"""The edges of every defense: few clients, equal rows, zero rows, bad parameters, chains."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_sec import InputError, Round, aggregate, defense
from tests.conftest import dense
from tests.defenses.test_laws import gather, honest, setting
from tests.oracles import naive

# A method's parameters with f = 1, and the smallest number of clients with which it can work.
SMALLEST = {
    "krum": ({"f": 1}, 4),
    "bulyan": ({"f": 1}, 7),
    "mda": ({"f": 1}, 3),
    "cge": ({"f": 1}, 3),
    "dnc": ({"f": 1}, 3),
    "nnm": ({"f": 1}, 3),
    "bucketing": ({}, 1),
    "rfa": ({}, 1),
    "geometric_median": ({"f": 1}, 3),
    "median": ({}, 1),
    "trimmed_mean": ({"f": 1}, 3),
    "slsgd": ({"f": 1}, 3),
    "norm_clipping": ({}, 1),
    "centered_clipping": ({}, 1),
    "weak_dp": ({"std": 1e-12}, 1),
    "robust_learning_rate": ({"threshold": 4}, 4),
    "residual_reweighting": ({}, 3),
    "crfl": ({"norm": 1e6, "std": 1e-12}, 1),
    "three_sigma": ({}, 1),
    "cross_round": ({}, 1),
    "foolsgold": ({}, 1),
    "fltrust": ({}, 1),
    "flame": ({"std": 1e-12}, 1),
}
EVERY = pytest.mark.parametrize("name", SMALLEST)
ROW = np.random.default_rng(11).normal(size=12) + 1
WITHOUT_F = ["krum", "bulyan", "mda", "cge", "dnc", "nnm", "geometric_median", "trimmed_mean", "slsgd"]


def outcome(chain, rows, counts=None, **known):
    """The row that a chain of (name, parameters) makes of an (n, d) array."""
    methods = [defense.build(name, parameters) for name, parameters in chain]
    return dense(aggregate(gather(rows, counts), setting(np.shape(rows)[1], **known), methods))[0]


def one(name, rows, **known):
    return outcome([(name, SMALLEST[name][0])], rows, **known)


@pytest.mark.parametrize("name", [name for name, (_, least) in SMALLEST.items() if least > 1])
def test_too_few_clients_is_one_error_that_names_the_method_and_n(name):
    least = SMALLEST[name][1]
    for n in range(1, least):
        with pytest.raises(InputError, match=rf"{name}\b.*n={n}\b") as caught:
            one(name, honest(0, n))
        assert "\n" not in str(caught.value)


@EVERY
def test_with_the_fewest_clients_it_works(name):
    assert np.isfinite(one(name, honest(0, SMALLEST[name][1]))).all()


@pytest.mark.parametrize("name", WITHOUT_F)
def test_without_byzantine_clients_it_is_the_mean(name):
    """Except Krum, which keeps one row however honest they are, and SLSGD, which moves by a share of the mean."""
    rows = honest(2, 9)
    mean = rows.mean(axis=0)
    expected = {"krum": naive.multi_krum(rows, 0, 1)[0], "slsgd": 0.95 * mean}.get(name, mean)
    np.testing.assert_allclose(outcome([(name, {"f": 0})], rows), expected, rtol=1e-9)


@EVERY
def test_equal_rows_give_that_row(name):
    trusted = np.linspace(0.5, 1.5, 12)
    expected = {
        "slsgd": 0.95 * ROW,
        "foolsgold": 0 * ROW,  # all are sybils of one another: nobody is trusted
        "fltrust": ROW * np.linalg.norm(trusted) / np.linalg.norm(ROW),  # of the server's own length
    }.get(name, ROW)
    np.testing.assert_allclose(one(name, np.tile(ROW, (11, 1))), expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_foolsgold_trusts_no_crowd_of_clones(seed, n):
    """A cosine of 1 - 1e-16 must not leave one clone a weight of 1e-16, which would then be scaled up to 1."""
    row = np.random.default_rng(seed).normal(size=12)
    np.testing.assert_array_equal(one("foolsgold", np.tile(row, (n, 1))), np.zeros(12))


@pytest.mark.parametrize("name", [name for name, (_, least) in SMALLEST.items() if least == 1])
def test_one_client_alone_is_taken_at_its_word(name):
    scale = np.linalg.norm(np.linspace(0.5, 1.5, 12)) / np.linalg.norm(ROW) if name == "fltrust" else 1
    np.testing.assert_allclose(one(name, ROW[None]), scale * ROW, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("name", "n"), [(name, n) for name, (_, least) in SMALLEST.items() for n in {least, 11}])
def test_zero_updates_give_a_zero_update(name, n):
    """No length, cosine or scale is divided by."""
    np.testing.assert_allclose(one(name, np.zeros((n, 12))), np.zeros(12), atol=1e-9)


@EVERY
def test_some_zero_updates_do_no_harm(name):
    rows = honest(4, 11)
    rows[[2, 5]] = 0
    result = one(name, rows)
    assert np.isfinite(result).all()
    assert np.linalg.norm(result) <= 2 * np.linalg.norm(rows, axis=1).max()


BAD = [
    ("krum", {"f": -1}), ("krum", {"f": 1, "m": 0}), ("bulyan", {"f": -1}), ("bulyan", {"f": 1.5}), ("bulyan", {}),
    ("mda", {"f": -1}), ("mda", {}), ("cge", {"f": -1}), ("dnc", {"f": -1}), ("dnc", {"f": 1, "iterations": 0}),
    ("dnc", {"f": 1, "columns": 0}), ("dnc", {"f": 1, "c": -1.0}), ("nnm", {"f": -1}),
    ("bucketing", {"bucket_size": 0}),
    ("rfa", {"nu": 0.0}), ("rfa", {"nu": float("nan")}), ("rfa", {"iterations": 0}), ("rfa", {"weights": "size"}),
    ("geometric_median", {"f": -1}), ("geometric_median", {"f": 1, "buckets": 0}), ("median", {"f": 1}),
    ("trimmed_mean", {"f": -1}), ("trimmed_mean", {"f": 0.1}), ("slsgd", {"alpha": 1.5}), ("slsgd", {"alpha": -0.1}),
    ("slsgd", {"f": -1}), ("norm_clipping", {"norm": -1.0}), ("norm_clipping", {"norm": float("nan")}),
    ("centered_clipping", {"tau": -1.0}), ("centered_clipping", {"iterations": 0}),
    ("centered_clipping", {"bucket_size": 0}), ("centered_clipping", {"momentum": 1.0}),
    ("centered_clipping", {"momentum": -0.1}), ("weak_dp", {"std": -1.0}), ("weak_dp", {"norm": -1.0}),
    ("weak_dp", {"std": float("nan")}), ("robust_learning_rate", {"threshold": 0}),
    ("robust_learning_rate", {"threshold": "many"}), ("residual_reweighting", {"bound": -1.0}),
    ("residual_reweighting", {"threshold": -0.1}), ("crfl", {"norm": -1.0}), ("crfl", {"std": -1.0}),
    ("crfl", {"std": float("inf")}), ("three_sigma", {"similarity": 2.0}), ("three_sigma", {"bound": float("nan")}),
    ("cross_round", {"similarity": 1.5}), ("cross_round", {"similarity": float("nan")}), ("foolsgold", {"kappa": "x"}),
    ("fltrust", {"trusted": 1}), ("flame", {"std": -1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), BAD)
def test_bad_parameters_are_refused_when_the_defense_is_built(name, parameters):
    with pytest.raises(InputError, match=name):
        defense.build(name, parameters)


@EVERY
def test_unknown_parameters_are_refused_by_name(name):
    with pytest.raises(InputError, match=rf"{name} has no parameter 'byzantine_client_num'"):
        defense.build(name, {**SMALLEST[name][0], "byzantine_client_num": 1})


def test_no_more_groups_than_byzantine_clients_can_spoil():
    for buckets in (2, 4, 12):  # 2f < buckets <= n
        with pytest.raises(InputError, match=r"geometric_median.*buckets"):
            outcome([("geometric_median", {"f": 2, "buckets": buckets})], honest(0, 11))


@pytest.mark.parametrize(("name", "known"), [("fltrust", "trusted"), ("crfl", "reference")])
def test_what_a_method_needs_to_know_is_asked_for(name, known):
    with pytest.raises(InputError, match=rf"(?i){name}.*{known}"):
        one(name, honest(0, 11), **{known: None})


@pytest.mark.parametrize("name", ["fl_wbc", "soteria", "top_k", "update_noise"])
def test_client_side_methods_do_not_pass_for_a_defense_of_the_server(name):
    with pytest.raises(InputError, match="client"):
        outcome([(name, {})], honest(0, 11))


def test_neighbours_mean_then_trimmed_mean():
    rows = honest(0, 11)
    rows[:2] = 1e6
    expected = np.sort(naive.nnm(rows, 2), axis=0)[2:-2].mean(axis=0)
    np.testing.assert_allclose(outcome([("nnm", {"f": 2}), ("trimmed_mean", {"f": 2})], rows), expected, rtol=1e-9)


def test_krum_then_weak_dp_adds_noise_to_the_kept_row():
    rows = np.random.default_rng(0).normal(size=(7, 40_000))
    kept, _ = naive.multi_krum(rows, 1, 1)
    noise = outcome([("krum", {"f": 1}), ("weak_dp", {"std": 0.5})], rows) - kept
    assert noise.std() == pytest.approx(0.5, rel=0.02)  # 5.7 standard errors
    assert abs(noise.mean()) < 0.5 * 5 / np.sqrt(noise.size)


@pytest.mark.parametrize(("first", "second"), [("median", "trimmed_mean"), ("rfa", "bulyan"), ("median", "median")])
def test_two_methods_that_aggregate_are_refused(first, second):
    with pytest.raises(InputError, match="2 of the defenses aggregate"):
        outcome([(first, SMALLEST[first][0]), (second, SMALLEST[second][0])], honest(0, 11))


def test_clipping_then_buckets_then_geometric_median():
    """Buckets of one are a shuffle; with larger ones a huge client spoils a bucket, of ordinary length, and no more."""
    rows = honest(1, 12)
    rows[3] *= 1e9
    clip = ("norm_clipping", {"norm": 2.0})
    clipped = rows * np.minimum(1, 2 / np.linalg.norm(rows, axis=1))[:, None]
    alone = outcome([clip, ("bucketing", {"bucket_size": 1}), ("rfa", {})], rows)
    np.testing.assert_allclose(alone, outcome([("rfa", {})], clipped), rtol=1e-6)
    chain = [clip, ("bucketing", {"bucket_size": 3}), ("rfa", {})]
    assert np.linalg.norm(outcome(chain, rows)) <= 2
    assert not np.allclose(outcome(chain, rows), alone, rtol=1e-3)


def test_twice_the_same():
    rows = honest(2, 11)
    clip, near = ("norm_clipping", {}), ("nnm", {"f": 2})
    np.testing.assert_allclose(outcome([clip, clip], rows), outcome([clip], rows), rtol=1e-9)
    expected = naive.nnm(naive.nnm(rows, 2), 2).mean(axis=0)
    np.testing.assert_allclose(outcome([near, near], rows), expected, rtol=1e-9)


def test_the_order_of_a_chain_is_kept():
    rows = honest(3, 12)
    rows[0] *= 1e6
    clip, buckets = ("norm_clipping", {"norm": 1.0}), ("bucketing", {"bucket_size": 2})
    assert not np.allclose(outcome([clip, buckets], rows), outcome([buckets, clip], rows), rtol=1e-3)


@EVERY
def test_inputs_are_left_alone_and_the_same_seed_gives_the_same_result(name):
    rows = honest(6, 11)
    updates = gather(rows)
    method = defense.build(name, SMALLEST[name][0])
    round = setting(seed=5)
    first, again = [dense(aggregate(updates, round, [method])) for _ in range(2)]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(dense(updates), rows)
    assert updates.num_samples.tolist() == [1.0] * 11


@pytest.mark.parametrize("name", ["bucketing", "geometric_median", "weak_dp", "crfl", "flame"])
def test_chance_is_named_by_the_seed_and_the_round(name):
    """Another seed or another round draws again; buckets of a median show it in what follows."""
    rows = honest(7, 11)
    chain = [(name, {**SMALLEST[name][0], **({"std": 0.1} if "std" in SMALLEST[name][0] else {})})]
    chain += [("median", {})] if name == "bucketing" else []
    methods = [defense.build(*link) for link in chain]
    rounds = [setting(), setting(seed=1), setting(index=2)]
    results = [dense(aggregate(gather(rows), round, methods))[0] for round in rounds]
    assert not any(np.allclose(results[i], results[j], rtol=1e-6) for i, j in [(0, 1), (0, 2), (1, 2)])


def test_a_round_that_knows_nothing_suffices_for_the_others():
    """Nothing but fltrust and crfl needs more than the updates."""
    rows = honest(8, 11)
    for name in SMALLEST.keys() - {"fltrust", "crfl"}:
        bare = aggregate(gather(rows), Round(), [defense.build(name, SMALLEST[name][0])])
        full = aggregate(gather(rows), setting(), [defense.build(name, SMALLEST[name][0])])
        np.testing.assert_array_equal(dense(bare), dense(full), err_msg=name)
