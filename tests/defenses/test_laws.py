"""The laws of the defenses: which symmetry or bound holds for which method, and why it does not hold for the others.

Rows are 15 clients by 12 coordinates, f = 3. Where a law fails by a method's own definition the table says so in words.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedllm_sec import Round, aggregate, defense, stack_updates
from fedllm_sec.updates.device import Budget
from tests.conftest import dense

N, F, D = 15, 3, 12
CLAIM = 1e15  # samples: a lie that the gate lets through


class Laws(NamedTuple):
    """What holds for a method; a text is the reason why a law does not hold.

    order: clients may come in any order.
    shift: moving all rows moves the result.
    degree: scaling all rows by c scales the result by c ** degree.
    bound: f rows, however large, cannot make the result longer than this many times the longest honest row.
    counts: "equal": sample counts do not matter; "samples": they weigh as in FedAvg.
    """

    parameters: dict[str, Any]
    order: bool | str
    shift: bool | str
    degree: int | str
    bound: float | str
    counts: str


# Geometric median of k points of which f are anywhere: at most 2 (k - f) / (k - 2f) (Minsker 2015; Chen et al. 2017).
MEDIAN_OF = {k: 2 * (k - F) / (k - 2 * F) for k in (N, 2 * F + 1)}
BOX = np.sqrt(D)  # each coordinate stays among the honest ones
SHUFFLED = "clients are shuffled by place; test_shuffling_methods_do_not_care_where_groups_fall_evenly"
NORMS = "it looks at lengths, measured from the global model"
ANGLES = "it looks at angles, seen from the global model"
NOISE = "its noise has a size of its own"
FOLLOWS = "it prepares rows for what follows, which has to bound them and to weigh them"
LAWS = {
    "krum": Laws({"f": F, "m": 4}, True, True, 1, 1, "equal"),
    "bulyan": Laws({"f": F}, True, True, 1, BOX, "equal"),
    "mda": Laws({"f": F}, True, True, 1, 1, "equal"),
    "cge": Laws({"f": F}, True, NORMS, 1, 1, "equal"),
    "dnc": Laws({"f": F}, True, True, 1, "one singular vector sees one direction: a second attacker hides", "equal"),
    "nnm": Laws({"f": F}, True, True, 1, FOLLOWS, FOLLOWS),
    "bucketing": Laws({"bucket_size": 2}, SHUFFLED, True, 1, FOLLOWS, FOLLOWS),
    "rfa": Laws({}, True, True, 1, MEDIAN_OF[N], "equal"),
    "geometric_median": Laws({"f": F}, SHUFFLED, True, 1, MEDIAN_OF[2 * F + 1], "equal"),
    "median": Laws({}, True, True, 1, BOX, "equal"),
    "trimmed_mean": Laws({"f": F}, True, True, 1, BOX, "equal"),
    "slsgd": Laws({"f": F}, True, "alpha < 1 pulls towards the global model", 1, BOX, "equal"),
    "norm_clipping": Laws({}, True, NORMS, 1, 1, "samples"),
    "centered_clipping": Laws({}, True, "its first centre is the global model", 1, 1, "equal"),
    "weak_dp": Laws({}, True, NORMS, NOISE, 1.5, "samples"),
    "robust_learning_rate": Laws({}, True, "it looks at signs", 1, "it flips the mean and never bounds it", "samples"),
    "residual_reweighting": Laws({}, True, True, 1, 100, "equal"),
    "crfl": Laws({}, True, "the model itself is clipped", NOISE, 1, "FedAvg runs before it"),
    "three_sigma": Laws({}, True, True, 1, "a larger outlier inflates the deviation and masks a smaller one", "equal"),
    "cross_round": Laws({}, True, True, 1, "it compares with the last round: a first one has none", FOLLOWS),
    "foolsgold": Laws({}, True, ANGLES, 1, "it drops those who look alike: a lone attacker looks like nobody", "equal"),
    "fltrust": Laws({}, True, ANGLES, 0, 1, "equal"),
    "flame": Laws({}, True, ANGLES, 1, 1.01, "equal"),
}  # fmt: skip


def where(law: Callable[[Laws], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, laws in LAWS.items() if law(laws)])


def gather(rows, counts=None, clients=None, dtype=torch.float64):
    """A set of updates over two tensors from a dense array."""
    rows = torch.tensor(rows, dtype=dtype)
    cut = rows.shape[1] // 2
    states = [{"a": row[:cut].clone(), "b": row[cut:].clone()} for row in rows]
    return stack_updates(states, [1.0] * len(states) if counts is None else list(counts), clients)


def setting(columns=D, **known) -> Round:
    """A round with what some methods need: a global model, and an update that the server trained itself."""
    reference, trusted = gather(np.full((1, columns), 0.1)), gather(np.linspace(0.5, 1.5, columns)[None])
    return Round(**{"reference": reference, "trusted": trusted, **known})


def outcome(name, updates, parameters=None, **known):
    method = defense.build(name, LAWS[name].parameters if parameters is None else parameters)
    return dense(aggregate(updates, setting(updates.layout.columns, **known), [method]))[0]


def honest(seed, n=N, columns=D):
    """Rows around a common drift, as clients' updates are."""
    return 1 + np.random.default_rng(seed).normal(size=(n, columns))


seeds = st.integers(0, 10_000)
few = settings(max_examples=8, deadline=None)


def test_the_table_names_every_method_that_runs_on_the_server():
    client_side = {"fl_wbc", "soteria", "top_k", "update_noise"}
    assert {entry.name for entry in defense} - client_side - {"clip"} == set(LAWS)


@where(lambda laws: laws.order is True)
@few
@given(seeds)
def test_the_order_of_clients_does_not_matter(name, seed):
    rows = honest(seed)
    if name == "mda":  # sets of one diameter are common, and the first is taken: here only one is smallest
        rows[[1, 6, 9]] += 50 * np.random.default_rng(seed).normal(size=(3, D))
    order = np.random.default_rng(seed).permutation(N)
    counts = np.arange(1.0, N + 1)
    clients = [f"c{i}" for i in range(N)]
    moved = gather(rows[order], counts[order], [clients[i] for i in order])
    np.testing.assert_allclose(outcome(name, moved), outcome(name, gather(rows, counts, clients)), rtol=1e-6, atol=1e-8)


@given(seeds)
@few
def test_shuffling_methods_do_not_care_where_groups_fall_evenly(seed):
    """With buckets that divide n the mean of bucket means is the mean; with buckets of one there is no grouping."""
    rows = honest(seed)
    np.testing.assert_allclose(outcome("bucketing", gather(rows), {"bucket_size": 5}), rows.mean(axis=0), rtol=1e-9)
    alone = outcome("geometric_median", gather(rows), {"f": F, "buckets": N})
    np.testing.assert_allclose(alone, outcome("rfa", gather(rows)), rtol=1e-6)


@where(lambda laws: laws.shift is True)
@few
@given(seeds)
def test_moving_all_rows_moves_the_result(name, seed):
    rows, shift = honest(seed), np.linspace(-2, 2, D)
    expected = outcome(name, gather(rows)) + shift
    np.testing.assert_allclose(outcome(name, gather(rows + shift)), expected, rtol=1e-6, atol=1e-7)


@where(lambda laws: not isinstance(laws.degree, str))
@few
@given(seeds, st.floats(1e-3, 1e3))
def test_scaling_all_rows_scales_the_result(name, seed, scale):
    rows = honest(seed)
    expected = scale ** LAWS[name].degree * outcome(name, gather(rows))
    np.testing.assert_allclose(outcome(name, gather(scale * rows)), expected, rtol=1e-5, atol=1e-7 * scale)


def byzantine(shape, size, seed):
    """f rows of a size: all in one direction, each in its own, or in opposite pairs."""
    generator = np.random.default_rng(seed)
    one, own = generator.normal(size=D), generator.normal(size=(F, D))
    return size * {"one": np.tile(one, (F, 1)), "several": own, "opposite": np.outer([1, -1, 2], one)}[shape]


@where(lambda laws: not isinstance(laws.bound, str))
@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(3, 30), st.sampled_from(["one", "several", "opposite"]))
@example(3746, 19.0, "opposite")  # two of them cancel in one bucket of `geometric_median`
def test_huge_rows_cannot_carry_the_result_away(name, seed, digits, shape):
    """The bound does not grow with the attackers' rows, whether they are 10^3 or 10^30 long."""
    rows = honest(seed)
    bad = np.random.default_rng(seed + 1).choice(N, F, replace=False)
    longest = np.linalg.norm(np.delete(rows, bad, axis=0), axis=1).max()
    rows[bad] = byzantine(shape, 10**digits, seed)
    assert np.linalg.norm(outcome(name, gather(rows))) <= LAWS[name].bound * longest * (1 + 1e-6)


@pytest.mark.parametrize("name", ["dnc", "robust_learning_rate", "three_sigma", "cross_round", "foolsgold", "nnm"])
def test_what_is_not_promised_is_not_given(name):
    """The table's reasons are true: a pair that points two ways draws the attention, and a third attacker passes."""
    rows = 0.01 * honest(0)
    rows[:F] = 0
    rows[0, 0], rows[1, 0], rows[2, 8] = 1e12, -1e12, 1e6
    assert np.abs(outcome(name, gather(rows))).max() > 1e3


@given(seeds, st.sampled_from([1.0, 3.0, 1e6]))
@settings(max_examples=25, deadline=None)
def test_coordinates_stay_among_the_honest_ones(seed, size):
    """For median and trimmed mean whatever the attackers send, small lies as well as huge ones."""
    rows = honest(seed)
    rows[:F] = size * np.random.default_rng(seed + 1).normal(size=(F, D))
    low, high = rows[F:].min(axis=0) - 1e-12, rows[F:].max(axis=0) + 1e-12
    for name in ("median", "trimmed_mean"):
        result = outcome(name, gather(rows))
        assert ((low <= result) & (result <= high)).all(), name


@given(seeds, st.sampled_from(["one", "several", "opposite"]))
@settings(max_examples=25, deadline=None)
def test_bulyans_coordinates_stay_among_the_honest_ones(seed, shape):
    """For rows far away; a lie just outside the honest values may be among the nearest to the median by definition."""
    rows = honest(seed)
    rows[:F] = byzantine(shape, 1e3, seed)
    rows[:F][np.abs(rows[:F]) < 50] = 50
    result = outcome("bulyan", gather(rows))
    assert ((rows[F:].min(axis=0) - 1e-12 <= result) & (result <= rows[F:].max(axis=0) + 1e-12)).all()


@where(lambda laws: laws.counts == "equal")
@few
@given(seeds)
def test_a_lie_about_samples_gains_nothing(name, seed):
    rows, generator = honest(seed), np.random.default_rng(seed)
    counts = generator.integers(1, 1000, N).astype(float)
    counts[generator.integers(N)] = CLAIM
    np.testing.assert_array_equal(outcome(name, gather(rows, counts)), outcome(name, gather(rows)))


def clipped(rows):
    norms = np.linalg.norm(rows, axis=1)
    return rows * np.minimum(1, np.median(norms) / norms)[:, None]


@few
@given(seeds)
def test_samples_weigh_as_in_fedavg_where_they_weigh(seed):
    rows, counts = honest(seed), np.random.default_rng(seed).integers(1, 1000, N).astype(float)
    mean = np.average(clipped(rows), axis=0, weights=counts)
    np.testing.assert_allclose(outcome("norm_clipping", gather(rows, counts)), mean, rtol=1e-9)
    sure = np.abs(np.sign(rows).sum(axis=0)) >= 4
    flipped = np.where(sure, 1, -1) * np.average(rows, axis=0, weights=counts)
    np.testing.assert_allclose(outcome("robust_learning_rate", gather(rows, counts)), flipped, rtol=1e-9)
    noise = outcome("weak_dp", gather(rows)) - clipped(rows).mean(axis=0)
    np.testing.assert_allclose(outcome("weak_dp", gather(rows, counts)) - mean, noise, rtol=1e-6, atol=1e-9)


@where(lambda laws: True)
def test_the_size_of_blocks_does_not_matter(name):
    """Noise included: it belongs to a coordinate, not to a block."""
    rows = 0.1 * honest(3, columns=20_000)
    whole = gather(rows)
    in_blocks = replace(whole, budget=Budget(memory=2**20))
    assert len(list(whole.blocks())) == 2
    assert len(list(in_blocks.blocks())) > 8
    np.testing.assert_allclose(outcome(name, in_blocks), outcome(name, whole), rtol=1e-9, atol=1e-12)


@where(lambda laws: True)
def test_float32_rows_give_the_float64_result(name):
    rows = honest(5, columns=300).astype(np.float32)
    single, double = gather(rows, dtype=torch.float32), gather(rows.astype(np.float64))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    expected = outcome(name, double)
    np.testing.assert_allclose(outcome(name, single), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
