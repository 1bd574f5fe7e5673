"""FedGKT in the one loop: what clients send and keep, what the server tells them, and what cannot go with it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from fedllm_sec import Attack, InputError
from fedllm_sec.config import Config
from fedllm_sec.federation import knowledge, knowledge_server
from fedllm_sec.federation.examples import load_examples
from fedllm_sec.federation.experiment import run_experiment
from fedllm_sec.federation.participants import participants
from fedllm_sec.federation.run_folder import ArmFolder
from fedllm_sec.federation.world import World
from fedllm_sec.models import Shape, model
from fedllm_sec.models.split import cut
from fedllm_sec.registry import attack
from fedllm_sec.tasks.arrays import Arrays, ArrayTask
from fedllm_sec.tasks.task import task
from fedllm_sec.updates.admit import RefusedError
from tests.federation.test_models import laid, metrics
from tests.launch import assert_same_run

FLIP = {"name": "label_flipping", "source": list(range(10)), "target": [(i + 1) % 10 for i in range(10)]}
ADAM = {"optimizer": "adam", "steps": None, "batch_size": 16, "learning_rate": 3e-3, "schedule": "constant"}
TREE = {
    "name": "digits",
    "scale": "laptop",
    "task": {"name": "digits8"},
    "model": {"name": "resnet20"},
    "data": {"train_limit": 80, "test_limit": 60, "partition": {"kind": "dirichlet", "alpha": 1.0}},
    "training": {**ADAM, "warmup": 0.0, "max_grad_norm": None},
    "federation": {"clients": 4, "rounds": 2, "optimizer": {"name": "fedgkt"}},
    "arms": {"benign": {}},
}
SHAPE = Shape((1, 8, 8), 10, None)


def read(source, split):
    """Scikit-learn's digits as they are, 8 x 8: a residual network on 28 x 28 takes twelve times as long."""
    digits = load_digits()
    part = slice(1400) if split == "train" else slice(1400, None)
    x = torch.tensor(digits.images[part] * 15).to(torch.uint8)[:, None]
    return Arrays(x, torch.tensor(digits.target[part]), None)


def prepare(x):
    return x.float() / 120 - 1


@pytest.fixture(autouse=True)
def digits8():
    """A task for this file alone."""
    task("digits8", paper="sklearn")(lambda: ArrayTask(read, 10, (1, 8, 8), None, prepare))
    yield
    del task._entries["digits8"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(change=None, out="out", resume=False):
        return run_experiment(Config.model_validate({**laid(TREE, change or {}), "out": out}), World(), resume=resume)

    return start


def networks(server, client):
    """Both halves, from the folders of a run."""
    halves = cut(model.build("resnet20", {}), SHAPE, "resnet20")
    for half, folder in ((halves.server, server), (halves.edge, client)):
        half.load_state_dict({**load_file(folder / "model.safetensors"), **load_file(folder / "buffers.safetensors")})
    return halves.eval()


def test_the_server_learns_and_flipped_labels_reach_it(run):
    arms = {"benign": {}, "flipped": {"attack": FLIP, "malicious": [0, 1, 2]}}
    folder = run({"arms": arms, "data": {"train_limit": 600, "test_limit": 300}, "federation": {"rounds": 3}})
    benign, flipped = metrics(folder), metrics(folder, "flipped")
    assert benign[0]["accuracy"] < 0.2
    assert benign[-1]["accuracy"] > 0.6
    assert benign[-1]["client_accuracy"] > 0.3
    assert flipped[-1]["accuracy"] < benign[-1]["accuracy"] - 0.25
    assert flipped[-1]["malicious"] == ["client_00", "client_01", "client_02"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["benign"]["accuracy"] == benign[-1]["accuracy"]


def test_the_server_sees_features_logits_and_the_labels_that_clients_trained_on(run, monkeypatch):
    seen = []

    def watch(server, clients, *rest):
        seen.append({name: reader() for name, reader in clients.items()})
        return original(server, clients, *rest)

    original = knowledge_server.train_server
    monkeypatch.setattr(knowledge_server, "train_server", watch)
    folder = run({"arms": {"a": {"attack": FLIP, "malicious": [1]}}, "federation": {"rounds": 1}}) / "a"
    (sent,) = seen
    digits = read("", "train")
    pixels = {digits.x[i].numpy().tobytes(): int(digits.y[i]) for i in range(len(digits.y))}
    counts = metrics(folder.parent, "a")[1]["num_samples"]
    flips = 0
    for name, what in sent.items():
        edge = networks(folder / "global_0001", folder / "round_0001" / name).edge
        x, y = examples_of(what, edge, digits)
        assert len(what.labels) == counts[name] > 0
        truth = torch.tensor([pixels[image.numpy().tobytes()] for image in x])
        assert torch.equal(truth, y)
        wanted = (truth + 1) % 10 if name == "client_01" else truth
        assert torch.equal(what.labels, wanted)
        flips += int((what.labels != truth).sum())
    assert flips == counts["client_01"]
    assert sum(counts.values()) == 80


def examples_of(sent, edge, digits):
    """Which examples a client's features are of: found by the features, so that nothing is taken on trust."""
    with torch.no_grad():
        features, logits = edge(prepare(digits.x))
    rows = torch.cdist(sent.features.flatten(1).double(), features.flatten(1).double()).argmin(dim=1)
    torch.testing.assert_close(features[rows], sent.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[rows], sent.logits, rtol=1e-4, atol=1e-5)
    return digits.x[rows], digits.y[rows]


def test_the_accuracy_is_the_mean_over_clients_of_extractor_and_server(run):
    arm = run({"federation": {"rounds": 1, "optimizer": {"name": "fedgkt", "beta": 0.1, "epochs": 3}}}) / "benign"
    test = load_examples(Config.model_validate(TREE), task.build("digits8", {})).test
    right, own = [], []
    for client in range(4):
        halves = networks(arm / "global_0001", arm / f"round_0001/client_{client:02d}")
        with torch.no_grad():
            right.append((halves(prepare(test.x)).argmax(1) == test.y).double().mean().item())
            own.append((halves.edge(prepare(test.x))[1].argmax(1) == test.y).double().mean().item())
    last = metrics(arm.parent)[-1]
    assert len(set(right)) > 1, "clients whose extractors are their own differ"
    assert last["accuracy"] == pytest.approx(sum(right) / 4)
    assert last["client_accuracy"] == pytest.approx(sum(own) / 4)


def test_no_weights_travel_and_features_are_not_kept(run):
    arm = run() / "benign"
    assert not list(arm.rglob(knowledge.KNOWLEDGE_FILE))
    for index in (1, 2):
        states = [load_file(arm / f"round_{index:04d}/client_{c:02d}/model.safetensors") for c in range(4)]
        assert all(
            not torch.equal(states[0]["extractor.0.weight"], state["extractor.0.weight"]) for state in states[1:]
        )
        for client in range(4):
            told = load_file(arm / f"global_{index:04d}/client_{client:02d}.safetensors")["logits"]
            assert told.shape == (metrics(arm.parent)[index]["num_samples"][f"client_{client:02d}"], 10)
    server = load_file(arm / "global_0002/model.safetensors")
    assert not set(server) & set(states[0])


def test_each_side_learns_from_the_other(run):
    """alpha is first felt in the second round, when the server has told its logits; beta in the first."""
    usual, deaf, alone = (
        run({"federation": {"optimizer": {"name": "fedgkt", **weights}}}, name) / "benign"
        for name, weights in (("usual", {}), ("deaf", {"alpha": 0.0}), ("alone", {"beta": 0.0}))
    )

    def same(one, other, place):
        first, second = (load_file(arm / place / "model.safetensors") for arm in (one, other))
        return all(torch.equal(first[name], second[name]) for name in first)

    assert same(usual, deaf, "round_0001/client_02")
    assert same(usual, deaf, "global_0001")
    assert not same(usual, deaf, "round_0002/client_02")
    assert same(usual, alone, "round_0001/client_02")
    assert not same(usual, alone, "global_0001")


PARTLY = {"federation": {"dropout": 0.5, "rounds": 3}}  # client 0 pauses in round 2, client 2 begins there


def test_a_run_cut_off_goes_on_to_the_same_bytes(run):
    whole = run(PARTLY).rename("whole")
    cut_off = run(PARTLY)
    shutil.rmtree(cut_off / "benign/round_0003")
    shutil.rmtree(cut_off / "benign/global_0003")
    (cut_off / "benign/round_0002/metrics.json").unlink()
    (cut_off / "benign/round_0002/client_99").mkdir()
    assert_same_run(whole / "benign", run(PARTLY, resume=True) / "benign")


def test_who_is_absent_keeps_its_network_and_goes_on_from_it(run, monkeypatch):
    begun = []

    def watch(edge, own, teacher, *rest):
        state = {name: value.clone() for name, value in edge.named_parameters()}
        begun.append((state, None if teacher is None else teacher.clone()))
        return original(edge, own, teacher, *rest)

    original = knowledge.train_client
    monkeypatch.setattr(knowledge, "train_client", watch)
    config = Config.model_validate(laid(TREE, PARTLY))
    turns = [(i, client) for i in range(1, 4) for client in participants(config.federation, 0, i)]
    assert [(i, c) for i, c in turns if c in (0, 2)] == [(1, 0), (2, 2), (3, 0)]
    arm = run(PARTLY) / "benign"
    assert sorted(str(path.relative_to(arm)) for path in arm.glob("round_*/client_*")) == [
        f"round_{i:04d}/client_{client:02d}" for i, client in turns
    ]
    for (index, client), (state, teacher) in zip(turns, begun, strict=True):
        last = max((i for i, other in turns if other == client and i < index), default=0)
        place = arm / (f"round_{last:04d}/client_{client:02d}" if last else "global_0000/client")
        before = load_file(place / "model.safetensors")
        assert all(torch.equal(value, before[name]) for name, value in state.items())
        if last:
            told = load_file(arm / f"global_{last:04d}/client_{client:02d}.safetensors")["logits"]
            assert torch.equal(teacher, told)
        else:
            assert teacher is None
        assert (knowledge.answer(ArmFolder(arm), index - 1, client) is None) == (last == 0)


SPOILT = [
    (lambda sent: sent._replace(features=sent.features * float("nan")), "features that are not finite"),
    (lambda sent: sent._replace(logits=sent.logits / 0), "logits that are not finite"),
    (lambda sent: sent._replace(labels=sent.labels + 10), "no class from 0 to 9"),
    (lambda sent: sent._replace(features=sent.features[:, 1:]), "features of shape"),
    (lambda sent: sent._replace(logits=sent.logits[1:]), "logits of shape"),
    (lambda sent: type(sent)(*(value[:0] for value in sent)), "features of shape"),
    (lambda sent: sent._replace(labels=sent.labels.float()), "labels of shape"),
    (lambda sent: sent._replace(labels=sent.labels[0]), "labels of shape"),
    (lambda sent: sent._replace(features=sent.features * 1e20), "more than 10000 is noise"),
]


@pytest.fixture
def spoilt(monkeypatch):
    """What client i sends is spoilt in the i-th way; that of the last client is not."""
    calls = []

    def extract(*arguments):
        calls.append(1)
        sent = original(*arguments)
        return SPOILT[len(calls) - 1][0](sent) if len(calls) <= len(SPOILT) else sent

    original = knowledge.extract
    monkeypatch.setattr(knowledge, "extract", extract)


def test_what_is_not_fit_is_refused_by_name_and_the_others_go_on(run, spoilt):
    arm = run({"federation": {"rounds": 1, "clients": len(SPOILT) + 1}}) / "benign"
    row = metrics(arm.parent)[-1]
    assert list(row["refused"]) == [f"client_{i:02d}" for i in range(len(SPOILT))]
    for (_, reason), said in zip(SPOILT, row["refused"].values(), strict=True):
        assert reason in said
    assert [path.name for path in (arm / "global_0001").glob("client_*")] == [f"client_{len(SPOILT):02d}.safetensors"]
    assert row["test_loss"] is not None


def test_a_run_ends_where_the_policy_is_to_stop(run, spoilt):
    with pytest.raises(RefusedError, match="client_00: sent features that are not finite"):
        run({"federation": {"on_refused": "stop", "clients": len(SPOILT) + 1}})


def test_a_round_in_which_nobody_is_left_leaves_the_servers_network_and_the_next_one_goes_on(run, spoilt):
    folder = run({"federation": {"rounds": 2, "clients": len(SPOILT)}})
    assert [row.get("skipped") for row in metrics(folder)] == [None, "no client passed the gate", None]
    networks = [(folder / f"benign/global_000{i}/model.safetensors").read_bytes() for i in range(3)]
    assert networks[0] == networks[1] != networks[2]


def test_a_servers_training_that_diverges_is_said(run):
    change = {"training": {"optimizer": "sgd"}, "federation": {"optimizer": {"name": "fedgkt", "learning_rate": 1e30}}}
    with pytest.raises(InputError, match=r"lower federation\.optimizer\.learning_rate"):
        run(change)


def test_examples_that_change_in_number_are_no_match_for_the_servers_logits(run):
    attack("halving", paper="none")(lambda: Attack(poison_data=lambda own, threat: own.rows(range(len(own.y) // 2))))
    try:
        arms = {"a": {"attack": {"name": "halving"}, "malicious": 2, "redraw": True}}
        with pytest.raises(InputError, match="leave out redraw"):
            run({"arms": arms, "federation": {"rounds": 6}})
    finally:
        del attack._entries["halving"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"a": {"defenses": [{"name": "median"}]}}}, "exchanges features, not weights"),
        ({"arms": {"a": {"attack": {"name": "byzantine", "mode": "random"}}}}, "exchanges features, not weights"),
        ({"federation": {"root_samples": 10}}, "exchanges features, not weights"),
        ({"arms": {"a": {"own_training": {"steps": 9}}}}, "has no own_training of malicious clients"),
        ({"model": {"name": "lr"}}, "resnet20 or resnet56, not lr"),
        ({"training": {"proximal": 0.1}}, "training.proximal"),
        ({"training": {"together": True}}, "training.together"),
        ({"federation": {"optimizer": {"name": "fedgkt", "temperature": 0}}}, "temperature"),
        ({"federation": {"optimizer": {"name": "fedgkt", "gamma": 1}}}, "no parameter 'gamma'"),
        (
            {"task": {"name": "pubmedqa"}, "model": {"name": None}, "training": {"optimizer": "sgd"}},
            "fedgkt is for small models",
        ),
    ],
)
def test_what_cannot_go_with_it_is_an_error_before_any_work(run, change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(change)
    assert not (tmp_path / "out").exists()
