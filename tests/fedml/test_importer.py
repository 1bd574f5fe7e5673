"""FedML's YAML in our terms: the papers' experiment, every string and key of attacks and defenses, flattening."""

import pytest
import yaml

from fedllm_sec import defense
from fedllm_sec.config import validated
from fedllm_sec.fedml import import_fedml, write_import
from fedllm_sec.fedml.defenses import DEFENSES
from tests.fedml.example import EXPERIMENT, attacked, defended, families, imported, only, written


def test_the_papers_experiment_word_for_word(tmp_path):
    """Experiment 3 of FedSecurity: ten clients, one byzantine, m-Krum with m = 5, ResNet20 on CIFAR-10, alpha 0.5."""
    config, _ = import_fedml(written(tmp_path, EXPERIMENT, "cifar10_random_krum.yaml"))
    assert config == {
        "name": "cifar10_random_krum",
        "seed": 0,
        "task": {"name": "cifar10"},
        "model": {"name": "resnet20", "parameters": {}},
        "data": {
            "train": "uoft-cs/cifar10",
            "test": "uoft-cs/cifar10",
            "partition": {"kind": "dirichlet", "alpha": 0.5},
        },
        "training": {
            "procedure": {"name": "supervised"},
            "optimizer": "sgd",
            "learning_rate": 0.03,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "batch_size": 10,
            "epochs": 1,
            "steps": None,
            "proximal": 0.0,
            "schedule": "constant",
            "warmup": 0.0,
            "max_grad_norm": None,
        },
        "federation": {
            "clients": 10,
            "participants": 10,
            "rounds": 100,
            "weights": "samples",
            "optimizer": {"name": "fedavg", "learning_rate": 1.0},
        },
        "arms": {
            "benign": {},
            "fedml": {
                "attack": {"name": "byzantine", "mode": "random"},
                "malicious": 1,
                "redraw": True,
                "defenses": [{"name": "krum", "f": 1, "m": 5}],
            },
        },
    }


SIGMA = {"pretraining_round_num": 2, "to_keep_higher_scores": True, "bucketing_batch_size": 1}
CHAINS = [
    ({"defense_type": "krum", "byzantine_client_num": 2}, [{"name": "krum", "f": 2, "m": 1}]),
    ({"defense_type": "krum", "byzantine_client_num": 1, "krum_param_m": 5}, [{"name": "krum", "f": 1, "m": 5}]),
    ({"defense_type": "multikrum", "byzantine_client_num": 1, "krum_param_m": 2}, [{"name": "krum", "f": 1, "m": 2}]),
    ({"defense_type": "rfa"}, [{"name": "rfa"}]),
    ({"defense_type": "foolsgold"}, [{"name": "foolsgold"}]),
    ({"defense_type": "wise_median"}, [{"name": "median"}]),
    ({"defense_type": "3sigma"}, [{"name": "three_sigma", "bound": 0.5, "similarity": 1.0}]),
    ({"defense_type": "3sigma_krum", **SIGMA}, [{"name": "three_sigma", "bound": 0.5, "similarity": 1.0}]),
    (
        {"defense_type": "3sigma_foolsgold", **SIGMA},
        [{"name": "three_sigma", "bound": 2.0, "similarity": 1.0}, {"name": "foolsgold"}],
    ),
    ({"defense_type": "3sigma_geo", **SIGMA}, [{"name": "three_sigma", "bound": 1.0, "similarity": 1.0}]),
    (
        {"defense_type": "anomaly_detection", "cosine_similarity_bound": 0.3},
        [{"name": "three_sigma", "bound": 0.5, "similarity": 0.3}],
    ),
    ({"defense_type": "cross_round", "cosine_similarity_bound": 0.3}, [{"name": "cross_round", "similarity": 0.3}]),
    (
        {"defense_type": "geo_median", "byzantine_client_num": 1, "batch_num": 4},
        [{"name": "geometric_median", "f": 1, "buckets": 4}],
    ),
    (
        {"defense_type": "geo_median", "byzantine_client_num": 1, "batch_num": 2},
        [{"name": "geometric_median", "f": 1}],
    ),
    (
        {"defense_type": "slsgd", "trim_param_b": 2, "alpha": 0.9, "option_type": 2},
        [{"name": "slsgd", "f": 2, "alpha": 0.9}],
    ),
    (
        {"defense_type": "slsgd", "trim_param_b": 2, "alpha": 0.9, "option_type": 1},
        [{"name": "slsgd", "f": 0, "alpha": 0.9}],
    ),
    (
        {"defense_type": "cclip", "bucket_size": 2},
        [{"name": "bucketing", "bucket_size": 2}, {"name": "centered_clipping", "tau": 10.0}],
    ),
    (
        {"defense_type": "cclip", "bucket_size": 3, "tau": 0.5},
        [{"name": "bucketing", "bucket_size": 3}, {"name": "centered_clipping", "tau": 0.5}],
    ),
    ({"defense_type": "trimmed_mean", "beta": 0.25}, [{"name": "trimmed_mean", "f": 2}]),
    ({"defense_type": "trimmed_mean", "beta": 0.3}, [{"name": "trimmed_mean", "f": 3}]),  # 0.3 * 10 is not quite 3
    ({"defense_type": "trimmed_mean", "beta": 0.5}, [{"name": "trimmed_mean", "f": 4}]),
    ({"defense_type": "norm_diff_clipping", "norm_bound": 0.33}, [{"name": "norm_clipping", "norm": 0.33}]),
    ({"defense_type": "diff_clipping", "norm_bound": 5}, [{"name": "norm_clipping", "norm": 5.0}]),
    (
        {"defense_type": "crfl", "clip_threshold": 15, "sigma": 0.02},
        [{"name": "crfl", "norm": 15.0, "growth": 0.0, "std": 0.02, "rounds": 100}],
    ),
    (
        {"defense_type": "robust_learning_rate", "robust_threshold": 4},
        [{"name": "robust_learning_rate", "threshold": 4}],
    ),
    ({"defense_type": "weak_dp", "stddev": 0.025}, [{"name": "weak_dp", "std": 0.025}]),
    ({"defense_type": "bulyan", "byzantine_client_num": 1}, [{"name": "bulyan", "f": 1}]),
    (
        {"defense_type": "residual", "lambda_param": 3, "thresh": 0.2, "mode": "median"},
        [{"name": "residual_reweighting", "bound": 3.0, "threshold": 0.2}],
    ),
]


@pytest.mark.parametrize(
    ("keys", "chain"), CHAINS, ids=lambda value: value.get("defense_type") if isinstance(value, dict) else ""
)
def test_every_defense_string_and_key(tmp_path, keys, chain):
    config, _ = defended(tmp_path, keys)
    assert config["arms"] == {"benign": {}, "fedml": {"defenses": chain}}
    for method in chain:
        defense.build(method["name"], {key: value for key, value in method.items() if key != "name"})


def test_the_table_leaves_no_string_out():
    assert {keys["defense_type"] for keys, _ in CHAINS} == set(DEFENSES)


@pytest.mark.parametrize(
    ("dataset", "keys", "norm", "growth"),
    [
        ("mnist", {}, 2.0, 0.1),  # 0.1 t + 2
        ("mnist", {"clip_threshold": 1.5}, 1.5, 0.0),  # FedML takes the smaller, and this is smaller in every round
        ("mnist", {"clip_threshold": 30.0}, 2.0, 0.1),
        ("cifar10", {"clip_threshold": 30.0}, 30.0, 0.0),
    ],
)
def test_crfls_bound_is_the_data_sets_or_the_users_if_smaller(tmp_path, dataset, keys, norm, growth):
    config, _ = defended(tmp_path, {"defense_type": "crfl", **keys}, data_args={"dataset": dataset})
    (method,) = config["arms"]["fedml"]["defenses"]
    assert (method["norm"], method["growth"], method["std"]) == (norm, growth, 0.01)


@pytest.mark.parametrize(("beta", "clients", "f"), [(0.29, 100, 29), (0.299, 100, 29), (0.07, 100, 7), (0.1, 9, 0)])
def test_trimmed_means_share_is_rounded_down_and_no_further(tmp_path, beta, clients, f):
    """0.29 * 100 and 0.07 * 100 are a little beside 29 and 7."""
    train = {"client_num_in_total": clients, "client_num_per_round": clients}
    config, _ = defended(tmp_path, {"defense_type": "trimmed_mean", "beta": beta}, train_args=train)
    assert config["arms"]["fedml"]["defenses"] == [{"name": "trimmed_mean", "f": f}]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain[0]["defense_type"])
def test_what_is_imported_is_a_configuration_of_ours(tmp_path, chain):
    config, _ = defended(tmp_path, chain[0])
    assert validated(config, "imported").arms["fedml"].defenses[0].name == chain[1][0]["name"]


def test_the_defense_finds_its_f_among_the_attacks_keys_and_the_last_family_wins(tmp_path):
    """FedML flattens all families into one namespace."""
    tree = families(
        defense_args={"byzantine_client_num": 3, "krum_param_m": 2}, attack_args={"byzantine_client_num": 2}
    )
    config, warnings = import_fedml(written(tmp_path, tree))
    assert config["arms"]["fedml"]["defenses"] == [{"name": "krum", "f": 2, "m": 2}]  # attack_args stands last
    assert config["arms"]["fedml"]["malicious"] == 2
    expected = "byzantine_client_num: is 3 in defense_args and 2 in attack_args; FedML and we take the last"
    assert expected in warnings


def test_the_servers_optimizer_may_stand_among_the_defenses_keys(tmp_path):
    tree = families(
        train_args={"federated_optimizer": "FedOpt"},
        **only("defense_args", {"enable_defense": False, "federated_optimizer": "FedAvg"}),
    )
    config, warnings = import_fedml(written(tmp_path, tree))
    assert config["federation"]["optimizer"]["name"] == "fedavg"
    assert any("federated_optimizer: is 'FedOpt' in train_args and 'FedAvg' in defense_args" in w for w in warnings)


def test_of_a_few_participants_as_large_a_share_is_malicious(tmp_path):
    config, warnings = attacked(
        tmp_path,
        {"attack_type": "byzantine", "byzantine_client_num": 1, "attack_mode": "zero"},
        train_args={"client_num_in_total": 1000, "client_num_per_round": 10},
    )
    assert config["federation"]["clients"] == 1000
    assert config["federation"]["participants"] == 10
    assert config["arms"]["fedml"]["malicious"] == 100
    assert any("100 of all 1000 are malicious" in warning for warning in warnings)


@pytest.mark.parametrize("kind", ["None", None, "nonsense"])
def test_what_is_not_enabled_is_not_looked_at(tmp_path, kind):
    config, _ = imported(
        tmp_path,
        attack_args={"enable_attack": False, "attack_type": kind},
        defense_args={"enable_defense": False, "defense_type": kind},
    )
    assert config["arms"] == {"benign": {}}


def test_a_file_of_fedmls_usual_name_is_called_after_its_folder(tmp_path):
    (tmp_path / "wise median").mkdir()
    config, _ = import_fedml(written(tmp_path / "wise median", EXPERIMENT, "fedml_config.yaml"))
    assert config["name"] == "wise_median"


def test_what_is_written_is_what_was_imported_under_its_warnings(tmp_path):
    path = written(tmp_path, families(attack_args={"attack_prob": 0.5, "odd": "a\nb: c"}))
    config, warnings = import_fedml(path)
    out = write_import(path, tmp_path / "ours.yaml")
    content = out.read_text()
    assert yaml.safe_load(content) == config
    comments = [line for line in content.splitlines() if line.startswith("#")]
    assert comments[1:] == [f"# - {' '.join(warning.split())}" for warning in warnings]
    assert not list(tmp_path.glob("*.partial"))
