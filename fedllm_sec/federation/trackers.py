"""Send a run's metrics to Accelerate's trackers, as they come."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.updates.errors import InputError


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker that Accelerate does not know or that is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"trackers: unknown tracker {name!r}; Accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise InputError(f"trackers: {name!r} is not installed; pip install {name}")


class Trackers:
    """The trackers of one arm; each gets the numbers of every round.

    Args:
        names: Accelerate's names: tensorboard, wandb, ...
        run: what the run is called there, `<experiment>/<arm>`.
        folder: where trackers that write files write them.
    """

    def __init__(self, names: Sequence[str], run: str, folder: Path):
        self.trackers: list[Any] = []
        for name in names:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            kind = LOGGER_TYPE_TO_CLASS[name]
            tracker = kind(name, logging_dir=folder) if kind.requires_logging_directory else kind(run)
            tracker.start()
            self.trackers.append(tracker)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def log(self, index: int, metrics: Mapping[str, float | None]) -> None:
        """Send the metrics of a round; what diverged is left out."""
        for tracker in self.trackers:
            tracker.log({key: value for key, value in metrics.items() if value is not None}, step=index)
