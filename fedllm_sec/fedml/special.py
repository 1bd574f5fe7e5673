"""FedML's FedGAN, FedNAS and FedGKT -> the sections of our configuration; each reads keys of its own."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from fedllm_sec.fedml.keys import Keys, count, flag, not_negative, number, positive, some, switch, text
from fedllm_sec.updates.errors import InputError

T = TypeVar("T")
Section = dict[str, Any]
NODES = 4  # of a cell, in FedML's network of all operations
FEWEST_LAYERS = 3  # of which two halve the image
GKT_OPTIMIZERS: Mapping[str, str] = {"SGD": "sgd", "Adam": "adam"}
GKT_MOMENTUM, GKT_ADAM_DECAY = 0.9, 1e-4  # no keys of FedML's


class Special(NamedTuple):
    """A federated optimizer with clients of its own.

    Attributes:
        models: FedML's names of the models that go with it.
        model: the model's parameters.
        training: what it says of a client's training; the rest is as for any other.
        server: the server's optimizer.
    """

    models: tuple[str, ...]
    model: Callable[[Keys], Section]
    training: Callable[[Keys], Section]
    server: Callable[[Keys], Section]


def usual(keys: Keys, name: str, kind: Callable[[Any], T], default: T) -> T:
    """A key that FedML crashes without; where it is missing, that is told."""
    if name not in keys:
        keys.warn(name, f"is missing: FedML crashes; here it is {json.dumps(default)}")
    return keys.get(name, kind, default)


def tell_ignored(keys: Keys, optimizer: str, instead: Mapping[str, str]) -> None:
    """Say which of the usual trainer's keys FedML does not read with this optimizer, and what it takes."""
    for name, taken in instead.items():
        if name in keys:
            keys.warn(name, f"FedML does not read it with {optimizer}, and takes {taken}")


def tell_nobody_is_drawn(keys: Keys, optimizer: str) -> None:
    """Say that the participants are the same in every round of FedML's, where there are other clients."""
    clients = keys.get("client_num_in_total", count, 0)
    if keys.get("client_num_per_round", count, clients) < clients:
        keys.warn(
            "client_num_per_round",
            f"FedML's {optimizer} draws nobody: the first clients, one a worker, take part in every round; "
            "here so many are drawn anew in each",
        )


def averaged(keys: Keys, optimizer: str, procedure: str) -> Section:
    """FedAvg, of clients with a procedure."""
    keys.warn("federated_optimizer", f"{optimizer} is FedAvg of clients with training.procedure={procedure}")
    return {"name": "fedavg", "learning_rate": 1.0}


def gan_training(keys: Keys) -> Section:
    """FedGAN's clients: torch's Adam at `lr` for both networks."""
    adam = "Adam at lr, without weight decay, for both networks"
    usual_keys = ("client_optimizer", "learning_rate", "weight_decay", "momentum")
    tell_ignored(keys, "FedGAN", dict.fromkeys(usual_keys, adam))
    keys.warn(
        "federated_optimizer",
        "FedML's FedGAN draws normal noise, twice a step, and steps the discriminator first; here noise is uniform "
        "and both networks step at once, as in the paper",
    )
    return {
        "procedure": {"name": "gan", "beta_1": 0.9},
        "optimizer": "adam",
        "learning_rate": keys.need("lr", positive, "FedGAN's learning rate, of both networks"),
        "epochs": keys.get("epochs", count, 1),
    }


def gan_model(keys: Keys) -> Section:
    """The DCGAN's own."""
    keys.warn("model", "FedML's GAN is of multilayer perceptrons; here it is the dcgan of Radford et al. 2016")
    return {}


def nas_model(keys: Keys) -> Section:
    """The size of the network of all operations.

    Raises:
        InputError: for FedML's second stage, which trains an architecture; for too few layers.
    """
    usual(keys, "stage", text, "search")
    stage, _ = keys.choose("stage", dict.fromkeys(("search", "train")), default="search")
    if stage == "train":
        raise InputError(
            f"{keys.place('stage')}: train is an experiment of its own here: import the search (stage: search), "
            "derive its architecture by scripts/derive_architecture.py, and train model.name=darts_network"
        )
    layers = usual(keys, "layers", some, 8)
    if layers < FEWEST_LAYERS:
        raise InputError(f"{keys.place('layers')}: {layers}, but two layers halve the image; use 3 or more")
    return {"channels": usual(keys, "init_channels", some, 16), "cells": layers, "nodes": NODES}


def nas_training(keys: Keys) -> Section:
    """FedNAS's clients: SGD for the weights, Adam for the architecture."""
    if keys.get("client_optimizer", text, "sgd").lower() != "sgd":
        keys.warn("client_optimizer", "FedML ignores it with FedNAS; the weights' optimizer is SGD, as it ran")
    epochs = keys.get("epochs", count, 1)
    tell_search(keys, epochs)
    return {
        "procedure": {
            "name": "milenas",
            "learning_rate": usual(keys, "arch_learning_rate", positive, 3e-4),
            "weight_decay": usual(keys, "arch_weight_decay", not_negative, 1e-3),
            "validation": validation_weight(keys),
        },
        "optimizer": "sgd",
        "learning_rate": usual(keys, "learning_rate", positive, 0.025),
        "momentum": usual(keys, "momentum", not_negative, 0.9),
        "weight_decay": usual(keys, "weight_decay", not_negative, 3e-4),
        "epochs": epochs,
    }


def validation_weight(keys: Keys) -> float:
    """FedML's gradient is g_validation + lambda_train g_train, ours g_train + g_validation / lambda_train."""
    of_training = usual(keys, "lambda_train_regularizer", not_negative, 1.0)
    if not of_training:
        raise InputError(
            f"{keys.place('lambda_train_regularizer')}: 0 leaves the training loss out, which milenas always counts; "
            "use a small number, such as 0.01"
        )
    if of_training != 1:
        keys.warn(
            "lambda_train_regularizer",
            "FedML weighs the training loss with it; here its inverse weighs the validation loss, which Adam's scale "
            "makes the same but for the architecture's weight decay",
        )
    if keys.get("lambda_valid_regularizer", number, 1.0) != 1:
        keys.warn("lambda_valid_regularizer", "FedML reads it and never applies it; left out, as it ran")
    return 1 / of_training


def tell_search(keys: Keys, epochs: int) -> None:
    """Say what FedML's search does otherwise."""
    for name in ("report_freq", "enable_wandb"):  # logging
        keys.raw(name)
    if "grad_clip" in keys:
        keys.warn("grad_clip", "FedML clips the architecture's gradient after its step, to no effect; left out")
    if keys.get("learning_rate_min", number, 0.0) and epochs > 1:
        keys.warn(
            "learning_rate_min",
            "FedML's rate falls to it along a cosine over a round's epochs, anew in each round; here it is constant",
        )
    keys.warn(
        "federated_optimizer",
        "FedML's FedNAS searches on test examples, and steps the architecture before the weights; here half of a "
        "client's examples are its validation, an epoch is over the other half, and the weights step first",
    )
    keys.warn(
        "federated_optimizer",
        "FedML's FedNAS keeps the first client's architecture and weighs clients by the test set's size; here both "
        "weights and architecture are averaged by samples",
    )


def nas_server(keys: Keys) -> Section:
    """FedAvg."""
    tell_nobody_is_drawn(keys, "FedNAS")
    return averaged(keys, "FedNAS", "milenas")


def gkt_training(keys: Keys) -> Section:
    """FedGKT's clients, and the optimizer that the server shares with them."""
    instead = {"client_optimizer": "optimizer", "learning_rate": "lr", "weight_decay": "wd", "epochs": "epochs_client"}
    tell_ignored(keys, "FedGKT", {**instead, "momentum": f"{GKT_MOMENTUM}"})
    keys.raw("multi_gpu_server")
    if keys.get("no_bn_wd", flag, False):
        keys.warn("no_bn_wd", "FedML then steps every second tensor only, by a slip; here all step, and all decay")
    if not usual(keys, "whether_training_on_client", switch, True):
        keys.warn(
            "whether_training_on_client",
            "false: FedML's clients keep the weights they began with, which is no FedGKT; here they train",
        )
    keys.warn(
        "federated_optimizer",
        "FedML's FedGKT keeps its optimizers' moments from round to round, and lowers the server's rate when accuracy "
        "stays; here optimizers begin anew in each round, and rates are constant",
    )
    return {
        **gkt_optimizer(keys),
        "learning_rate": gkt_rate(keys),
        "epochs": usual(keys, "epochs_client", some, 1),
    }


def gkt_rate(keys: Keys) -> float:
    """The learning rate of clients and server."""
    return usual(keys, "lr", positive, 1e-3)


def gkt_optimizer(keys: Keys) -> Section:
    """SGD with momentum, or Adam with a weight decay that no key changes."""
    usual(keys, "optimizer", text, "SGD")
    _, ours = keys.choose("optimizer", GKT_OPTIMIZERS, default="SGD")
    if ours == "sgd":
        keys.warn("optimizer", f"FedML's SGD has Nesterov's momentum of {GKT_MOMENTUM}; here it is the plain one")
        return {"optimizer": ours, "momentum": GKT_MOMENTUM, "weight_decay": usual(keys, "wd", not_negative, 1e-3)}
    keys.warn("optimizer", "FedML's Adam is that with amsgrad; here it is Adam")
    if keys.get("wd", number, GKT_ADAM_DECAY) != GKT_ADAM_DECAY:
        keys.warn("wd", f"FedML does not pass it to Adam, whose weight decay is {GKT_ADAM_DECAY:g}; as it ran")
    return {"optimizer": ours, "momentum": 0.0, "weight_decay": GKT_ADAM_DECAY}


def gkt_server(keys: Keys) -> Section:
    """FedGKT; the server's cross-entropy has weight 1 here, and `alpha` in FedML."""
    tell_nobody_is_drawn(keys, "FedGKT")
    alpha = usual(keys, "alpha", not_negative, 1.0)
    temperature = usual(keys, "temperature", positive, 3.0)
    section = {"name": "fedgkt", "alpha": alpha, "beta": 0.0, "temperature": temperature, "epochs": gkt_epochs(keys)}
    if not usual(keys, "whether_distill_on_the_server", switch, True):
        return section
    if not alpha:
        raise InputError(f"{keys.place('alpha')}: 0, but without labels FedGKT's server learns no classes")
    if alpha != 1:
        warning = "FedML weighs the server's cross-entropy with it; here its inverse weighs the divergence"
        keys.warn("alpha", f"{warning}, which is the same but for weight decay")
        if gkt_optimizer(keys)["optimizer"] == "sgd":  # Adam does not see the scale of a loss
            section["learning_rate"] = alpha * gkt_rate(keys)
    return {**section, "beta": 1 / alpha}


def gkt_epochs(keys: Keys) -> int:
    """The server's epochs: FedML follows `epochs_server` with `sweep`, or where clients train and it is no test."""
    asked = usual(keys, "epochs_server", some, 1)
    keys.raw("client_model")
    trains, test = keys.get("whether_training_on_client", switch, True), keys.get("test", flag, False)
    if keys.get("sweep", switch, False) or (trains and not test) or asked == 1:
        return asked
    keys.warn(
        "epochs_server", "FedML makes one epoch unless sweep is 1 (clients do not train, or test is true); so here"
    )
    return 1


SPECIAL: Mapping[str, Special] = {
    "FedGAN": Special(("GAN",), gan_model, gan_training, lambda keys: averaged(keys, "FedGAN", "gan")),
    "FedNAS": Special(("darts",), nas_model, nas_training, nas_server),
    "FedGKT": Special(("resnet20", "resnet56", "resnet56_gkt"), lambda keys: {}, gkt_training, gkt_server),
}
