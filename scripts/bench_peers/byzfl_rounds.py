"""ByzFL's simulation: its clients and its server, in the loop that its benchmark (`byzfl/benchmark/train.py`) has.

ByzFL 0.0.11 has two algorithms, and both are here: `FedAvg`, in which a client makes local steps and the server
averages weights (`epoch`), and `DSGD`, in which a client gives one gradient and the server makes a step (`step`). Its
server weighs clients alike. There is no adversary, no test, and nothing is written to files.
"""

import time
from pathlib import Path
from typing import Any

import torch
from bench.systems import stand_in

from bench_peers.given import Given, loader, read, write_state
from bench_peers.networks import NETWORKS


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run all rounds; the final model goes to `job["final"]`."""
    torch.set_num_threads(job["threads"])
    given = read(Path(job["given"]))
    server, clients = participants(given, sliced=job["sliced"])
    one_round = {"epoch": federated_averaging, "step": distributed_sgd}[given.facts["algorithm"]]
    for client in clients:
        client.set_model_state(server.get_dict_parameters())
    seconds = []
    for number in range(1, given.facts["rounds"] + 1):
        began = time.perf_counter()
        one_round(server, clients, given, number)
        new_model = server.get_dict_parameters()
        for client in clients:
            client.set_model_state(new_model)
        seconds.append(time.perf_counter() - began)
    write_state(Path(job["final"]), server.get_dict_parameters())
    return {"seconds": seconds}


def participants(given: Given, *, sliced: bool) -> tuple[Any, list[Any]]:
    """A server that holds the first model, and clients with a loader of all batches that they will see.

    `import byzfl` wants torchvision and seaborn for its benchmark, so that only its federated part is imported.
    """
    stand_in("byzfl", None)
    from byzfl.fed_framework import Client, Server, models

    name = given.facts["model"]
    setattr(models, name, NETWORKS[name])
    common = {
        "model_name": name,
        "device": "cpu",
        "optimizer_name": "SGD",
        "learning_rate": given.facts["learning_rate"],
        "weight_decay": 0.0,
        "milestones": [],
        "learning_rate_decay": 1.0,
    }
    client = {"loss_name": "CrossEntropyLoss", "LabelFlipping": False, "nb_labels": 10, "momentum": 0.0}
    client["store_per_client_metrics"] = False
    clients = [
        Client({**common, **client, "training_dataloader": loader(given, every_batch(given, i), sliced=sliced)})
        for i in range(given.facts["clients"])
    ]
    averaging = {"aggregator_info": {"name": "Average", "parameters": {}}, "pre_agg_list": []}
    server = Server({**common, **averaging, "test_loader": loader(given, every_batch(given, 0), sliced=sliced)})
    server.set_model_state(given.initial)
    return server, clients


def every_batch(given: Given, client: int) -> list[torch.Tensor]:
    """A client's batches of all rounds, one after another."""
    return [batch for number in range(given.facts["rounds"]) for batch in given.batches(number + 1, client)]


def federated_averaging(server: Any, clients: list[Any], given: Given, number: int) -> None:
    """`FedAvg`: each client descends over its batches of the round, and the server averages the weights."""
    weights = []
    for i, client in enumerate(clients):
        client.compute_model_update(len(given.batches(number, i)))
        weights.append(client.get_flat_parameters())
    server.update_model_with_weights(weights)


def distributed_sgd(server: Any, clients: list[Any], given: Given, number: int) -> None:
    """`DSGD`: each client gives the gradient of one batch, and the server descends along their average."""
    for client in clients:
        client.compute_gradients()
    server.update_model_with_gradients([client.get_flat_gradients_with_momentum() for client in clients])
