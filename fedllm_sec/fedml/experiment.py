"""FedML's data, model, training and server keys -> the sections of our configuration."""

from collections.abc import Mapping
from typing import NamedTuple

from fedllm_sec.fedml.keys import Keys, count, number
from fedllm_sec.fedml.special import SPECIAL, Section
from fedllm_sec.updates.errors import InputError


class Dataset(NamedTuple):
    """One of FedML's data sets.

    Attributes:
        task: our name of it.
        source: the hub's.
        natural: whether FedML splits it by its users, whatever `partition_method` says.
    """

    task: str
    source: str
    natural: bool = False


DATASETS: Mapping[str, Dataset] = {
    "mnist": Dataset("mnist", "ylecun/mnist"),
    "femnist": Dataset("femnist", "flwrlabs/femnist", natural=True),
    "cifar10": Dataset("cifar10", "uoft-cs/cifar10"),
    "cifar100": Dataset("cifar100", "uoft-cs/cifar100"),
    "fed_cifar100": Dataset("cifar100", "uoft-cs/cifar100"),
    "shakespeare": Dataset("shakespeare", "flwrlabs/shakespeare", natural=True),
    "fed_shakespeare": Dataset("shakespeare", "flwrlabs/shakespeare", natural=True),
    "20news": Dataset("20news", "SetFit/20_newsgroups"),
    "sent140": Dataset("sentiment140", "stanfordnlp/sentiment140", natural=True),
    "sentiment140": Dataset("sentiment140", "stanfordnlp/sentiment140", natural=True),
}
MODELS: Mapping[str, tuple[str, Section]] = {
    **{name: (name, {}) for name in ("lr", "lenet", "resnet20", "resnet56", "rnn")},
    "resnet56_gkt": ("resnet56", {}),
    "cnn": ("cnn", {"variant": "dropout"}),  # FedML's CNN_DropOut
    "cnn_web": ("cnn", {}),
    "rnn_fedavg": ("rnn", {}),
    "lstm": ("rnn", {}),
    "gan": ("dcgan", {}),
    "darts": ("darts", {}),
}
PARTITIONS: Mapping[str, str] = {
    **dict.fromkeys(("homo", "iid", "uniform"), "iid"),
    **dict.fromkeys(("hetero", "dirichlet", "niid"), "dirichlet"),
    "natural": "natural",
}
CLIENT_OPTIMIZERS: Mapping[str, str] = {name: name for name in ("sgd", "adam", "adamw")}
SERVER_OPTIMIZERS: Mapping[str, str] = {
    "sgd": "fedavgm", "adam": "fedadam", "adagrad": "fedadagrad", "yogi": "fedyogi",
}  # fmt: skip
FEDERATED: Mapping[str, str] = {
    **dict.fromkeys(("FedAvg", "FedAvg_seq", "FedAvg_robust", "FedProx", "FedLocalSGD"), "fedavg"),
    **dict.fromkeys(("FedOpt", "FedOpt_seq"), "fedopt"),
    "FedNova": "fednova",
    "FedSGD": "fedsgd",
    "FedGAN": "fedavg",
    "FedNAS": "fedavg",
    "FedGKT": "fedgkt",
}


def federated(keys: Keys) -> str:
    """FedML's name of the federated optimizer, in its own spelling.

    Raises:
        InputError: for an unknown one, with the nearest known one.
    """
    return keys.choose("federated_optimizer", FEDERATED, default="FedAvg")[0]


def data_section(keys: Keys) -> tuple[str, Section]:
    """The task's name, and where its data comes from and how it is split."""
    name, dataset = keys.choose("dataset", DATASETS, why="name the data set")
    if name.startswith("fed_"):
        keys.warn("dataset", f"{name} is split by its users in FedML; here it is {dataset.task}")
    if "data_cache_dir" in keys:
        keys.warn("data_cache_dir", f"data comes from the hub ({dataset.source}); data.train=FOLDER takes your own")
    return dataset.task, {"train": dataset.source, "test": dataset.source, "partition": partition(keys, dataset)}


def partition(keys: Keys, dataset: Dataset) -> Section:
    """How the data is split over the clients."""
    _, kind = keys.choose("partition_method", PARTITIONS, default="natural" if dataset.natural else "homo")
    if dataset.natural and kind != "natural":
        keys.warn("partition_method", "FedML ignores it for data that has users; here each client is one user too")
    if dataset.natural:
        keys.warn(
            "client_num_in_total",
            "FedML overwrites it with the number of users and draws others each round; here so many are drawn once",
        )
        keys.raw("partition_alpha")
        return {"kind": "natural"}
    if dataset.task == "mnist":
        keys.warn("partition_method", "FedML ignores it for mnist and takes LEAF's 1000 users; here it is followed")
    if kind == "natural":
        raise InputError(f"{keys.place('partition_method')}: {dataset.task} has no users; use hetero or homo")
    if kind == "iid":
        keys.raw("partition_alpha")
        return {"kind": "iid"}
    if "partition_alpha" not in keys:
        keys.warn("partition_alpha", "is missing: FedML crashes; here it is 0.5, as in the papers")
    return {"kind": "dirichlet", "alpha": keys.get("partition_alpha", number, 0.5)}


def model_section(keys: Keys) -> Section:
    """The model.

    Raises:
        InputError: for an unknown one, and one that the federated optimizer does not go with.
    """
    name, (ours, parameters) = keys.choose("model", MODELS, why="name the model")
    optimizer = federated(keys)
    if special := SPECIAL.get(optimizer):
        if name not in map(str.lower, special.models):
            known = " or ".join(special.models)
            raise InputError(f"{keys.place('model')}: {optimizer} does not go with {name}: set model: {known}")
        return {"name": ours, "parameters": special.model(keys)}
    if name == "cnn" and keys.raw("dataset") == "mnist":
        keys.warn("model", "FedML's cnn has 62 outputs, for mnist too; here as many as there are classes")
    elif name == "cnn_web":
        keys.warn("model", "FedML's cnn_web is a model of its own; here it is the cnn of McMahan et al. 2017")
    return {"name": ours, "parameters": dict(parameters)}


def training_section(keys: Keys) -> Section:
    """A client's training in a round."""
    section: Section = {
        "procedure": {"name": "supervised"},
        "optimizer": "sgd",
        "learning_rate": 0.03,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": None,
        "epochs": 1,
        "steps": None,
        "proximal": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "max_grad_norm": None,
    }
    if takes_one_full_step(keys):
        section["steps"] = 1
    else:
        section["batch_size"] = keys.need("batch_size", count, "examples of a step")
    special = SPECIAL.get(federated(keys))
    return section | (special.training(keys) if special else supervised(keys))


def supervised(keys: Keys) -> Section:
    """What FedML's usual trainer reads."""
    optimizer, _ = keys.choose("client_optimizer", CLIENT_OPTIMIZERS, default="sgd")
    if optimizer != "sgd":
        keys.warn("client_optimizer", "FedML takes Adam with amsgrad for whatever is not sgd; here it is what it says")
    return {
        "optimizer": optimizer,
        "learning_rate": keys.get("learning_rate", number, 0.03),
        "momentum": client_momentum(keys),
        "weight_decay": weight_decay(keys, optimizer),
        "epochs": keys.get("epochs", count, 1),
        "proximal": proximal(keys),
    }


def takes_one_full_step(keys: Keys) -> bool:
    """Whether a client's round is one step on all of its examples, which is what FedSGD means."""
    if federated(keys) != "FedSGD":
        return False
    for name in ("batch_size", "epochs"):
        if name in keys:
            keys.warn(name, "FedSGD means one step of plain SGD on all of a client's examples, and so it is here")
    return True


def client_momentum(keys: Keys) -> float:
    """FedML's trainers have none, but FedNova's."""
    if "momentum" in keys and federated(keys) != "FedNova":
        keys.warn("momentum", "FedML does not pass it to the clients' SGD; 0.0 is taken (training.momentum sets it)")
        return 0.0
    return keys.get("momentum", number, 0.0)


def weight_decay(keys: Keys, optimizer: str) -> float:
    """FedML passes it to Adam only."""
    given = keys.get("weight_decay", number, 0.0)
    if optimizer == "sgd" and given:
        keys.warn(
            "weight_decay",
            f"FedML does not pass it to SGD; 0.0 is taken, as it ran (training.weight_decay={given:g} applies it)",
        )
        return 0.0
    return given


def proximal(keys: Keys) -> float:
    """FedProx's mu."""
    if federated(keys) != "FedProx":
        return 0.0
    return keys.need("fedprox_mu", number, "FedProx pulls a client toward the global model with this strength")


def federation_section(keys: Keys, clients: int, participants: int) -> Section:
    """The rounds, and the server's optimizer."""
    if participants > clients:
        place = keys.place("client_num_per_round")
        raise InputError(f"{place}: {participants}, but client_num_in_total is {clients}")
    if keys.get("frequency_of_the_test", count, 1) != 1:
        keys.warn("frequency_of_the_test", "here every round is tested")
    return {
        "clients": clients,
        "participants": participants,
        "rounds": keys.need("comm_round", count, "so many rounds"),
        "weights": "samples",
        "optimizer": server_optimizer(keys),
    }


def server_optimizer(keys: Keys) -> Section:
    """What the server does with the mean update."""
    given = federated(keys)
    ours = FEDERATED[given]
    if given == "FedProx":
        keys.warn("federated_optimizer", "FedProx is FedAvg of clients with training.proximal")
    elif given in ("FedAvg_seq", "FedAvg_robust", "FedOpt_seq", "FedLocalSGD"):
        keys.warn("federated_optimizer", f"{given} is a scheduler of FedML's; here it is {ours}")
    if ours != "fedopt":
        for name in ("server_optimizer", "server_lr", "server_momentum"):
            if name in keys:
                keys.warn(name, f"FedML ignores it with {given}, and so do we")
        special = SPECIAL.get(given)
        return special.server(keys) if special else {"name": ours, "learning_rate": 1.0}
    server, ours = keys.choose("server_optimizer", SERVER_OPTIMIZERS, why="FedOpt needs one")
    section: Section = {"name": ours, "learning_rate": keys.need("server_lr", number, "the server's learning rate")}
    if "server_momentum" in keys:
        keys.warn("server_momentum", "FedML passes only server_lr to the server's optimizer; left out, as it ran")
    if server == "sgd":
        return {**section, "momentum": 0.0}
    keys.warn(
        "server_optimizer", f"FedML's is torch's {server}; here it is that of Reddi et al. 2021, with their constants"
    )
    return section
