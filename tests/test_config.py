"""Configuration files: precedence, strictness, and that ours are sound."""

from pathlib import Path

import pytest
import yaml

from fedllm_sec import InputError
from fedllm_sec.config import Config, read_tree, resolve, to_yaml
from fedllm_sec.federation.methods import build_methods
from fedllm_sec.federation.scale import choose_scale, stand_ins
from fedllm_sec.models import Shape, model
from fedllm_sec.tasks import task

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("exp*.yaml"))
OTHERS = sorted((ROOT / "configs").glob("fed*.yaml"))
EXP08 = ROOT / "configs" / "exp08_bert_20news.yaml"
EXP09 = ROOT / "configs" / "exp09_pythia_pubmedqa.yaml"


@pytest.mark.parametrize("path", CONFIGS + OTHERS, ids=lambda path: path.stem)
def test_every_configuration_builds_all_that_it_names_at_all_its_scales(path):
    for scale in read_tree(path)["scales"]:
        check_that_it_builds(resolve(path, ["federation.device=cpu"], scale))


def check_that_it_builds(config):
    work = task.build(config.task.name, config.task.parameters)
    if config.model.name:
        model.build(config.model.name, config.model.parameters)(Shape(work.shape, work.classes, work.vocabulary))
    for arm in config.arms.values():
        methods = build_methods(arm, config)
        assert (methods.attack is None) == (arm.attack is None)
        assert len(methods.defenses) == len(arm.defenses)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in (EXP08, EXP09)], ids=lambda path: path.stem)
def test_experiments_1_to_7_are_the_papers(path):
    config = resolve(path, [], "paper")
    federation, training = config.federation, config.training
    assert (federation.clients, federation.rounds) == (100 if "exp05" in path.stem else 10, 100)
    assert (training.optimizer, training.learning_rate, training.epochs, training.steps) == ("sgd", 0.03, 1, None)
    assert training.batch_size == (32 if "rnn" in path.stem else 10)
    partition = config.data.partition
    natural = "rnn" in path.stem or "cnn" in path.stem
    assert partition.kind == ("natural" if natural else "iid" if "exp04" in path.stem else "dirichlet")
    assert partition.alpha == 0.5
    assert config.arms["none" if "exp02" in path.stem else "benign"].attack is None
    for arm in config.arms.values():
        assert arm.attack is None or arm.malicious in ((10,) if "exp05" in path.stem else (1, 2, 3))
        for defense in arm.defenses:
            assert defense.name in ("krum", "foolsgold", "rfa")
            assert defense.name != "krum" or defense.parameters["m"] == 5
            assert defense.name != "krum" or defense.parameters["f"] == (1 if arm.attack is None else arm.malicious)


def test_experiment_8_is_the_papers_with_fednlps_training():
    config = resolve(EXP08, [], "paper")
    assert config.federation.clients == 10
    assert list(config.arms) == ["benign", "attacked", "defended"]
    attacked, defended = config.arms["attacked"], config.arms["defended"]
    assert attacked.attack == defended.attack
    assert attacked.attack.name == "model_replacement"
    assert attacked.malicious == defended.malicious == 1
    assert [method.model_dump() for method in defended.defenses] == [{"name": "krum", "m": 5, "f": 1}]
    assert config.model.path == "google-bert/bert-base-uncased"
    assert (config.data.train, config.data.test) == ("SetFit/20_newsgroups", "SetFit/20_newsgroups")
    assert config.task.parameters["max_length"] == 128
    training = config.training
    assert (training.batch_size, training.epochs, training.steps, training.optimizer) == (16, 1, None, "adamw")
    assert (training.weight_decay, training.max_grad_norm) == (1e-3, 1.0)


def test_experiment_9_is_the_papers():
    config = resolve(EXP09, [], "paper")
    assert config.federation.clients == 7
    assert list(config.arms) == ["benign", "attacked", "defended"]
    attacked, defended = config.arms["attacked"], config.arms["defended"]
    assert attacked.attack == defended.attack
    assert attacked.attack.model_dump() == {"name": "byzantine", "mode": "random"}
    assert attacked.malicious == defended.malicious == 1
    assert [method.model_dump() for method in defended.defenses] == [{"name": "krum", "m": 2, "f": 1}]
    assert config.model.path == "EleutherAI/pythia-1b"
    assert config.model.lora.target_modules == ("query_key_value",)
    assert (config.data.train, config.data.test) == ("qiaojin/PubMedQA:pqa_artificial", "qiaojin/PubMedQA:pqa_labeled")


def test_the_command_line_wins_over_the_scale_and_the_scale_over_the_file():
    assert resolve(EXP09, [], "paper").training.steps == 200
    assert resolve(EXP09, [], "tiny").training.steps != 200
    assert resolve(EXP09, ["training.steps=3", "seed=5"], "tiny").training.steps == 3


def test_what_stands_in_at_a_smaller_scale_is_told():
    path = ROOT / "configs" / "exp01_attacks.yaml"
    said = stand_ins(resolve(path, [], "paper"), resolve(path, [], "laptop"))
    assert said.split(", ") == [
        "model.name=lenet for resnet20",
        "data.train_limit=10000 for None",
        "data.test_limit=2000 for None",
        "federation.rounds=30 for 100",
    ]
    assert stand_ins(resolve(path, [], "paper"), resolve(path, [], "paper")) == ""
    chosen = ["model.name=lr", "federation.rounds=5"]  # the command line's, at any scale
    assert "lr" not in stand_ins(resolve(path, chosen, "paper"), resolve(path, chosen, "laptop"))


def test_a_configuration_survives_yaml():
    config = resolve(EXP09, [], "tiny")
    assert Config.model_validate(yaml.safe_load(to_yaml(config))) == config


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert resolve(EXP09, ["training.learning_rate=1e-4"], "tiny").training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeed=1", "seeed: unknown field; did you mean 'seed'"),
        ("federation.round=1", "federation.round: unknown field; did you mean 'rounds'"),
        ("model.lora.rank=1", "model.lora.rank: unknown field; known: alpha, dropout, freeze_a, r, target_modules"),
        ("arms.defended.defence=1", "arms.defended.defence: unknown field; did you mean 'defenses'"),
        ("training.batch_size=0", "training.batch_size: Input should be greater than or equal to 1"),
        ("arms.report={}", "cannot be called 'report'"),
        ("arms={../x: {}}", "arms.*pattern"),
        ("nonsense", "overrides are written key=value"),
    ],
)
def test_a_mistake_is_told_with_its_place(override, message):
    with pytest.raises(InputError, match=message):
        resolve(EXP09, [override], "tiny")


def test_all_mistakes_are_told_at_once():
    with pytest.raises(InputError) as error:
        resolve(EXP09, ["seeed=1", "federation.rounds=-1"], "tiny")
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_or_broken_file_is_told(tmp_path):
    with pytest.raises(InputError, match="no such configuration"):
        resolve(tmp_path / "none.yaml", [], "tiny")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        resolve(tmp_path / "bad.yaml", [], "tiny")


@pytest.mark.parametrize(
    ("malicious", "message"), [("[7]", "client 7 does not exist"), ("8", "there are 7 clients"), ("-1", "malicious=-1")]
)
def test_an_adversary_owns_clients_that_exist(malicious, message):
    config = resolve(EXP09, [f"arms.attacked.malicious={malicious}"], "tiny")
    with pytest.raises(InputError, match=message):
        build_methods(config.arms["attacked"], config)


def test_a_defense_that_cannot_work_fails_before_any_training():
    config = resolve(EXP09, ["federation.clients=3"], "tiny")
    with pytest.raises(InputError, match=r"krum\(f=1, m=2\) needs n >= f \+ 3, got n=3"):
        build_methods(config.arms["defended"], config)


def choose(asked, overrides=()):
    return choose_scale(read_tree(EXP09, [f"scale={asked}", *overrides]))


def test_auto_takes_the_embedded_scale_without_a_gpu_and_says_why(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    scale, reason = choose("auto")
    assert scale == "tiny"
    assert "no GPU" in reason
    assert "scale=paper" in reason


def test_auto_takes_a_given_model():
    assert choose("auto", ["model.path=/some/folder"]).scale == "local"


def test_a_misspelt_scale_is_an_error_and_a_model_in_the_file_is_seen():
    with pytest.raises(InputError, match="unknown scale 'papre'; did you mean 'paper'"):
        choose("papre")
    assert choose_scale({"scale": "auto", "model": {"path": "/some/folder"}}).scale == "local"
    assert choose_scale({"scale": "local", "model": {"path": "/some/folder"}}).scale == "local"


def test_paper_is_never_substituted_and_local_needs_a_model():
    assert choose("paper").scale == "paper"
    with pytest.raises(InputError, match=r"needs model\.path"):
        choose("local")


def test_auto_does_not_take_paper_when_the_hub_is_out_of_reach(monkeypatch):
    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    scale, reason = choose("auto")
    assert scale == "tiny"
    assert "pythia-1b" in reason


def refuse(*args, **kwargs):
    raise ConnectionError("offline")
