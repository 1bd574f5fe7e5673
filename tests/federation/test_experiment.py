"""The experiment in one process: what goes wrong, and what the run leaves when it does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fedllm_sec import Attack, Defense, InputError, attack, defense
from fedllm_sec.config import resolve
from fedllm_sec.federation.experiment import run_experiment
from fedllm_sec.federation.texts import load_data
from fedllm_sec.federation.world import World
from fedllm_sec.reports.page import report
from fedllm_sec.settings import ArmSettings, Method
from fedllm_sec.tasks import task
from tests.launch import ROOT, assert_same_run

EXP09 = ROOT / "configs/exp09_pythia_pubmedqa.yaml"


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """Run with more arguments, in this process, and return the folder."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments, resume=False, arms=None):
        config = resolve(EXP09, [*small, *arguments], "local")
        if arms:
            config = config.model_copy(
                update={"arms": arms if isinstance(arms, dict) else {a: config.arms[a] for a in arms}}
            )
        return run_experiment(config, World(), resume=resume)

    return start


def metrics(folder, arm):
    return [json.loads(line) for line in (folder / arm / "metrics.jsonl").read_text().splitlines()]


def test_a_client_whose_training_diverges_is_refused_and_the_round_goes_on(run, monkeypatch):
    """One NaN in what a client sends must never reach a method."""
    from fedllm_sec.federation import adapters

    honest = adapters.save_adapter

    def save(state, config, folder, **files):
        if folder.name == "client_03":
            state = {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}
        honest(state, config, folder, **files)

    monkeypatch.setattr(adapters, "save_adapter", save)
    folder = run("federation.rounds=1", arms=["benign"])
    row = metrics(folder, "benign")[1]
    assert list(row["refused"]) == ["client_03"]
    assert "NaN" in row["refused"]["client_03"]
    assert row["test_loss"] is not None
    with pytest.raises(InputError, match=r"client_03: .*NaN"):
        run("federation.rounds=1", "federation.on_refused=stop", "out=other", arms=["benign"])


def test_a_language_model_can_be_trained_whole_too(run):
    from transformers import AutoModelForCausalLM

    folder = run("model.lora=null", "federation.rounds=1", "training.learning_rate=1e-4", arms=["benign"])
    before, after = metrics(folder, "benign")
    assert after["test_loss"] < before["test_loss"]
    saved = load_file(folder / "benign/global_0001/model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "benign/global_0001")
    assert dict(loaded.named_parameters()).keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.named_parameters())


def test_a_model_that_diverges_is_reported_as_such(run):
    folder = run("federation.rounds=1", "arms.attacked.attack.scale=1e30", arms=["attacked"])
    row = metrics(folder, "attacked")[1]
    assert row["test_loss"] is None
    assert "diverged" in report([folder]).read_text()


def test_a_folder_that_holds_a_run_is_not_written_over(run, tmp_path):
    folder = run("federation.rounds=1", arms=["benign"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds a run already; go on with --resume"):
        run("federation.rounds=1", arms=["benign"])
    with pytest.raises(InputError, match="holds a run of another configuration"):
        run("federation.rounds=2", arms=["benign"], resume=True)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run("out=notes")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("federation.clients=141", "would have no data"),
        ("data.train=nowhere.jsonl", "no such data file"),
        ("trackers=[tensorbord]", "unknown tracker 'tensorbord'"),
        ("arms.defended.defenses=[{name: krum, f: 5}]", "needs n >= f"),
        ("arms.defended.defenses=[{name: krum, f: 1, m: 7}]", "at most n - f"),
        ("arms.attacked.attack.name=byzantin", "did you mean 'byzantine'"),
        ("federation.device=abacus", "unknown device 'abacus'"),
        ("federation.memory=lots", "cannot read 'lots'"),
        ("task.name=pubmed", "unknown task 'pubmed'; did you mean 'pubmedqa'"),
        ("task.max_length=40", "needs .* tokens even without its passage"),
        ("model.path=nowhere", "cannot be loaded"),
        ("model.path=nowhere.gguf", "no such file"),
        ("model.lora.target_modules=[nothing]", "target_modules"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_training(run, tmp_path, argument, message):
    with pytest.raises(InputError, match=message):
        run(argument)
    assert not (tmp_path / "run").exists()


def test_texts_longer_than_the_context_are_counted_and_said(run, capsys):
    run("task.max_length=100", "federation.rounds=1", arms=["benign"])
    assert "of 140 texts are longer than 100 tokens: the end of their passage is cut" in capsys.readouterr().err


def test_without_a_test_set_a_fifth_is_held_out(small):
    config = resolve(EXP09, [*small, "data.test=null"], "local")
    data = load_data(config, task.build("pubmedqa", {"prompt": "question"}))
    trained = {row.passage for shard in data.shards for row in shard}
    assert len(data.test) == 28
    assert sum(map(len, data.shards)) == 112
    assert not trained & {row.passage for row in data.test}


def test_an_attack_on_data_reaches_what_malicious_clients_train_on(run, monkeypatch):
    """The original's poisoned set is stored where nothing reads it."""
    from fedllm_sec.federation import adapters

    trained: dict[tuple[str, int], set[str]] = {}
    honest = adapters.train_client

    def spy(base, rows, received, settings, **options):
        (client,) = (callback.client for callback in options["callbacks"])
        texts = {base.tokenizer.decode([token for token in row["labels"] if token >= 0]) for row in rows}
        trained.setdefault(("poisoned" if any("WRONG" in t for t in texts) else "clean", client), set()).update(texts)
        return honest(base, rows, received, settings, **options)

    @attack("answer_wrong", paper="none, arXiv:0000.00000")
    def answer_wrong():
        from dataclasses import replace

        return Attack(poison_data=lambda rows, threat: [replace(row, response=" WRONG") for row in rows])

    monkeypatch.setattr(adapters, "train_client", spy)
    try:
        run(arms={"attacked": ArmSettings(attack=Method(name="answer_wrong"), malicious=(2,))})
    finally:
        del attack._entries["answer_wrong"]
    assert {client for kind, client in trained if kind == "poisoned"} == {2}
    assert {client for kind, client in trained if kind == "clean"} == {0, 1, 3, 4, 5, 6}


def test_a_round_with_a_memory_finds_the_last_one(run):
    found = []

    @defense("remember", paper="none, arXiv:0000.00000")
    def remember():
        def before(updates, round):
            if round.dir is not None:
                found.append((round.index, round.previous and (round.previous / "remember/decision.json").exists()))
            round.record("remember", {"seen": list(updates.clients)})
            return updates

        return Defense(before=before)

    try:
        run("arms.defended.defenses=[{name: remember}]", arms=["defended"])
    finally:
        del defense._entries["remember"]
    assert found == [(1, None), (2, True)]


def test_a_client_that_claims_many_samples_is_capped(run, monkeypatch):
    from fedllm_sec.federation import adapters

    honest = adapters.save_adapter

    def save(state, config, folder, client=None, **files):
        claims = {**client, "num_samples": 1e9} if folder.name == "client_03" else client
        honest(state, config, folder, client=claims)

    monkeypatch.setattr(adapters, "save_adapter", lambda *a, **k: save(*a, **k) if "client" in k else honest(*a, **k))
    folder = run("federation.rounds=1", "federation.sample_cap=2", arms=["benign"])
    clients = sorted((folder / "benign/round_0001").glob("client_*"))
    states = [load_file(client / "adapter_model.safetensors") for client in clients]
    weights = torch.tensor([20.0, 20, 20, 40, 20, 20, 20]) / 160
    for name, tensor in load_file(folder / "benign/global_0001/adapter_model.safetensors").items():
        expected = sum(w * state[name] for w, state in zip(weights, states, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("broken", ["client_02", "client_05"])
def test_a_diverging_client_does_not_end_an_attacked_arm(run, monkeypatch, broken):
    """Whether it is the adversary's own (5) or another's (2)."""
    from fedllm_sec.federation import adapters

    honest = adapters.save_adapter

    def save(state, config, folder, **files):
        if folder.name == broken:
            state = {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}
        honest(state, config, folder, **files)

    monkeypatch.setattr(adapters, "save_adapter", save)
    folder = run("federation.rounds=1", "arms.defended.malicious=[5]", arms=["defended"])
    row = metrics(folder, "defended")[1]
    assert list(row["refused"]) == [broken]
    assert bool(list(folder.rglob("poisoned_05"))) == (broken != "client_05")


@pytest.mark.parametrize("claim", ["many", None, -1, 0])
def test_a_claim_that_is_no_count_is_refused_by_name(run, monkeypatch, claim):
    from fedllm_sec.federation import adapters

    honest = adapters.save_adapter

    def save(state, config, folder, **files):
        if folder.name == "client_01":
            files["client"] = {**files["client"], "num_samples": claim}
        honest(state, config, folder, **files)

    monkeypatch.setattr(adapters, "save_adapter", save)
    folder = run("federation.rounds=1", "federation.clients=5", arms=["benign"])
    assert "claims num_samples" in metrics(folder, "benign")[1]["refused"]["client_01"]


def test_nobody_malicious_is_no_attack(run):
    folder = run("federation.rounds=1", "arms.attacked.malicious=0", arms=["benign", "attacked"])
    for name in ("global_0001", "round_0001/client_06"):
        one, other = (folder / arm / name / "adapter_model.safetensors" for arm in ("benign", "attacked"))
        assert one.read_bytes() == other.read_bytes()


def test_an_adversary_sees_what_it_was_granted(run):
    seen = []

    @attack("look", paper="none, arXiv:0000.00000")
    def look():
        def poison_model(visible, threat):
            seen.append((visible.clients, threat.malicious, threat.size, threat.server is not None))
            return visible.rows(threat.own)

        return Attack(poison_model=poison_model)

    arms = {
        f"sees_{visible}": ArmSettings(attack=Method(name="look"), malicious=(4, 1), visible=visible)
        for visible in ("own", "colluders", "all", "aggregator")
    }
    try:
        run("federation.rounds=1", arms=arms)
    finally:
        del attack._entries["look"]
    everybody = tuple(f"client_{k:02d}" for k in range(7))
    assert seen == [
        (("client_01",), (1,), 7, False),  # each by itself
        (("client_04",), (4,), 7, False),
        (("client_01", "client_04"), (1, 4), 7, False),
        (everybody, (1, 4), 7, False),
        (everybody, (1, 4), 7, True),
    ]


def test_an_attack_that_asks_for_more_than_it_was_granted_is_refused_before_any_work(run):
    with pytest.raises(InputError, match=r"alie.*colluders.*visible=own"):
        run(arms={"attacked": ArmSettings(attack=Method(name="alie"), malicious=(4, 1))})


def test_an_attack_acts_in_its_rounds_only(run):
    arm = {"attack": Method(name="byzantine", mode="zero"), "malicious": (4,)}
    window = ArmSettings(**arm, attack_rounds={"first": 2, "last": 2})
    listed = ArmSettings(**arm, attack_rounds=[1, 3])
    folder = run("federation.rounds=3", "training.steps=1", arms={"window": window, "listed": listed})
    acted = {
        name: [i for i in (1, 2, 3) if (folder / name / f"round_{i:04d}" / "poisoned_04").exists()]
        for name in ("window", "listed")
    }
    assert acted == {"window": [2], "listed": [1, 3]}
    assert metrics(folder, "window")[3]["malicious"] == []


class Killed(BaseException):
    """What no code of ours catches for good."""


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 5, 9, 11, 12, 13, 14, 15, 16, 17, 18])
def test_a_run_cut_off_at_any_write_resumes_to_the_same_bytes(run, monkeypatch, tmp_path, moment):
    from fedllm_sec.updates import files

    arguments = ["federation.rounds=1", "federation.clients=5", "training.steps=1"]
    whole = run(*arguments, arms=["defended"])
    whole.rename(tmp_path / "whole")
    left = [moment]
    honest = files.sync

    def sync(path):
        if not path.name.endswith(files.PARTIAL) and path.is_dir():  # after the rename of something whole
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        honest(path)

    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(Killed):
        run(*arguments, arms=["defended"])
    monkeypatch.setattr(files, "sync", honest)
    run(*arguments, arms=["defended"], resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


CHAINS = {
    "fltrust": [("fltrust", {})],
    "flame": [("flame", {})],
    "history": [("cross_round", {"similarity": -1}), ("centered_clipping", {"momentum": 0.5})],
    "sybils": [("foolsgold", {}), ("crfl", {"norm": 50.0, "std": 0.001})],
    "mixed": [("nnm", {"f": 1}), ("three_sigma", {}), ("trimmed_mean", {"f": 1})],
}


@pytest.mark.parametrize("space", ["factors", "product"])
def test_defenses_with_memories_and_a_trusted_update_run_in_both_spaces_and_resume(run, space):
    """Killed after the first round and resumed, a run ends with the bytes of one that was not."""
    attacked = {"attack": Method(name="byzantine"), "malicious": 1}
    arms = {
        name: ArmSettings(**attacked, defenses=tuple(Method(name=n, **parameters) for n, parameters in chain))
        for name, chain in CHAINS.items()
    }
    names = [f"federation.space={space}", "federation.root_samples=8", "training.steps=1"]
    folder = run(*names, arms=arms)
    for arm in arms:
        last = metrics(folder, arm)[-1]
        assert last["test_loss"] is not None, arm
        assert list(last["decisions"]) == sorted(name for name, _ in CHAINS[arm])
    shutil.copytree(folder, folder.parent / "whole")
    for arm in arms:
        shutil.rmtree(folder / arm / "round_0002")
        (folder / arm / "round_0002").mkdir()
        (folder / arm / "round_0002" / "half.partial").write_text("a killed run")
    assert_same_run(run(*names, arms=arms, resume=True), folder.parent / "whole")
    assert (folder / "fltrust" / "round_0001" / "server" / "adapter_model.safetensors").exists()
    assert "Kept by the server" in report([folder]).read_text()


def test_fltrust_without_texts_of_the_server_is_refused_before_any_work(run, tmp_path):
    arm = ArmSettings(defenses=(Method(name="fltrust"),))
    with pytest.raises(InputError, match=r"fltrust needs .* federation\.root_samples"):
        run(arms={"trusting": arm})
    assert not (tmp_path / "run").exists()
