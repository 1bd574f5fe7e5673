"""A curious server in a run: whom it looks at, what it is told, what is kept, and that it disturbs nothing."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fedllm_sec import Attack, InputError, attack
from fedllm_sec.config import Config, resolve
from fedllm_sec.federation import models
from fedllm_sec.federation.adapters import AdapterLearner
from fedllm_sec.federation.curious import mean_leakage, victims_of
from fedllm_sec.federation.experiment import run_experiment
from fedllm_sec.federation.matrix.run import finish, run_matrix
from fedllm_sec.federation.matrix.settings import load_matrix
from fedllm_sec.federation.participants import participants
from fedllm_sec.federation.world import World
from fedllm_sec.reports.heat_map import matrix_report
from fedllm_sec.reports.page import report
from fedllm_sec.reports.read import grouped, read_run
from fedllm_sec.reports.table import rows as table_rows
from fedllm_sec.settings import ArmSettings, Method
from fedllm_sec.tasks.arrays import Arrays
from fedllm_sec.training.plan import Plan
from fedllm_sec.training.seen import texts_seen
from fedllm_sec.training.small import train_one
from tests.federation.peeping import planted
from tests.federation.test_experiment import EXP09
from tests.federation.test_experiment import run as run_adapters  # noqa: F401
from tests.federation.test_models import TREE, laid, metrics, run  # noqa: F401
from tests.launch import ROOT, assert_same_run, environment

ONE = {"steps": 1, "batch_size": 1}  # one example an update: a logistic regression gives it away
PEEP = {"attack": {"name": "peep"}, "victims": [1, 3]}


@pytest.fixture
def shown():
    """The planted attacks, and what they are shown."""
    with planted() as seen:
        yield seen


def first_of(folder, client, index=1):
    return json.loads((folder / f"round_{index:04d}/reconstructed/client_{client:02d}.json").read_text())


# ---------------------------------------------------------------- small models


def test_a_run_with_a_curious_server(run, shown):  # noqa: F811
    """One example a client: what is found is what was trained on, and nobody is malicious."""
    arms = {"benign": {}, "watched": {**PEEP, "attack_rounds": [1, 2]}}
    folder = run({"arms": arms, "training": ONE})
    watched = folder / "watched"
    for index in (1, 2):
        row = metrics(folder, "watched")[index]
        assert row["leakage/psnr"] > 60
        assert row["leakage/ssim"] > 0.999
        assert row["leakage/label_accuracy"] == row["leakage/matched"] == 1
        assert row["malicious"] == []
        assert row["victims"] == ["client_01", "client_03"]
        assert not [key for key in row if key.startswith(("stealth", "attack_success"))]
        found = [first_of(watched, client, index) for client in (1, 3)]
        assert row["leakage/mse"] == pytest.approx(sum(each["metrics"]["mse"] for each in found) / 2)
        assert found[0]["method"] == "planted"
        assert found[0]["certain"] is False
        assert "seconds" not in found[0]
        times = json.loads((watched / f"round_000{index}/timing.json").read_text())
        assert times["reconstruction_seconds"] == {"client_01": 12.5, "client_03": 12.5}
        assert sorted(path.name for path in (watched / f"round_000{index}/reconstructed").iterdir()) == [
            "client_01.json", "client_01.png", "client_03.json", "client_03.png",
        ]  # fmt: skip
    assert not (watched / "round_0003/reconstructed").exists()
    assert not [key for key in metrics(folder, "watched")[3] if key.startswith("leakage")]
    assert not list(folder.glob("**/stealth.json"))
    assert not list(folder.glob("**/poisoned_*"))
    for threat in [threat for _, threat, *_ in shown]:
        assert threat.malicious == ()
        assert threat.round.dir is None


def test_looking_disturbs_nothing(run, shown):  # noqa: F811
    """Every model is that of an arm in which nobody looks, whatever the attack does to torch's stream; with dropout."""
    peep = {"attack": {"name": "peep_labels"}, "victims": 7}
    arms = {"benign": {}, "watched": peep}
    small = {
        "model": {"name": "cnn", "parameters": {"variant": "dropout"}},
        "data": {"train_limit": 30, "test_limit": 20},
    }
    folder = run({**small, "arms": arms, "training": {"steps": 1}, "federation": {"rounds": 2}})
    for index in range(3):
        one, other = (folder / arm / f"global_000{index}/model.safetensors" for arm in arms)
        assert one.read_bytes() == other.read_bytes()


def test_what_an_attack_draws_is_its_own(run, shown):  # noqa: F811
    before = torch.random.get_rng_state()
    arm = {"attack": {"name": "peep", "disturbs": True}}
    run({"arms": {"watched": arm}, "training": ONE, "federation": {"rounds": 1}})
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "schedule": "linear", "warmup": 0.2},
        {"optimizer": "adam", "schedule": "cosine", "weight_decay": 0.01},
    ],
)
def test_the_victim_is_told_as_it_trains(run, shown, training):  # noqa: F811
    """With what the attack is told, and the truth, the client's update can be computed again.

    Two epochs of all examples at once; in the second round buffers of BatchNorm are no longer those of the start.
    """
    change = {
        "model": {"name": "resnet20"},
        "training": {**training, "steps": 2, "batch_size": None, "together": False, "learning_rate": 1e-3},
        "data": {"train_limit": 24, "test_limit": 10, "partition": {"kind": "iid"}},
        "federation": {"clients": 3, "rounds": 2, "weights": "equal"},
        "arms": {"watched": {"attack": {"name": "peep_labels"}, "victims": [2]}},
    }
    folder = run(change)
    config = Config.model_validate(laid(laid(TREE, change), {"out": "out"}))
    assert len(shown) == 2  # in the rehearsal no attack got as far as to see a number
    for index, (client, threat, update, claimed) in enumerate(shown, 1):
        victim, received = threat.victim, load_file(folder / f"watched/global_000{index - 1}/model.safetensors")
        assert (client, claimed, victim.steps, victim.batch_size) == ("client_02", 8, 2, 8)
        assert victim.shape == (1, 28, 28)
        assert victim.classes == 10
        names = dict(victim.model.named_parameters())
        assert names.keys() == received.keys()
        assert all(torch.equal(names[name], received[name]) for name in names)
        buffers = load_file(folder / f"watched/global_000{index - 1}/buffers.safetensors")
        assert victim.buffers.keys() == buffers.keys() == dict(victim.model.named_buffers()).keys()
        assert all(torch.equal(victim.buffers[name], buffers[name]) for name in buffers)
        x, y = what_was_trained_on(folder, index, 2)
        assert float(x.min()) == pytest.approx(float(victim.bounds[0].min()))
        assert float(x.max()) <= float(victim.bounds[1].max()) + 1e-6
        settings = config.training.model_copy(
            update={
                "learning_rate": victim.learning_rate, "optimizer": victim.optimizer, "momentum": victim.momentum,
                "weight_decay": victim.weight_decay,
            }
        )  # fmt: skip
        work = Plan(torch.arange(8).repeat(2, 1), torch.tensor([8, 8]))
        state, _ = train_one(
            victim.model, {**received, **victim.buffers}, Arrays(x, y, None), work, settings, lambda batch: batch
        )
        for name, sent in update.items():
            again = state[name] - received[name]
            assert torch.linalg.vector_norm(again - sent) <= 1e-3 * torch.linalg.vector_norm(sent) + 1e-6, name


def what_was_trained_on(folder, index, client):
    """The examples of a client, from the configuration alone: normalised by hand."""
    from fedllm_sec.federation.examples import load_examples
    from fedllm_sec.tasks.task import task

    tree = yaml.safe_load((folder / "config.yaml").read_text())
    config = Config.model_validate(tree)
    examples = load_examples(config, task.build(config.task.name, config.task.parameters))
    places = examples.shards[client]
    return (examples.train.x[places].float() / 255 - 0.1307) / 0.3081, examples.train.y[places]


def test_labels_are_counted_over_all_batches(run, shown):  # noqa: F811
    """Epochs repeat examples, which counts see and images do not."""
    change = {
        "arms": {"watched": {"attack": {"name": "peep_labels"}, "victims": [0]}},
        "training": {"epochs": 3.0, "steps": None, "batch_size": 4},
        "federation": {"rounds": 1},
        "data": {"train_limit": 60},
    }
    folder = run(change)
    _, labels = what_was_trained_on(folder, 1, 0)
    counts = torch.bincount(labels.repeat(3), minlength=10)
    measured = first_of(folder / "watched", 0)["metrics"]
    assert measured["label_count_l1"] == float((counts - 5).abs().sum())
    assert measured["label_recall"] == 1
    assert measured["label_precision"] == len(labels.unique()) / 10


def test_the_report_shows_what_was_found(run, shown):  # noqa: F811
    folder = run({"arms": {"benign": {}, "watched": {**PEEP, "attack_rounds": [1]}}, "training": ONE})
    page = report([folder]).read_text()
    assert "PSNR of reconstructed images (dB)" in page
    assert "what watched finds in the update of client_03, round 1" in page
    assert (folder / "report/leakage_psnr.png").is_file()
    head, body = table_rows(grouped([read_run(folder)]))
    psnr = [row[head.index("PSNR of images")] for row in body]
    assert psnr[:2] == ["-", "-"]
    assert float(psnr[2].removesuffix(" dB")) > 60
    with Image.open(folder / "watched/round_0001/reconstructed/client_01.png") as picture:
        assert picture.format == "PNG"


def test_a_run_cut_off_goes_on_to_the_same_bytes(run, shown):  # noqa: F811
    change = {"arms": {"watched": {**PEEP, "victims": 1}}, "training": ONE, "federation": {"participants": 4}}
    whole = run(change).rename("whole")
    cut = run(change)
    shutil.rmtree(cut / "watched/global_0003")
    (cut / "watched/round_0002/metrics.json").unlink()
    (cut / "watched/round_0003/metrics.json").unlink()
    again = run(change, resume=True)
    assert_same_run(whole / "watched", again / "watched")
    files = sorted(path.relative_to(whole) for path in whole.glob("watched/round_*/reconstructed/*"))
    assert len(files) == 3 * 2
    for path in files:
        assert (whole / path).read_bytes() == (again / path).read_bytes()


def test_a_victim_that_is_refused_is_left_out(run, shown, monkeypatch):  # noqa: F811
    honest = models.save_many

    def spoilt(clients, parts, claims, stem):
        for row, client in enumerate(clients):
            if client == 1:
                next(iter(parts[""].values()))[row] = float("nan")
        honest(clients, parts, claims, stem)

    monkeypatch.setattr(models, "save_many", spoilt)
    folder = run({"arms": {"watched": PEEP}, "training": ONE, "federation": {"rounds": 1}})
    (row,) = metrics(folder, "watched")[1:]
    assert list(row["refused"]) == ["client_01"]
    assert row["victims"] == ["client_03"]
    assert row["leakage/psnr"] > 60
    alone = run({"arms": {"watched": {**PEEP, "victims": [1]}}, "training": ONE, "federation": {"rounds": 1}}, "alone")
    (row,) = metrics(alone, "watched")[1:]
    assert not [key for key in row if key.startswith(("leakage", "victims"))]


# ---------------------------------------------------------------- whom it looks at


def config_of(**arm):
    return Config.model_validate(
        laid(TREE, {"arms": {"watched": arm}, "federation": {"participants": 4, "rounds": 30}})
    )


def test_victims_are_drawn_among_those_that_answer_and_stay_the_same():
    config = config_of(victims=2)
    arm = config.arms["watched"]
    rounds = {index: participants(config.federation, config.seed, index) for index in range(1, 31)}
    drawn = {index: victims_of(arm, config, index, present) for index, present in rounds.items()}
    assert all(len(chosen) == 2 and set(chosen) <= set(rounds[index]) for index, chosen in drawn.items())
    everybody = victims_of(arm, config, 1, range(7))
    assert all(set(everybody) & set(rounds[index]) <= set(chosen) for index, chosen in drawn.items())
    assert victims_of(arm, config, 2, range(7)) == everybody
    others = [victims_of(arm, config.model_copy(update={"seed": seed}), 1, range(7)) for seed in range(20)]
    assert len(set(others)) > 5
    again = arm.model_copy(update={"redraw": True})
    assert len({victims_of(again, config, index, range(7)) for index in rounds}) > 5


def test_named_victims_are_looked_at_when_they_answer():
    config = config_of(victims=(5, 1))
    assert victims_of(config.arms["watched"], config, 1, (1, 2, 5)) == (1, 5)
    assert victims_of(config.arms["watched"], config, 1, (2, 5)) == (5,)
    assert victims_of(config.arms["watched"], config, 1, (2, 3)) == ()


def test_the_mean_is_over_those_that_have_a_measure(tmp_path):
    for client, measured in enumerate([{"psnr": 10.0, "ssim": 0.5}, {"psnr": 20.0}, {}]):
        (tmp_path / f"client_{client:02d}.json").write_text(json.dumps({"metrics": measured}))
    assert mean_leakage(tmp_path) == {"leakage/psnr": 15.0, "leakage/ssim": 0.5}
    assert mean_leakage(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"watched": {**PEEP, "victims": [7]}}}, "client 7 does not exist: clients are 0 to 6"),
        ({"arms": {"watched": {**PEEP, "victims": 8}}}, "victims=8, but there are 7 clients"),
        ({"arms": {"watched": {**PEEP, "victims": 0}}}, "victims=0, but there are 7 clients"),
        ({"arms": {"watched": {**PEEP, "malicious": 2}}}, "nobody is malicious: say by victims"),
        ({"arms": {"a": {"attack": {"name": "byzantine"}, "victims": 2}}}, "victims is for attacks that only look"),
        ({"arms": {"a": {"victims": 2}}}, "victims is for attacks that only look"),
        ({"arms": {"a": {"attack": {"name": "peep_texts"}}}}, "arms.a.attack: peep_texts .*a base model's folder"),
        (
            {"arms": {"watched": PEEP}, "model": {"name": "dcgan"},
             "training": {"procedure": {"name": "gan"}, "optimizer": "adam"}},
            "procedure=gan has no labels",
        ),
        (
            {"arms": {"watched": PEEP}, "model": {"name": "resnet20"}, "training": {"optimizer": "adam"},
             "federation": {"optimizer": {"name": "fedgkt"}}},
            "exchanges features, not weights",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_at_is_an_error_before_any_work(run, shown, change, message, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=message):
        run(change)
    assert not (tmp_path / "out").exists()
    assert shown == []


def test_an_attack_that_also_acts_is_nobodys_curiosity(run):  # noqa: F811
    """It is malicious clients' as before; what they could reconstruct is not asked for."""

    @attack("both", paper="none, arXiv:0000.00000")
    def both():
        def never(rows, threat):
            raise AssertionError

        return Attack(reconstruct_data=never, poison_model=lambda visible, threat: visible.rows(threat.own))

    try:
        folder = run({"arms": {"a": {"attack": {"name": "both"}, "malicious": [2]}}, "federation": {"rounds": 1}})
    finally:
        del attack._entries["both"]
    assert metrics(folder, "a")[1]["malicious"] == ["client_02"]
    assert "stealth/cosine" in metrics(folder, "a")[1]


# ---------------------------------------------------------------- adapters


@pytest.fixture
def embedded_ids():
    """Every batch of token ids that reaches an embedding in training mode: another way to see what is trained on."""
    seen = []

    def look(module, args):
        if isinstance(module, nn.Embedding) and module.training:
            seen.append(args[0].clone())

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    yield seen
    hook.remove()


def test_adapters_are_looked_at_and_the_truth_is_what_went_through_the_model(run_adapters, shown, embedded_ids):  # noqa: F811
    """Client by client in turn, two steps each: those of the victim are found again, in their order, unpadded."""
    arm = ArmSettings(attack=Method(name="peep_texts"), victims=(3,))
    changes = ["federation.rounds=1", "federation.space=product", "training.schedule=linear", "training.warmup=0.5"]
    folder = run_adapters(*changes, arms={"watched": arm}) / "watched"
    truth = json.loads((folder / "round_0001/trained_on/client_03.json").read_text())["texts"]
    batches = embedded_ids[2 * 3 : 2 * 3 + 2]
    assert len(embedded_ids) == 2 * 7
    assert len(truth) == sum(len(batch) for batch in batches) == 8
    for text, row in zip(truth, [row.tolist() for batch in batches for row in batch], strict=True):
        assert row[: len(text)] == text
        assert len(set(row[len(text) :])) <= 1  # padding
    assert [path.name for path in (folder / "round_0001/trained_on").iterdir()] == ["client_03.json"]

    (client, threat, update, claimed) = shown[-1]
    victim = threat.victim
    assert (client, claimed, victim.steps, victim.batch_size, victim.optimizer) == ("client_03", 20, 2, 4, "adamw")
    assert (victim.base / "config.json").is_file()
    assert victim.model is None
    assert victim.learning_rate == pytest.approx(1e-2 * (0 + 1) / 2)  # warm-up: none, then all
    assert all("lora_" in name for name in update)
    visible = {token for text in truth for token in text[:-1]}
    row = metrics(folder.parent, "watched")[1]
    assert row["leakage/token_recall"] == len(visible & set(range(500))) / len(visible)
    assert row["leakage/token_precision"] == len(visible & set(range(500))) / 500
    assert row["malicious"] == []
    page = (folder / "round_0001/reconstructed/client_03.html").read_text()
    assert "What was trained on" in page
    assert "Took" not in page
    assert first_of(folder, 3)["rank"] == 8
    links = report([folder.parent]).read_text()
    assert "href='../watched/round_0001/reconstructed/client_03.html'" in links


def test_what_small_models_have_language_models_do_not(run_adapters, shown, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=r"arms.watched.attack: peep cannot work here: peep needs a small"):
        run_adapters(arms={"watched": ArmSettings(attack=Method(name="peep"))})
    assert not (tmp_path / "run").exists()


def test_texts_are_seen_only_while_a_model_trains_and_somebody_looks():
    class Model(nn.Module):
        def forward(self, input_ids, attention_mask, labels=None):
            return input_ids

    model, ids = Model(), torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with texts_seen(model) as texts:
        model(input_ids=ids, attention_mask=mask, labels=ids)
        model.eval()
        model(input_ids=ids, attention_mask=mask)
    model.train()(input_ids=ids, attention_mask=mask)
    assert texts == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(("sharded", "rank", "texts"), [(False, 1, [[1]]), (True, 0, [[1], [2, 3]]), (True, 1, None)])
def test_where_a_model_is_sharded_the_main_process_keeps_what_all_have_seen(tmp_path, sharded, rank, texts):
    """Each process has seen its own part of every batch; here the second one's is [2, 3]."""

    class TwoProcesses(World):
        def gather(self, value):
            return [value, [[2, 3]]]

    learner = AdapterLearner(None, {}, None, None, TwoProcesses(rank, 2, sharded), 1, None)
    learner.keep_truth(tmp_path / "trained_on/client_00.json", [[1]])
    kept = list(tmp_path.glob("trained_on/*"))
    assert [json.loads(path.read_text())["texts"] for path in kept] == ([] if texts is None else [texts])


def test_processes_look_once_and_leave_the_same_bytes(small, run_adapters, shown, tmp_path, monkeypatch):  # noqa: F811
    """Two processes, of which this is the main one: the other trains the second victim, this one reconstructs both."""
    arm = ArmSettings(attack=Method(name="peep_texts"), victims=(2, 3))
    arguments = ["federation.rounds=1", "federation.clients=4", "data.train_limit=40"]
    alone = run_adapters(*arguments, arms={"watched": arm}).absolute()
    config = resolve(EXP09, [*small, *arguments, "out=run"], "local").model_copy(update={"arms": {"watched": arm}})
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    Path("config.json").write_text(config.model_dump_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "1", "LOCAL_RANK": "1"}
    command = [sys.executable, "-m", "tests.federation.peeping", "config.json"]
    place = {**environment(), **launched, "PYTHONPATH": str(ROOT)}
    shown.clear()
    with subprocess.Popen(command, env=place, stderr=subprocess.PIPE) as other:
        for name, value in {**launched, "RANK": "0", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        two = run_experiment(config, World.from_environment()).absolute()
        _, said = other.communicate(timeout=240)
    assert other.returncode == 0, said.decode()[-3000:]
    assert_same_run(alone / "watched", two / "watched")
    for folder in ("reconstructed", "trained_on"):
        names = [path.relative_to(alone) for path in alone.glob(f"watched/round_0001/{folder}/*")]
        assert len(names) == (4 if folder == "reconstructed" else 2)
        for name in names:
            assert (alone / name).read_bytes() == (two / name).read_bytes()
    assert [client for client, *_ in shown] == ["client_02", "client_03"]
    assert json.loads(Path("run.1.json").read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_where_deepspeed_shards_the_main_process_looks_at_what_both_have_trained_on(small, tmp_path, stage):
    """Both processes train every client together, each on half of a batch: the texts are those of one process."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ours = {**environment(), "PYTHONPATH": str(ROOT)}
    arm, truths = ArmSettings(attack=Method(name="peep_texts"), victims=(1,)), []
    for place, size in (("alone", 8), (stage, 4)):
        arguments = ["federation.rounds=1", "federation.clients=2", f"training.batch_size={size}", f"out={place}"]
        config = resolve(EXP09, [*small, *arguments], "local").model_copy(update={"arms": {"watched": arm}})
        (tmp_path / f"{place}.json").write_text(config.model_dump_json())
        launcher = ["accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0", "--config_file"]
        launcher += [str(ROOT / f"configs/accelerate/{stage}.yaml"), "--module"]
        module = [*(launcher if place == stage else []), "tests.federation.peeping", f"{place}.json"]
        command = [sys.executable, "-m", *module]
        done = subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True, timeout=540)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        truth = tmp_path / place / "watched/round_0001/trained_on/client_01.json"
        truths.append(json.loads(truth.read_text())["texts"])
    assert sorted(truths[0]) == sorted(truths[1])
    assert len(truths[0]) == 16
    assert json.loads((tmp_path / f"{stage}.0.json").read_text()) == ["client_01"]
    assert json.loads((tmp_path / f"{stage}.1.json").read_text()) == []


def test_a_victim_is_trained_here_even_where_its_work_could_be_shared(small, shown, tmp_path, monkeypatch):
    """Cells of a matrix share what honest clients send; a victim's texts have to be seen."""
    monkeypatch.chdir(tmp_path)
    tree = {
        "name": "texts",
        "task": {"name": "pubmedqa"},
        "federation": {"clients": 3},
        "attacks": {"peep": {"attack": {"name": "peep_texts"}, "victims": [1]}},
        "defenses": {},
    }
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    overrides = [*small, "federation.rounds=1", "training.steps=1", "scale=local", "seeds=[0]"]
    matrix, _ = load_matrix(tmp_path / "matrix.yaml", overrides)
    outcomes = run_matrix(matrix, 1)
    assert [outcome.error for outcome in outcomes] == [None, None]
    result, cost = finish(matrix)
    assert (cost["trainings"], cost["shared"]) == (6, 2)
    (cell,) = [cell for cell in result["cells"] if cell["attack"] == "peep"]
    assert cell["mean"]["leakage/token_recall"] > 0
    page = matrix_report(matrix.folder).read_text()
    assert "How well it hides, and what it finds out" in page
    assert "leakage/token_recall (%)" in page
    assert (
        len(json.loads((tmp_path / "run/seed_0/peep--none/round_0001/trained_on/client_01.json").read_text())["texts"])
        == 8
    )
