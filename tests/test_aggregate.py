"""`fedllm-sec aggregate` from one end to the other: every defense, the product space, and what is left in --out."""

import json
import math
import re

import numpy as np
import pytest
from safetensors.torch import load_file

from fedllm_sec import defense
from tests.conftest import CONFIG, SCALAR, dense_states, random_states, write_adapter
from tests.oracles import naive
from tests.test_cli import error_of, fedllm_sec  # noqa: F401 - fixtures
from tests.updates.test_admit import A, set_value, truncate

ENTRIES = list(defense)
BUILT = {entry.name: defense.build(entry.name, {"f": 1} if "f" in entry.parameters else {}) for entry in ENTRIES}
SERVER_SIDE = [name for name, method in BUILT.items() if method.acts_on_server]
CLIENT_SIDE = [name for name, method in BUILT.items() if not method.acts_on_server]
NAMES = [f"client_{i:02d}" for i in range(7)]
ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "decision.json"}

# What a first round's decision holds besides the defense itself; thresholds by name.
SAYS = {
    "krum": ({"scores", "kept", "guaranteed"}, ()),
    "bulyan": ({"scores", "kept"}, ()),
    "mda": ({"kept", "exact"}, ("diameter",)),
    "cge": ({"scores", "kept"}, ()),
    "dnc": ({"scores", "kept"}, ()),
    "nnm": ({"scores"}, ()),
    "bucketing": ({"buckets"}, ()),
    "rfa": ({"weights", "iterations_made"}, ()),
    "geometric_median": ({"weights", "iterations_made"}, ()),
    "median": (set(), ()),
    "trimmed_mean": (set(), ()),
    "slsgd": (set(), ()),
    "norm_clipping": ({"scores"}, ("norm",)),
    "weak_dp": ({"scores"}, ("norm",)),
    "centered_clipping": ({"weights"}, ("tau",)),
    "robust_learning_rate": (set(), ()),
    "residual_reweighting": ({"weights"}, ()),
    "crfl": ({"length", "factor"}, ("norm", "std")),
    "three_sigma": ({"scores", "kept", "suspected"}, ("distance",)),
    "cross_round": ({"scores", "kept"}, ()),
    "foolsgold": ({"weights", "kept"}, ()),
    "fltrust": ({"scores", "weights"}, ("norm",)),
    "flame": ({"scores", "kept"}, ("norm", "std")),
}


@pytest.fixture
def round_trip(fedllm_sec, adapters, tmp_path):  # noqa: F811
    """Aggregate seven adapters as JSON; return the decision and the saved tensors, and look at what is left."""
    clients, server, _ = adapters

    def run(*arguments, name="out", clients=clients):
        out = tmp_path / name
        done = fedllm_sec("aggregate", *clients, "--global", server, "--out", out, "--json", *arguments)
        assert done.returncode == 0, done.stderr
        decision = json.loads(done.stdout)
        assert decision == json.loads((out / "decision.json").read_text())
        folders = {entry.name for entry in out.iterdir() if entry.is_dir()}
        assert {entry.name for entry in out.iterdir()} == ADAPTER | folders
        assert folders == set(decision["decisions"])
        for folder in folders:
            assert [entry.name for entry in (out / folder).iterdir()] == ["decision.json"]
        assert not list(tmp_path.glob("*.partial"))
        return decision, load_file(out / "adapter_model.safetensors")

    return run


def test_every_defense_and_its_decision_is_known_here():
    assert SAYS.keys() == set(SERVER_SIDE)
    assert CLIENT_SIDE == ["fl_wbc", "soteria", "top_k", "update_noise"]


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("name", SERVER_SIDE)
def test_every_defense_says_what_it_decided(name, space, round_trip, adapters, tmp_path):
    server = adapters[1]
    trusted = write_adapter(tmp_path / "trusted", random_states(1, seed=9)[0])
    extra = ["-D", "f=1"] if "f" in defense[name].parameters else []
    arguments = ["--defense", name, *extra, "--space", space]
    decision, saved = round_trip(*arguments, *(["--trusted", trusted] if name == "fltrust" else []))
    assert decision["defenses"] == [{"name": name, **({"f": 1} if extra else {})}]
    assert decision["space"] == space
    assert decision["clients"] == NAMES
    assert decision["num_samples"] == [1.0] * 7
    ((folder, found),) = decision["decisions"].items()
    assert folder == name
    assert found.pop("defense")["name"] == folder
    says, thresholds = SAYS[name]
    assert set(found.pop("thresholds", {})) == set(thresholds)
    assert found.keys() == says
    for key in ("scores", "weights"):
        assert found.get(key, dict.fromkeys(NAMES)).keys() == set(NAMES) or name in ("geometric_median",)
        assert all(math.isfinite(value) for value in found.get(key, {}).values())
    assert set(found.get("kept", [])) <= set(NAMES)
    for norm in decision["norms"] or [1.0]:
        assert 0 < norm < 100
    assert decision["bytes_read"] > 0
    size = sum((path / "adapter_model.safetensors").stat().st_size for path in adapters[0])
    assert 0 < decision["passes"] <= decision["bytes_read"] / size + 1e-3  # the bytes count the server's own files too
    assert 2**20 < decision["peak_memory"] < 2**36
    assert 0 <= decision["seconds"] < 60
    assert ("discarded_energy" in decision) == (space == "product")
    assert {k: v.shape for k, v in saved.items()} == {
        k: v.shape for k, v in load_file(server / "adapter_model.safetensors").items()
    }


def products(states):
    """(n, D) in order of the product layout: the pair, then the scalar; alpha / r is 2."""
    b = A.replace("lora_A", "lora_B")
    return np.stack([np.append(2 * (s[b].double() @ s[A].double()).numpy().ravel(), float(s[SCALAR])) for s in states])


def test_the_product_space_averages_products_and_says_what_the_rank_cannot_hold(round_trip, adapters):
    """Against numpy: the saved adapter is the best of rank 2, and the discarded energy is its squared error."""
    states = adapters[2]
    decision, saved = round_trip("--space", "product")
    expected = products(states[:7]).mean(axis=0)
    found = products([saved])[0]
    u, s, vt = np.linalg.svd(expected[:-1].reshape(7, 5), full_matrices=False)
    np.testing.assert_allclose(found[:-1].reshape(7, 5), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-5)
    update = expected - products(states[7:])[0]
    assert decision["discarded_energy"] == pytest.approx(
        np.square(s[2:]).sum() / np.square(update[:-1]).sum(), rel=1e-5
    )


def test_in_the_product_space_another_choice_of_factors_is_no_other_update(round_trip, adapters, tmp_path):
    clients, _, states = adapters
    b = A.replace("lora_A", "lora_B")
    turned = write_adapter(tmp_path / "turned", {**states[3], A: -0.01 * states[3][A], b: -100 * states[3][b]})
    for space in ("product", "factors"):
        chain = ["--space", space, "--defense", "krum", "-D", "f=1"]
        one, saved = round_trip(*chain, name=space)
        others = [turned if i == 3 else client for i, client in enumerate(clients)]
        other, saved_2 = round_trip(*chain, name=space + "_2", clients=others)
        scores = [list(found["decisions"]["krum"]["scores"].values()) for found in (one, other)]
        same = np.allclose(scores[0], scores[1], rtol=1e-5)
        assert same == (space == "product")
        if same:
            np.testing.assert_allclose(products([saved_2])[0], products([saved])[0], atol=1e-5)


def test_a_chain_of_every_stage(round_trip, adapters):
    """Neighbours' means, then a trimmed mean, then clipping and noise of the model: against numpy, without noise."""
    chain = ["--defense", "nnm", "-D", "f=1", "--defense", "trimmed_mean", "-D", "f=1", "--defense", "crfl"]
    decision, saved = round_trip(*chain, "-D", "std=0", "-D", "norm=0.5")
    assert [d["name"] for d in decision["defenses"]] == ["nnm", "trimmed_mean", "crfl"]
    assert decision["decisions"].keys() == {"nnm", "trimmed_mean", "crfl"}
    rows = dense_states(adapters[2])
    mixed = naive.nnm(rows[:7] - rows[7], 1)
    model = rows[7] + np.sort(mixed, axis=0)[1:-1].mean(axis=0)
    bound = 0.5 + 0.1
    assert decision["decisions"]["crfl"]["thresholds"] == {"norm": pytest.approx(bound), "std": 0.0}
    assert decision["decisions"]["crfl"]["length"] == pytest.approx(np.linalg.norm(model), rel=1e-5)
    np.testing.assert_allclose(dense_states([saved])[0], model * bound / np.linalg.norm(model), atol=1e-6)


def test_the_same_defense_twice_leaves_two_decisions(round_trip):
    decision, _ = round_trip("--defense", "nnm f=1", "--defense", "nnm f=2", "--defense", "median")
    assert decision["decisions"].keys() == {"nnm", "nnm_2", "median"}
    assert decision["decisions"]["nnm_2"]["defense"]["f"] == 2


def test_a_trusted_adapter_is_what_fltrust_compares_with(round_trip, adapters):
    clients, _, states = adapters
    decision, saved = round_trip("--defense", "fltrust", "--trusted", clients[0], clients=clients[1:])
    rows = dense_states(states)
    updates, own = rows[1:7] - rows[7], rows[0] - rows[7]
    trust = np.array([max(naive.cosine(row, own), 0) for row in updates])
    expected = sum(t * row * np.linalg.norm(own) / np.linalg.norm(row) for t, row in zip(trust, updates, strict=True))
    np.testing.assert_allclose(dense_states([saved])[0], rows[7] + expected / trust.sum(), atol=1e-5)
    found = decision["decisions"]["fltrust"]
    np.testing.assert_allclose(list(found["scores"].values()), trust, rtol=1e-5)
    assert found["thresholds"]["norm"] == pytest.approx(np.linalg.norm(own), rel=1e-6)


def test_a_claim_counts_as_at_most_the_cap(round_trip, adapters):
    rows = dense_states(adapters[2])
    counts = "10,10,10,10,10,10,1000000"
    decision, saved = round_trip("--num-samples", counts, "--sample-cap", "3")
    weights = np.array([10] * 6 + [30])
    assert decision["num_samples"] == weights.tolist()
    np.testing.assert_allclose(dense_states([saved])[0], weights @ rows[:7] / weights.sum(), atol=1e-6)
    uncapped, saved = round_trip("--num-samples", counts, name="uncapped")
    assert uncapped["num_samples"][-1] == 1_000_000
    np.testing.assert_allclose(dense_states([saved])[0], rows[6], atol=1e-3)


@pytest.mark.parametrize("space", ["factors", "product"])
def test_bytes_and_passes_are_those_that_the_method_needs(space, round_trip):
    """Krum that keeps one: every adapter once and the global one, and then the kept one and the global one."""
    decision, _ = round_trip("--defense", "krum", "-D", "f=1", "--space", space)
    again = 25 if space == "factors" else 1  # the global adapter's only pair is still at hand
    assert decision["bytes_read"] == 4 * (25 * (8 + 1) + again + 25)
    decision, _ = round_trip("--defense", "median", "--space", space, name="median")
    assert decision["bytes_read"] == 4 * 25 * 9


@pytest.mark.parametrize("name", SERVER_SIDE)
def test_the_table_for_people(name, fedllm_sec, adapters, tmp_path, monkeypatch):  # noqa: F811
    from fedllm_sec import cli

    monkeypatch.setattr(cli.console, "_width", 300)
    clients, server, _ = adapters
    trusted = write_adapter(tmp_path / "trusted", random_states(1, seed=9)[0])
    extra = ["-D", "f=1"] if "f" in defense[name].parameters else []
    arguments = ["--defense", name, *extra, "--trusted", trusted, "--space", "product"]
    done = fedllm_sec("aggregate", *clients, "--global", server, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    text, caption = done.stderr, " ".join(done.stderr.split())
    assert name in text
    assert "space: product" in caption
    assert "MiB read" in caption
    assert all(re.search(rf"^│ {client} +│ +1 +│", text, re.MULTILINE) for client in NAMES), text
    says, thresholds = SAYS[name]
    folder = name
    assert (f"{folder} kept" in text) == ("kept" in says)
    for key in ("scores", "weights"):
        assert (f"{folder} {key[:-1]} " in text) == (key in says)
    for threshold in thresholds:
        assert f"{folder}: {threshold} " in caption


@pytest.mark.parametrize("name", CLIENT_SIDE)
def test_what_acts_while_a_client_trains_is_refused(name, error_of, adapters, tmp_path):  # noqa: F811
    clients, server, _ = adapters
    message = error_of("aggregate", *clients, "--global", server, "--out", tmp_path / "out", "--defense", name)
    assert "acts while a client trains" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("name", ["krum", "median", "foolsgold", "residual_reweighting", "crfl"])
def test_a_nan_names_the_client_and_the_tensor_and_leaves_nothing(name, space, error_of, adapters, tmp_path):  # noqa: F811
    clients, server, _ = adapters
    set_value(float("nan"))(clients[2])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    extra = ["-D", "f=1"] if "f" in defense[name].parameters else []
    out = tmp_path / "new" / "out"
    message = error_of(
        "aggregate", *clients, "--global", server, "--out", out, "--defense", name, *extra, "--space", space
    )
    assert message.count("\n") == 1
    assert "client_02" in message
    assert A in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path} == before


@pytest.mark.parametrize("space", ["factors", "product"])
def test_a_nan_in_the_global_or_the_trusted_adapter_is_no_clients_fault(space, error_of, adapters, tmp_path):  # noqa: F811
    clients, server, _ = adapters
    trusted = write_adapter(tmp_path / "trusted", random_states(1, seed=9)[0])
    arguments = ["aggregate", *clients, "--global", server, "--out", tmp_path / "out", "--space", space]
    set_value(float("nan"))(trusted)
    message = error_of(*arguments, "--defense", "fltrust", "--trusted", trusted)
    assert message.startswith("error: --trusted trusted: ")
    assert "leave" not in message
    set_value(float("nan"))(server)
    message = error_of(*arguments)
    assert "the global adapter" in message
    assert "client_" not in message
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_one_line_and_leave_nothing(error_of, adapters, tmp_path):  # noqa: F811
    clients, server, _ = adapters
    start = ["aggregate", *clients, "--global", server, "--out", tmp_path / "out"]
    for extra, message in [
        (["--defense", "fltrust"], "--trusted ADAPTER"),
        (["--space", "polar"], "space='polar'"),
        (["--trusted", tmp_path / "none"], "none: no such file or folder"),
        (["--sample-cap", "0", "--num-samples", "1,1,1,1,1,1,1"], "must be above zero"),
        (["--sample-cap", "-1", "--num-samples", "1,1,1,1,1,1,1"], "must be above zero"),
        (["--defense", "median", "--defense", "rfa"], "2 of the defenses aggregate"),
        (["--defense", "bulyan", "-D", "f=2"], "bulyan(f=2) needs n >= 4f + 3 = 11, got n=7"),
        (["--defense", "krum"], "krum(f, m=1): f"),
        (["--seed", "x"], "--seed"),
    ]:
        text = error_of(*start, *extra)
        assert message in " ".join(text.split()), extra
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("*.partial"))
    truncate(clients[0])
    assert "client_00" in error_of(*start, "--space", "product")


def test_an_adapter_without_pairs_has_no_product_space(error_of, tmp_path):  # noqa: F811
    folders = [
        write_adapter(tmp_path / str(i), {"w": state[SCALAR]}, CONFIG) for i, state in enumerate(random_states(4))
    ]
    text = error_of("aggregate", *folders[1:], "--global", folders[0], "--out", tmp_path / "out", "--space", "product")
    assert "no LoRA pair" in text


def test_the_same_seed_gives_the_same_bytes(round_trip, tmp_path):
    chain = ["--defense", "bucketing", "--defense", "median", "--defense", "weak_dp"]
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        round_trip(*chain, "--seed", seed, name=name)
    one, same, other = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "same", "other")]
    assert one == same != other


LONG = "x" * 300


@pytest.mark.parametrize(
    ("role", "name"), [("client", "loop"), ("client", LONG), ("out", LONG), ("out", "dangling"), ("out", "loop/out")]
)
def test_odd_paths_are_one_line_and_leave_nothing(role, name, error_of, adapters, tmp_path):  # noqa: F811
    clients, server, _ = adapters
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    given = {"client": clients[-1], "out": tmp_path / "out", role: tmp_path / name}
    message = error_of("aggregate", *clients[:-1], given["client"], "--global", server, "--out", given["out"])
    assert message.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
