"""A client of Flower, written the way that its PyTorch tutorial does; Ray's actors import this module once.

Since its message API came, `NumPyClient` is in Flower's `compat` package.
"""

from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from bench_peers.given import loader, read
from bench_peers.networks import NETWORKS

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's local training in one round, from the model that it received."""
    config: Any = message.content["config"]
    torch.set_num_threads(config["threads"])
    client = int(context.node_config["partition-id"])
    model = NETWORKS[config["model"]]()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = descend(model, client, config)
    weight = float(read(Path(config["given"])).weights[client])
    metrics = MetricRecord({"num-examples": weight, "train_loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


def descend(model: nn.Module, client: int, config: Any) -> float:
    """Plain SGD over the client's batches; the mean of the losses."""
    given = read(Path(config["given"]))
    batches = loader(given, given.batches(config["server-round"], client), sliced=config["sliced"])
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=given.facts["learning_rate"])
    model.train()
    total = 0.0
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)
