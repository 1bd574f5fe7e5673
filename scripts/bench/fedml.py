"""FedML's security module, driven as its server drives it; imported in a child process only.

`import fedml` needs about fifty packages. Empty modules stand in for the two packages whose `__init__` imports them
all, and for the function that chooses a device; everything that runs is FedML's own.
"""

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from bench.files import Array
from bench.stand_in import stand_in

DIRECT = {  # methods that its dispatcher does not know
    "bulyan": ("bulyan_defense", "BulyanDefense"),
    "residual": ("residual_based_reweighting_defense", "ResidualBasedReweightingDefense"),
}
WHOLE = ("robust_learning_rate", "weak_dp")  # its `defend` runs these


def fedml(call: Any, updates: list[dict[str, Array]], peer: str | None) -> tuple[Callable[[], Any], Any]:
    """Weights as (sample count, OrderedDict) around a global model of zeros, so that weights are updates."""
    import torch

    import_fedml(peer)
    name, parameters = call
    args = SimpleNamespace(enable_defense=True, defense_type=name, federated_optimizer="FedAvg", **parameters)
    names = list(updates[0])
    states = [OrderedDict((key, torch.from_numpy(array)) for key, array in update.items()) for update in updates]
    clients = [(1.0, state) for state in states]
    model = OrderedDict((key, torch.zeros(tensor.shape)) for key, tensor in states[0].items())
    run = plan(name, args, clients, model)

    def vector(result: Any) -> Array:
        return np.concatenate([np.asarray(result[key], np.float32).ravel() for key in names])

    return run, vector


def plan(name: str, args: SimpleNamespace, clients: list[Any], model: Any) -> Callable[[], Any]:
    """The calls that FedML's ServerAggregator makes for a defense."""
    average = importlib.import_module("fedml.ml.aggregator.agg_operator").FedMLAggOperator.agg
    if name == "fedavg":
        return lambda: average(args, clients)
    if name in DIRECT:
        return direct(name, args, clients, average)
    defender = importlib.import_module("fedml.core.security.fedml_defender").FedMLDefender()
    defender.init(args)

    def run() -> Any:
        if name in WHOLE:
            return defender.defend(clients, average, model)
        kept = defender.defend_before_aggregation(clients, model)
        return defender.defend_after_aggregation(defender.defend_on_aggregation(kept, average, model))

    return run


def direct(name: str, args: SimpleNamespace, clients: list[Any], average: Callable[..., Any]) -> Callable[[], Any]:
    """A method that only its class offers."""
    module, class_name = DIRECT[name]
    defense = getattr(importlib.import_module(f"fedml.core.security.defense.{module}"), class_name)(args)
    if hasattr(defense, "run"):
        return lambda: defense.run(clients, average)
    return lambda: average(args, list(defense.defend_before_aggregation(clients)))


def import_fedml(peer: str | None) -> None:
    """Put stand-ins in the place of `fedml`, `fedml.core` and `fedml.device`."""
    import torch

    root = stand_in("fedml", peer)
    if "fedml.core" in sys.modules:
        return
    core = ModuleType("fedml.core")
    core.__path__ = [f"{where}/core" for where in root.__path__]
    device: Any = ModuleType("fedml.device")
    device.get_device = lambda *_: torch.device("cpu")
    sys.modules |= {"fedml.core": core, "fedml.device": device}
    root.core, root.device = core, device  # type: ignore[attr-defined]
