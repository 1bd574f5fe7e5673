"""Flower's simulation: FedAvg of `flwr.serverapp.strategy` over the Ray backend, one actor on each core.

A round is timed from before the strategy makes its messages until after it has averaged. `flwr run`, which Flower 1.41
recommends over `run_simulation`, ends in the same engine.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from bench_peers.flower_client import app as client_app
from bench_peers.given import read, write_state


class TimedFedAvg(FedAvg):
    """FedAvg with a clock; `seconds` has one entry for each round."""

    def __init__(self, clients: int):
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.clients, self.began, self.seconds = clients, 0.0, list[float]()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round."""
        self.began = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End a round; a client that failed would make the round shorter, and is an error."""
        replies = list(replies)
        averaged = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.began)
        if errors := [reply.error.reason for reply in replies if reply.has_error()]:
            raise RuntimeError(f"{len(errors)} of Flower's clients failed, the first with {errors[0]}")
        if len(replies) != self.clients:
            raise RuntimeError(f"{len(replies)} of {self.clients} clients answered Flower")
        return averaged


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run all rounds; the final model goes to `job["final"]`."""
    given = read(Path(job["given"]))
    strategy = TimedFedAvg(given.facts["clients"])
    server_app = ServerApp()
    names = {"model": given.facts["model"], "given": job["given"], "sliced": job["sliced"], "threads": 1}

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(given.initial)
        rounds = given.facts["rounds"]
        result = strategy.start(grid, initial, num_rounds=rounds, train_config=ConfigRecord(names))
        write_state(Path(job["final"]), result.arrays.to_torch_state_dict())

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=given.facts["clients"],
        backend_config={
            "init_args": {"num_cpus": job["threads"]},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return {"seconds": strategy.seconds}
