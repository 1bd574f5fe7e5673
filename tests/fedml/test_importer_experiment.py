"""FedML's data sets, models and optimizers in our terms: every string, and that our registries know the names."""

import pytest

from fedllm_sec.config import validated
from fedllm_sec.federation.optimizers import optimizer
from fedllm_sec.fedml.experiment import DATASETS, MODELS
from fedllm_sec.models import model
from fedllm_sec.tasks import task
from tests.fedml.example import imported


@pytest.mark.parametrize(
    ("dataset", "task", "kind"),
    [
        ("mnist", "mnist", "dirichlet"),
        ("cifar10", "cifar10", "dirichlet"),
        ("cifar100", "cifar100", "dirichlet"),
        ("femnist", "femnist", "natural"),
        ("shakespeare", "shakespeare", "natural"),
        ("20news", "20news", "dirichlet"),
        ("sent140", "sentiment140", "natural"),
        ("sentiment140", "sentiment140", "natural"),
    ],
)
def test_every_dataset(tmp_path, dataset, task, kind):
    config, warnings = imported(tmp_path, data_args={"dataset": dataset})
    assert config["task"] == {"name": task}
    assert config["data"]["partition"]["kind"] == kind
    assert any("client_num_in_total: FedML overwrites it" in warning for warning in warnings) == (kind == "natural")


@pytest.mark.parametrize(("method", "kind"), [("homo", "iid"), ("hetero", "dirichlet")])
def test_every_partition(tmp_path, method, kind):
    config, _ = imported(tmp_path, data_args={"partition_method": method, "partition_alpha": "1e-1"})
    assert config["data"]["partition"] == {"kind": "iid"} if kind == "iid" else {"kind": kind, "alpha": 0.1}


@pytest.mark.parametrize(
    ("model_name", "ours"),
    [
        ("lr", "lr"),
        ("lenet", "lenet"),
        ("LeNet", "lenet"),
        ("cnn", "cnn"),
        ("cnn_web", "cnn"),
        ("resnet20", "resnet20"),
        ("resnet56", "resnet56"),
        ("resnet56_gkt", "resnet56"),
        ("rnn", "rnn"),
        ("rnn_fedavg", "rnn"),
        ("lstm", "rnn"),
        ("GAN", "dcgan"),
        ("darts", "darts"),
    ],
)
def test_every_model(tmp_path, model_name, ours):
    config, _ = imported(tmp_path, model_args={"model": model_name})
    variant = {"variant": "dropout"} if model_name == "cnn" else {}  # Reddi et al. 2021, as FedML has it
    assert config["model"] == {"name": ours, "parameters": variant}


OPT = {"federated_optimizer": "FedOpt", "server_lr": 0.1}


@pytest.mark.parametrize(
    ("keys", "ours", "training"),
    [
        ({"federated_optimizer": "FedAvg", "server_lr": 0.5}, {"name": "fedavg", "learning_rate": 1.0}, {}),
        ({"federated_optimizer": "FedAvg_seq"}, {"name": "fedavg", "learning_rate": 1.0}, {}),
        (
            {"federated_optimizer": "FedProx", "fedprox_mu": 0.1},
            {"name": "fedavg", "learning_rate": 1.0},
            {"proximal": 0.1},
        ),
        (
            {"federated_optimizer": "FedNova", "momentum": 0.9},
            {"name": "fednova", "learning_rate": 1.0},
            {"momentum": 0.9},
        ),
        ({"federated_optimizer": "FedSGD"}, {"name": "fedsgd", "learning_rate": 1.0}, {"steps": 1, "batch_size": None}),
        (
            {**OPT, "server_optimizer": "sgd", "server_momentum": 0.9},
            {"name": "fedavgm", "learning_rate": 0.1, "momentum": 0.0},
            {},
        ),
        ({**OPT, "server_optimizer": "adam"}, {"name": "fedadam", "learning_rate": 0.1}, {}),
        ({**OPT, "server_optimizer": "yogi"}, {"name": "fedyogi", "learning_rate": 0.1}, {}),
        ({**OPT, "server_optimizer": "adagrad"}, {"name": "fedadagrad", "learning_rate": 0.1}, {}),
        (
            {"client_optimizer": "adam"},
            {"name": "fedavg", "learning_rate": 1.0},
            {"optimizer": "adam", "weight_decay": 0.001},
        ),
    ],
)
def test_every_optimizer(tmp_path, keys, ours, training):
    config, _ = imported(tmp_path, train_args=keys)
    assert config["federation"]["optimizer"] == ours
    assert {key: config["training"][key] for key in training} == training
    settings = validated(config, "imported")
    built = optimizer.build(settings.federation.optimizer.name, settings.federation.optimizer.parameters)
    built.check(settings.training)


def test_our_registries_know_every_name():
    assert {dataset.task for dataset in DATASETS.values()} <= {entry.name for entry in task}
    for name, parameters in MODELS.values():
        model.build(name, parameters)
