"""The three byzantine modes against their definitions, and what every attack must leave alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from fedllm_sec import InputError, Round, Threat, attack, open_updates, stack_updates
from fedllm_sec.core import poison
from tests.conftest import dense, dense_states, random_states, write_adapter


def setting(adapters, malicious=(1, 4), seed=0, index=1):
    clients, server, _ = adapters
    updates = open_updates(clients, reference=server, num_samples=range(1, 8))
    reference = open_updates([server])
    return updates, Threat(Round(index, seed=seed), malicious, malicious, reference)


def submitted(updates, parameters, threat):
    return poison(updates.rows(threat.visible), attack.build("byzantine", parameters), threat)


def weights(adapters, parameters, **options):
    """What the malicious clients submit, as weights."""
    updates, threat = setting(adapters, **options)
    return dense(submitted(updates, parameters, threat).add(threat.reference))


def test_zero_makes_the_model_zero_not_the_update(adapters):
    np.testing.assert_allclose(weights(adapters, {"mode": "zero"}), 0, atol=1e-6)


def test_flip_mirrors_the_client_in_the_global_model(adapters):
    _, _, states = adapters
    w, g = dense_states([states[1], states[4]]), dense_states(states[7:])
    np.testing.assert_allclose(weights(adapters, {"mode": "flip"}), g - (w - g), atol=1e-5)
    np.testing.assert_allclose(weights(adapters, {"mode": "flip", "scale": 5}), g - 5 * (w - g), atol=1e-5)


def test_flipping_twice_gives_the_client_back(adapters):
    updates, threat = setting(adapters)
    once = submitted(updates, {"mode": "flip"}, threat)
    twice = poison(once, attack.build("byzantine", {"mode": "flip"}), threat)
    np.testing.assert_array_equal(dense(twice), dense(updates.rows([1, 4])))
    np.testing.assert_allclose(dense(once) + dense(updates.rows([1, 4])), 0)


def large():
    shapes = {"a": (100, 300), "b": (70_000,)}
    reference = stack_updates(random_states(1, 5, shapes, spread=3.0), [1])
    updates = stack_updates(random_states(4, 6, shapes), [1] * 4)
    return updates, Threat(Round(2, seed=3), (0, 2), (0, 2), reference)


def test_random_is_uniform_for_every_coordinate_and_client():
    updates, threat = large()
    sent = dense(submitted(updates, {"mode": "random", "scale": 0.5}, threat).add(threat.reference))
    for row in sent:
        assert stats.kstest(row, stats.uniform(-0.5, 1.0).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(sent)[0, 1]) < 0.02


def test_relative_noise_has_each_tensors_own_scale():
    updates, threat = large()
    threat = replace(
        threat, reference=stack_updates([{"a": torch.randn(100, 300), "b": 100 * torch.randn(70_000)}], [1])
    )
    noise = submitted(updates, {"relative": True, "scale": 2}, threat).add(threat.reference)
    for span, block in noise.blocks():
        assert block.std() == pytest.approx(2 * {"a": 1, "b": 100}[span.tensor], rel=0.02)


def test_noise_depends_on_seed_round_and_client_and_on_nothing_else(adapters):
    first = weights(adapters, {"mode": "random"})
    np.testing.assert_array_equal(first, weights(adapters, {"mode": "random"}))
    for other in ({"seed": 1}, {"index": 2}):
        assert np.abs(first - weights(adapters, {"mode": "random"}, **other)).max() > 0.1
    swapped = weights(adapters, {"mode": "random"}, malicious=(4, 5))
    np.testing.assert_array_equal(first[1], swapped[0])


def test_noise_does_not_depend_on_how_columns_are_cut():
    updates, threat = large()
    method = attack.build("byzantine", {"mode": "random"})
    whole = dense(poison(updates.rows(threat.visible), method, threat))
    small = replace(updates, budget=replace(updates.budget, memory=4 * 4 * 4 * 1000))
    np.testing.assert_array_equal(dense(poison(small.rows(threat.visible), method, threat)), whole)


def test_the_input_is_untouched_and_names_and_counts_stay(adapters):
    clients, server, _ = adapters
    before = [(c / "adapter_model.safetensors").read_bytes() for c in [*clients, server]]
    updates, threat = setting(adapters)
    rows = dense(updates)
    for mode in ("zero", "random", "flip"):
        poisoned = submitted(updates, {"mode": mode}, threat)
        assert poisoned.clients == ("client_01", "client_04")
        assert poisoned.num_samples.tolist() == [2, 5]
        dense(poisoned)
    np.testing.assert_array_equal(dense(updates), rows)
    assert before == [(c / "adapter_model.safetensors").read_bytes() for c in [*clients, server]]


def test_fedavg_with_zero_clients_shrinks_the_honest_mean(tmp_path):
    """(1 - k/n) times the honest mean, of weights."""
    states = random_states(5)
    folders = [write_adapter(tmp_path / str(i), state) for i, state in enumerate(states)]
    server = write_adapter(tmp_path / "global", random_states(1, seed=9)[0])
    updates, reference = open_updates(folders, reference=server), open_updates([server])
    threat = Threat(Round(), (0,), (0,), reference)
    received = updates.replace([0], submitted(updates, {"mode": "zero"}, threat))
    mean = dense(received.mean().add(reference))[0]
    np.testing.assert_allclose(mean, (1 - 1 / 5) * dense_states(states[1:]).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("parameters", [{"mode": "sideways"}, {"modes": "zero"}, {"mode": "flip", "relative": True}])
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(InputError, match="byzantine"):
        attack.build("byzantine", parameters)
