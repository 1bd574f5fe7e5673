"""The same loop with small models: what a run leaves, who takes part, what attacks and buffers do."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedllm_sec import InputError
from fedllm_sec.config import Config
from fedllm_sec.federation import models
from fedllm_sec.federation.experiment import run_experiment
from fedllm_sec.federation.world import World
from fedllm_sec.reports.page import report
from fedllm_sec.updates import open_updates
from fedllm_sec.updates.admit import RefusedError
from tests.launch import assert_same_run

SGD = {"optimizer": "sgd", "steps": None, "batch_size": 16, "learning_rate": 0.05, "schedule": "constant"}
TREE = {
    "name": "digits",
    "scale": "laptop",
    "task": {"name": "mnist"},
    "model": {"name": "lr"},
    "data": {"partition": {"kind": "dirichlet", "alpha": 1.0}},
    "training": {**SGD, "warmup": 0.0, "max_grad_norm": None},
    "federation": {"clients": 7, "rounds": 3},
    "arms": {"benign": {}},
}
RANDOM = {"attack": {"name": "byzantine", "mode": "random"}, "malicious": 2}


def laid(base, change):
    return {
        **base,
        **{k: laid(base.get(k, {}), v) if isinstance(v, dict) and k != "arms" else v for k, v in change.items()},
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the digits with changes to the configuration, and return the folder."""
    monkeypatch.chdir(tmp_path)

    def start(change=None, out="out", resume=False):
        config = Config.model_validate({**laid(TREE, change or {}), "out": out})
        return run_experiment(config, World(), resume=resume)

    return start


def metrics(folder, arm="benign"):
    return [json.loads(line) for line in (folder / arm / "metrics.jsonl").read_text().splitlines()]


def first_round(arm):
    """What each client sent in the first round: its whole model as one vector, by number."""
    found = {}
    for path in (arm / "round_0001").glob("clients_*.json"):
        tensors = load_file(path.with_suffix(".safetensors"))
        for client, claim in json.loads(path.read_text()).items():
            found[int(client[-2:])] = torch.cat([tensors[name][claim["row"]].flatten() for name in sorted(tensors)])
    return found


def test_an_attack_ruins_the_model_and_a_defense_saves_it(run):
    arms = {"benign": {}, "attacked": RANDOM, "defended": {**RANDOM, "defenses": [{"name": "krum", "f": 2, "m": 3}]}}
    folder = run({"arms": arms, "federation": {"rounds": 6}})
    last = {arm: metrics(folder, arm)[-1] for arm in arms}
    assert last["benign"]["accuracy"] > 0.85
    assert last["attacked"]["accuracy"] < last["benign"]["accuracy"] - 0.15
    assert last["defended"]["accuracy"] > last["benign"]["accuracy"] - 0.05
    for row in metrics(folder, "defended")[1:]:
        assert not set(row["malicious"]) & set(row["decisions"]["krum"]["kept"])
    page = report([folder]).read_text()
    assert "Accuracy" in page
    assert json.loads((folder / "summary.json").read_text())["benign"]["accuracy"] == last["benign"]["accuracy"]


def test_the_average_is_that_of_what_the_clients_sent(run):
    folder = run({"federation": {"rounds": 1}}) / "benign"
    claims = json.loads((folder / "round_0001/clients_0_0.json").read_text())
    sent = load_file(folder / "round_0001/clients_0_0.safetensors")
    counts = np.array([claim["num_samples"] for claim in sorted(claims.values(), key=lambda claim: claim["row"])])
    after = load_file(folder / "global_0001/model.safetensors")
    for name, rows in sent.items():
        expected = np.tensordot(counts / counts.sum(), rows.double().numpy(), 1)
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-6)


def test_side_by_side_and_one_by_one_are_the_same_run(run):
    one = run({"training": {"together": False}}, "one")
    together = run({"training": {"together": True}}, "together")
    for row, other in zip(metrics(one), metrics(together), strict=True):
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)
    first, second = (load_file(folder / "benign/global_0003/model.safetensors") for folder in (one, together))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam", "fednova"])
def test_a_run_cut_off_goes_on_to_the_same_bytes(run, optimizer):
    change = {
        "arms": {"defended": {**RANDOM, "defenses": [{"name": "foolsgold"}]}},
        "federation": {"participants": 5, "dropout": 0.2, "optimizer": {"name": optimizer}},
    }
    whole = run(change).rename("whole")
    cut = run(change)
    shutil.rmtree(cut / "defended/round_0003")
    shutil.rmtree(cut / "defended/global_0003")
    (cut / "defended/round_0002/metrics.json").unlink()
    assert_same_run(whole / "defended", run(change, resume=True) / "defended")


def test_some_clients_take_part_and_who_is_absent_is_remembered(run):
    change = {"arms": {"a": {"defenses": [{"name": "foolsgold"}]}}, "federation": {"participants": 4, "rounds": 4}}
    rows = metrics(run(change), "a")[1:]
    assert all(len(row["num_samples"]) == 4 for row in rows)
    assert len({tuple(row["num_samples"]) for row in rows}) > 1


def test_label_flipping_reaches_training_and_only_that_of_the_malicious(run):
    """In the original the poisoned set is stored where nothing reads it."""
    flip = {"name": "label_flipping", "source": list(range(10)), "target": [(i + 1) % 10 for i in range(10)]}
    arms = {"benign": {}, "attacked": {"attack": flip, "malicious": [0, 1, 2, 3, 4]}}
    folder = run({"arms": arms, "data": {"partition": {"kind": "iid"}}, "federation": {"rounds": 4}})
    assert metrics(folder, "attacked")[-1]["accuracy"] < metrics(folder)[-1]["accuracy"] - 0.3
    rows = {arm: first_round(folder / arm) for arm in arms}
    for client in (5, 6):
        torch.testing.assert_close(rows["attacked"][client], rows["benign"][client])
    assert not torch.allclose(rows["attacked"][0], rows["benign"][0])


def test_malicious_clients_may_train_longer_and_at_another_rate(run):
    """And honest ones train as they would: they send the same bytes as in the arm where all train alike."""
    flipping = {"attack": {"name": "label_flipping", "source": [0], "target": [1]}, "malicious": [1]}
    longer = {**flipping, "own_training": {"epochs": 3, "learning_rate": 0.5}}
    folder = run({"arms": {"alike": flipping, "longer": longer}, "federation": {"rounds": 1}})
    steps = {}
    for arm in ("alike", "longer"):
        for path in (folder / arm / "round_0001").glob("clients_*.json"):
            steps |= {(arm, client): claim["steps"] for client, claim in json.loads(path.read_text()).items()}
    assert steps["longer", "client_01"] == 3 * steps["alike", "client_01"]
    assert steps["longer", "client_02"] == steps["alike", "client_02"]
    alike, other = (first_round(folder / arm) for arm in ("alike", "longer"))
    assert [client for client in alike if not torch.equal(alike[client], other[client])] == [1]


@pytest.mark.parametrize("arm", [{}, RANDOM])
def test_own_training_of_nobody_is_an_error(run, arm):
    with pytest.raises(InputError, match="changes nothing of how clients train: leave it out"):
        run({"arms": {"a": {**arm, "own_training": {"epochs": 3}}}})


def test_statistics_of_batchnorm_are_averaged_by_samples_and_by_median_under_a_defense(run):
    change = {
        "model": {"name": "resnet20"},
        "training": {"together": True},
        "data": {"train_limit": 60, "test_limit": 20, "partition": {"kind": "quantity", "alpha": 5.0}},
        "federation": {"clients": 3, "rounds": 1},
        "arms": {"benign": {}, "defended": {"defenses": [{"name": "median"}]}},
    }
    folder = run(change)
    for arm, combine in (("benign", "mean"), ("defended", "median")):
        place = folder / arm
        columns = dict(open_updates([place / "global_0001"]).layout.shapes)
        after = load_file(place / "global_0001/buffers.safetensors")
        assert not set(after) & set(columns)
        claims = json.loads((place / "round_0001/clients_0_0.json").read_text())
        counts = np.array([c["num_samples"] for c in sorted(claims.values(), key=lambda c: c["row"])])
        sent = load_file(place / "round_0001/clients_0_0_buffers.safetensors")
        name = next(n for n in sent if n.endswith("running_mean"))
        rows = sent[name].double().numpy()
        expected = counts @ rows / counts.sum() if combine == "mean" else np.median(rows, axis=0)
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-7)


def test_a_server_with_examples_of_its_own_can_use_fltrust(run):
    arms = {"defended": {**RANDOM, "defenses": [{"name": "fltrust"}]}}
    folder = run({"arms": arms, "federation": {"root_samples": 100, "rounds": 4}})
    assert metrics(folder, "defended")[-1]["accuracy"] > 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": None}}, "set model.name"),
        ({"model": {"name": "lenet5"}}, "did you mean 'lenet'"),
        ({"federation": {"space": "product"}}, "for LoRA adapters"),
        ({"federation": {"optimizer": {"name": "fedadm"}}}, "did you mean 'fedadam'"),
        ({"data": {"partition": {"kind": "natural"}}}, "names its users"),
        ({"federation": {"clients": 2000}}, "would have no data"),
        ({"model": {"name": "rnn"}}, "takes tokens"),
        ({"task": {"name": "pubmedqa"}}, "set model.path"),
    ],
)
def test_what_cannot_run_is_an_error_before_any_work(run, change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(change)
    assert not (tmp_path / "out").exists()


def test_a_round_without_anybody_who_is_fit_leaves_the_model_and_the_run_goes_on(run):
    """Weights of 1e32 pass the gate, but two layers of them overflow: all trainings of the next rounds are NaN."""
    spoil = {"attack": {"name": "byzantine", "mode": "random", "scale": 1e32}, "malicious": 1}
    small = {"model": {"name": "lenet"}, "data": {"train_limit": 140, "test_limit": 50}}
    folder = run({**small, "arms": {"spoilt": spoil, "benign": {}}})
    rows = metrics(folder, "spoilt")
    assert len(rows) == len(metrics(folder)) == 4
    assert rows[1]["skipped"] is None
    assert [row["skipped"] for row in rows[2:]] == ["no client passed the gate"] * 2
    assert [len(row["refused"]) for row in rows[1:]] == [0, 7, 7]
    models = [(folder / f"spoilt/global_000{i}/model.safetensors").read_bytes() for i in (1, 2, 3)]
    assert models[0] == models[1] == models[2]
    with pytest.raises(RefusedError, match="NaN"):
        run({**small, "arms": {"spoilt": spoil}, "federation": {"on_refused": "stop"}}, "stopped")


def test_a_round_in_which_too_few_are_fit_for_a_defense_is_skipped_and_memories_go_on(run, monkeypatch):
    """In round 2 five of seven clients send NaN, and Krum with f=1 needs five."""
    honest, rounds = models.save_many, []

    def spoilt(clients, parts, claims, stem):
        if stem.parent.name == "round_0002":
            rounds.append(2)
            for tensor in parts[""].values():
                tensor[:5] = float("nan")
        honest(clients, parts, claims, stem)

    monkeypatch.setattr(models, "save_many", spoilt)
    arm = {"defenses": [{"name": "krum", "f": 1, "m": 2}, {"name": "cross_round"}]}
    change = {"arms": {"a": arm}, "federation": {"rounds": 3, "optimizer": {"name": "fedadam"}}}
    folder = run(change)
    rows = metrics(folder, "a")
    assert rounds
    assert rows[2]["skipped"].startswith("5 clients were refused, and with the others: krum")
    assert rows[2]["decisions"] == {}
    assert [rows[i]["skipped"] for i in (1, 3)] == [None, None]
    moments = [load_file(folder / f"a/round_000{i}/optimizer/second.safetensors") for i in (1, 3)]
    assert not (folder / "a/round_0002/optimizer").exists()
    for name, later in moments[1].items():  # had it begun anew, it would be a step from tau**2
        assert (later >= 0.99 * moments[0][name] - 1e-12).all()
