"""FedGAN, FedNAS and FedGKT imported: each key that FedML's programs read, and that our procedures take the result."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedllm_sec.config import validated
from fedllm_sec.federation.optimizers import optimizer
from fedllm_sec.fedml import import_fedml
from fedllm_sec.models import Shape, model
from fedllm_sec.models.split import cut
from fedllm_sec.tasks import task
from fedllm_sec.training.procedures import procedure
from fedllm_sec.training.transfer import Knowledge, train_server
from tests.fedml.example import families, imported, written

GAN = {"federated_optimizer": "FedGAN", "lr": "2e-4", "epochs": 2}
NAS = {
    "federated_optimizer": "FedNAS", "learning_rate": 0.025, "momentum": 0.9, "weight_decay": 3e-4,
    "arch_learning_rate": 6e-4, "arch_weight_decay": 1e-3, "lambda_train_regularizer": 1, "lambda_valid_regularizer": 1,
    "init_channels": 4, "layers": 3, "stage": "search", "learning_rate_min": 0.001, "grad_clip": 5, "report_freq": 1,
    "enable_wandb": False,
}  # fmt: skip
GKT = {
    "federated_optimizer": "FedGKT", "lr": 0.01, "optimizer": "SGD", "wd": 5e-4, "epochs_client": 2, "epochs_server": 3,
    "alpha": 1.0, "temperature": 1.5, "whether_distill_on_the_server": True, "whether_training_on_client": 1,
    "sweep": 1, "no_bn_wd": False, "multi_gpu_server": True, "test": False, "client_model": "resnet56",
}  # fmt: skip
RUNS = {"FedGAN": (GAN, "GAN", "mnist"), "FedNAS": (NAS, "darts", "cifar10"), "FedGKT": (GKT, "resnet56", "cifar10")}
PAIRS = [(name, key) for name, (keys, _, _) in RUNS.items() for key in keys]
PLAIN = {"client_optimizer": ..., "learning_rate": ..., "weight_decay": ..., "epochs": ...}  # the example's own


def special(folder, name, **train):
    """A configuration with every key that FedML reads, and none that it ignores, changed as told."""
    keys, network, dataset = RUNS[name]
    args = {**PLAIN, **keys, **{"model": network, "dataset": dataset, **train}}
    others = {"model_args": {"model": args.pop("model")}, "data_args": {"dataset": args.pop("dataset")}}
    return imported(folder, train_args=args, **others)


def network_of(config):
    """Our network for the imported configuration, on the shape of its task."""
    settings = validated(config, "imported")
    work, builder = task.build(settings.task.name, {}), model.build(settings.model.name, settings.model.parameters)
    shape = Shape(work.shape, work.classes, work.vocabulary)
    if settings.federation.optimizer.name == "fedgkt":
        return cut(builder, shape, settings.model.name)
    return builder(shape)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_imported_is_taken_by_procedure_and_server(tmp_path, name):
    config, _ = special(tmp_path, name)
    settings, network = validated(config, "imported"), network_of(config)
    server = settings.federation.optimizer
    optimizer.build(server.name, server.parameters).check(settings.training)
    trained = procedure.build(settings.training.procedure.name, settings.training.procedure.parameters)
    trained.check(network, settings.training)
    trained.prepare(task.build(settings.task.name, {}))
    assert settings.training.procedure.name == {"FedGAN": "gan", "FedNAS": "milenas", "FedGKT": "supervised"}[name]


@pytest.mark.parametrize("change", [str.lower, str.upper])
@pytest.mark.parametrize("name", RUNS)
def test_upper_and_lower_case_are_one(tmp_path, name, change):
    network = RUNS[name][1]
    assert special(tmp_path, name, federated_optimizer=change(name), model=change(network)) == special(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "keys", "field", "value"),
    [("fednova", {"momentum": 0.9}, "momentum", 0.9), ("FEDPROX", {"fedprox_mu": 0.1}, "proximal", 0.1),
     ("fedsgd", {}, "steps", 1)],
)  # fmt: skip
def test_of_other_optimizers_too(tmp_path, name, keys, field, value):
    config, _ = imported(tmp_path, train_args={"federated_optimizer": name, **keys})
    assert config["training"][field] == value


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_no_key_that_fedml_reads_is_called_unread(tmp_path, name, key):
    _, warnings = special(tmp_path, name)
    assert not [warning for warning in warnings if f".{key}: is read neither" in warning]


@pytest.mark.parametrize(("name", "key"), [("FedGAN", "wd"), ("FedNAS", "tau_max"), ("FedNAS", "lr"), ("FedGKT", "ci")])
def test_and_one_that_it_does_not_is(tmp_path, name, key):
    _, warnings = special(tmp_path, name, **{key: 1})
    assert sum(f"train_args.{key}: is read neither" in warning for warning in warnings) == 1


def test_fedgans_networks_both_have_adam_at_lr(tmp_path):
    config, _ = special(tmp_path, "FedGAN", client_optimizer="sgd", learning_rate=0.03, weight_decay=0.1, momentum=0.9)
    training = config["training"]
    assert training["procedure"] == {"name": "gan", "beta_1": 0.9}
    assert (training["optimizer"], training["learning_rate"], training["epochs"]) == ("adam", 2e-4, 2)
    assert (training["weight_decay"], training["momentum"], training["batch_size"]) == (0.0, 0.0, 10)
    assert config["model"] == {"name": "dcgan", "parameters": {}}
    assert config["federation"]["optimizer"] == {"name": "fedavg", "learning_rate": 1.0}
    made = procedure.build("gan", {"beta_1": 0.9}).optimizer(
        [nn.Parameter(torch.zeros(1))], validated(config, "imported").training, 2e-4
    )
    plain = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=2e-4)  # FedML's line
    assert type(made) is type(plain)
    assert {**made.param_groups[0], "params": 0} == {**plain.param_groups[0], "params": 0}


def test_fednas_is_imported_key_by_key(tmp_path):
    config, _ = special(tmp_path, "FedNAS", client_optimizer="adam")
    training = config["training"]
    assert training["procedure"] == {"name": "milenas", "learning_rate": 6e-4, "weight_decay": 1e-3, "validation": 1.0}
    assert [training[key] for key in ("optimizer", "learning_rate", "momentum", "weight_decay")] == [
        "sgd", 0.025, 0.9, 3e-4
    ]  # fmt: skip
    assert (training["epochs"], training["max_grad_norm"]) == (1, None)
    assert config["model"] == {"name": "darts", "parameters": {"channels": 4, "cells": 3, "nodes": 4}}
    assert config["federation"]["optimizer"] == {"name": "fedavg", "learning_rate": 1.0}


def test_fednas_of_darts_size_has_the_papers_network(tmp_path):
    """1.93 million weights (He et al. 2020, table 1), and 224 alphas: 14 edges, 8 operations, two kinds of cells."""
    network = network_of(special(tmp_path, "FedNAS", init_channels=16, layers=8)[0])
    assert sum(alpha.numel() for alpha in network.alphas()) == 224
    assert sum(value.numel() for value in network.parameters()) - 224 == 1_930_618


def test_the_searchs_step_is_fedmls_at_any_lambda(tmp_path):
    """Adam of g_validation + lambda g_train, as FedML computes it."""
    config, warnings = special(tmp_path, "FedNAS", lambda_train_regularizer=4, arch_weight_decay=0)
    settings = validated(config, "imported").training.procedure
    assert settings.parameters["validation"] == 0.25
    assert sum("which Adam's scale makes the same" in warning for warning in warnings) == 1
    ours = procedure.build("milenas", settings.parameters)
    x, y = (
        torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[0, 1, 2] * 2, [2, 0, 0] * 2]),
    )
    found = []
    for loss_of in (
        lambda net: ours.mixed_loss(net, (x[0], y[0]), (x[1], y[1])),
        lambda net: functional.cross_entropy(net(x[1]), y[1]) + 4 * functional.cross_entropy(net(x[0]), y[0]),
    ):
        torch.manual_seed(1)
        network = nn.Linear(5, 3)
        first = network.weight.detach().clone()
        adam = ours.optimizer_of_alphas(list(network.parameters()))
        for _ in range(3):
            adam.zero_grad()
            loss_of(network).backward()
            adam.step()
        found.append(network.weight.detach() - first)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-7)
    assert found[0].abs().min() > 1e-4


@pytest.mark.parametrize("given", ["SGD", "sgd"])
def test_fedgkt_is_imported_key_by_key(tmp_path, given):
    config, _ = special(tmp_path, "FedGKT", optimizer=given)
    training = config["training"]
    assert training["procedure"] == {"name": "supervised"}
    assert [training[key] for key in ("optimizer", "learning_rate", "momentum", "weight_decay", "epochs")] == [
        "sgd", 0.01, 0.9, 5e-4, 2
    ]  # fmt: skip
    assert config["federation"]["optimizer"] == {
        "name": "fedgkt", "alpha": 1.0, "beta": 1.0, "temperature": 1.5, "epochs": 3
    }  # fmt: skip
    assert config["model"] == {"name": "resnet56", "parameters": {}}


def test_fedgkts_adam_has_a_weight_decay_of_its_own(tmp_path):
    training = special(tmp_path, "FedGKT", optimizer="Adam", wd=0.5)[0]["training"]
    assert (training["optimizer"], training["momentum"], training["weight_decay"]) == ("adam", 0.0, 1e-4)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"alpha": 2}, {"alpha": 2.0, "beta": 0.5, "learning_rate": 0.02}),
        ({"alpha": 2, "optimizer": "Adam"}, {"alpha": 2.0, "beta": 0.5}),
        ({"whether_distill_on_the_server": 0}, {"alpha": 1.0, "beta": 0.0}),
        ({"whether_distill_on_the_server": False, "alpha": 0.25}, {"alpha": 0.25, "beta": 0.0}),
        ({"whether_distill_on_the_server": False, "alpha": 0}, {"alpha": 0.0, "beta": 0.0}),
        ({"sweep": 0}, {"alpha": 1.0, "beta": 1.0, "epochs": 3}),
        ({"sweep": 0, "test": True}, {"alpha": 1.0, "beta": 1.0, "epochs": 1}),
        ({"sweep": 0, "whether_training_on_client": False}, {"alpha": 1.0, "beta": 1.0, "epochs": 1}),
        ({"sweep": 1, "whether_training_on_client": False}, {"alpha": 1.0, "beta": 1.0, "epochs": 3}),
    ],
)
def test_fedgkts_server(tmp_path, keys, expected):
    config, _ = special(tmp_path, "FedGKT", **keys)
    server = config["federation"]["optimizer"]
    assert server == {"name": "fedgkt", "temperature": 1.5, "epochs": 3, **expected}
    optimizer.build("fedgkt", {key: value for key, value in server.items() if key != "name"})


@pytest.mark.parametrize("changes", [{"alpha": 0.5}, {"alpha": 2}, {"alpha": 2, "whether_distill_on_the_server": 0}])
def test_fedgkts_server_steps_as_fedmls(tmp_path, changes):
    """FedML's loss is KD + alpha CE, with distillation; SGD with (plain) momentum, one batch, three epochs."""
    config, _ = special(tmp_path, "FedGKT", wd=0, **changes)
    settings, server = validated(config, "imported"), config["federation"]["optimizer"]
    transfer = optimizer.build("fedgkt", {key: value for key, value in server.items() if key != "name"}).transfer
    generator = torch.Generator().manual_seed(3)
    features, logits = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    labels = torch.randint(0, 3, (8,), generator=generator)
    torch.manual_seed(1)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    rate = transfer.learning_rate or settings.training.learning_rate
    training = settings.training.model_copy(update={"learning_rate": rate, "batch_size": 8})
    train_server(
        ours, {"a": lambda: Knowledge(features, logits, labels)}, training, transfer, lambda name, epoch: epoch
    )
    sgd, heat = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9), 1.5
    for _ in range(3):
        out = theirs(features)
        own, told = (out / heat).log_softmax(1), (logits / heat).softmax(1)
        loss = functional.cross_entropy(out, labels)
        if "whether_distill_on_the_server" not in changes:
            divergence = (told * (told.log() - own)).sum(1).mean()
            loss = heat**2 * divergence + changes["alpha"] * loss
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_resnet56_of_fedgkt_is_what_older_files_call_it(tmp_path):
    assert special(tmp_path, "FedGKT", model="resnet56_gkt")[0] == special(tmp_path, "FedGKT")[0]


@pytest.mark.parametrize("name", RUNS)
def test_the_keys_may_stand_in_any_family(tmp_path, name):
    """FedML's own examples have `stage` among comm_args, `multi_gpu_server` among device_args."""
    keys, network, dataset = RUNS[name]
    tree = families(
        train_args={**PLAIN, "federated_optimizer": name},
        model_args={"model": network},
        data_args={"dataset": dataset},
        comm_args={key: value for key, value in keys.items() if key != "federated_optimizer"},
    )
    assert import_fedml(written(tmp_path, tree)).config == special(tmp_path, name)[0]
