"""Noise and sparsification before an update is sent, against naive dense float64 versions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedllm_sec import InputError, Round, defense, stack_updates
from fedllm_sec.defenses.upload import TopK, UpdateNoise, thresholds
from fedllm_sec.updates.device import TILE
from tests.conftest import dense, dense_states, random_states

SHAPES = {"a": (3, TILE // 2), "b": (TILE + 7,), "c": (2, 5), "scalar": ()}
NAMES = ("ann", "bob", "eve")


def updates(states, names=NAMES):
    return stack_updates(states, [1.0] * len(states), names[: len(states)])


def cut_narrowly(rows):
    """The same rows, of whose columns 1000 at most are looked at together."""
    from dataclasses import replace

    from fedllm_sec.updates.device import Budget

    class Narrow(Budget):
        def block_columns(self, files, itemsize):
            return 1000

    return replace(rows, budget=Narrow())


def sizes(states):
    return {name: states[0][name].numel() for name in sorted(states[0])}


def naive_top_k(rows, share):
    """Sort each row; keep what is at least as large as the k-th largest."""
    k = max(1, int(share * rows.shape[1] + 0.5))
    least = np.sort(np.abs(rows), axis=1)[:, ::-1][:, k - 1 : k]
    return np.where(np.abs(rows) >= least, rows, 0.0)


def test_both_are_built_from_the_registry_and_act_on_the_client_only():
    for name, parameters, made in (
        ("update_noise", {}, UpdateNoise(1.0, "update")),
        ("update_noise", {"scale": 0.1, "unit": "weights"}, UpdateNoise(0.1, "weights")),
        ("top_k", {}, TopK(0.01)),
        ("top_k", {"share": 1}, TopK(1)),
    ):
        built = defense.build(name, parameters)
        assert built.client == made
        assert not built.acts_on_server


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("update_noise", {"scale": 0}),
        ("update_noise", {"scale": float("inf")}),
        ("update_noise", {"unit": "layer"}),
        ("top_k", {"share": 0}),
        ("top_k", {"share": 1.01}),
        ("top_k", {"share": float("nan")}),
    ],
)
def test_parameters_are_checked(name, parameters):
    with pytest.raises(InputError, match=name):
        defense.build(name, parameters)


@pytest.mark.parametrize("unit", ["update", "tensor", "weights"])
def test_noise_has_the_deviation_that_was_asked_for(unit):
    states = random_states(2, shapes=SHAPES)
    for state in states:
        state["a"] *= 0.01  # tensors of unlike size
    rows = dense_states(states)
    noise = dense(UpdateNoise(0.5, unit).sent(updates(states), Round())) - rows
    for i, row in enumerate(rows):
        start = 0
        for name, size in sizes(states).items():
            here = slice(start, start + size)
            of = {"update": row, "tensor": row[here], "weights": np.ones(1)}[unit]
            if size > 1000:
                assert noise[i, here].std() == pytest.approx(0.5 * np.sqrt((of**2).mean()), rel=0.02), name
                assert stats.kstest(noise[i, here] / noise[i, here].std(), "norm").pvalue > 1e-4
            start += size
    assert abs(np.corrcoef(noise)[0, 1]) < 0.02  # clients draw for themselves


def test_noise_is_the_naive_sum():
    """The same draws, laid side by side by hand: a generator for each client, tensor and tile."""
    states = random_states(3, shapes=SHAPES)
    at = Round(index=4, seed=9)
    rows = dense_states(states)
    scale = 0.7 * np.sqrt((rows**2).mean(axis=1, keepdims=True))
    drawn = []
    for name in NAMES:
        parts = []
        for tensor, size in sizes(states).items():
            tiles = [
                torch.randn(TILE, generator=at.generator("update_noise", name, tensor, tile), dtype=torch.float64)
                for tile in range(-(-size // TILE))
            ]
            parts.append(torch.cat(tiles)[:size].numpy())
        drawn.append(np.concatenate(parts))
    expected = rows + scale * np.stack(drawn)
    np.testing.assert_allclose(dense(UpdateNoise(0.7).sent(updates(states), at)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [UpdateNoise(0.7), UpdateNoise(0.7, "tensor"), TopK(0.1)])
def test_neither_the_cut_of_columns_nor_other_rows_nor_their_order_matter(method):
    states = random_states(3, shapes=SHAPES)
    whole = dense(method.sent(updates(states), Round(seed=3)))
    np.testing.assert_allclose(dense(method.sent(cut_narrowly(updates(states)), Round(seed=3))), whole, rtol=1e-6)
    np.testing.assert_array_equal(dense(method.sent(updates(states[:1]), Round(seed=3)))[0], whole[0])
    turned = updates(states[::-1], names=NAMES[::-1])
    np.testing.assert_array_equal(dense(method.sent(turned, Round(seed=3)))[::-1], whole)


def test_noise_differs_by_round_client_and_seed():
    states = random_states(1, shapes=SHAPES)
    made = [
        dense(UpdateNoise(1.0).sent(updates(states, names=(name,)), Round(index=index, seed=seed)))
        for name, index, seed in (("ann", 1, 0), ("ann", 1, 0), ("bob", 1, 0), ("ann", 2, 0), ("ann", 1, 1))
    ]
    assert np.array_equal(made[0], made[1])
    assert all(abs(np.corrcoef(made[0] - other, made[0])[0, 1]) > 0.1 for other in made[2:])


def test_noise_on_an_update_of_zero_is_zero_unless_it_is_in_the_units_of_weights():
    states = [{name: 0 * value for name, value in state.items()} for state in random_states(1, shapes=SHAPES)]
    for unit in ("update", "tensor"):
        assert not dense(UpdateNoise(1.0, unit).sent(updates(states), Round())).any()
    assert dense(UpdateNoise(2.0, "weights").sent(updates(states), Round())).std() == pytest.approx(2.0, rel=0.02)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.integers(1, 60),
    st.floats(0.001, 1),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_top_k_is_the_naive_one(seed, n, columns, share, dtype, tied):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, columns, generator=generator, dtype=dtype) * torch.logspace(-30, 30, columns, dtype=dtype)
    rows = rows.sign() * (torch.randint(0, 3, rows.shape, generator=generator)) if tied else rows
    cut = columns // 2
    states = [{"a": row[:cut].clone(), "b": row[cut:].clone()} for row in rows]
    sent = dense(TopK(share).sent(stack_updates(states, [1.0] * n), Round()))
    np.testing.assert_array_equal(sent, naive_top_k(rows.double().numpy(), share))


def test_exactly_k_are_sent_where_none_are_tied():
    states = random_states(2, shapes=SHAPES)
    columns = dense_states(states).shape[1]
    for share in (0.5, 0.1, 0.01):
        kept = (dense(TopK(share).sent(updates(states), Round())) != 0).sum(axis=1)
        assert kept.tolist() == [round(share * columns)] * 2
    assert np.array_equal(dense(TopK(1).sent(updates(states), Round())), dense_states(states))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), st.data())
def test_the_threshold_is_the_kth_largest_whatever_the_numbers(values, data):
    k = data.draw(st.integers(1, len(values)))
    rows = stack_updates([{"a": torch.tensor(values, dtype=torch.float32)}], [1.0])
    expected = np.sort(np.abs(np.array(values, dtype=np.float32)))[::-1][k - 1]
    assert float(thresholds(rows, k)) == expected


def test_what_is_sent_keeps_names_counts_and_dtype():
    states = random_states(2, shapes=SHAPES)
    rows = stack_updates(states, [3.0, 5.0], ["ann", "bob"])
    for method in (UpdateNoise(1.0), TopK(0.2)):
        sent = method.sent(rows, Round())
        assert (sent.clients, sent.num_samples.tolist(), sent.dtype) == (("ann", "bob"), [3.0, 5.0], torch.float32)
        assert sent.layout == rows.layout
