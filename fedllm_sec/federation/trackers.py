"""Send a run's metrics to Accelerate's trackers."""

from typing import Any

from fedllm_sec.config import Config
from fedllm_sec.federation.run_folder import ArmFolder
from fedllm_sec.updates.errors import InputError


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise InputError for a tracker that Accelerate does not know or that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"trackers: unknown tracker {name!r}; Accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise InputError(f"trackers: {name!r} is not installed; pip install {name}")


def track(config: Config, arm: str, folder: ArmFolder) -> None:
    """Send the metrics of an arm's rounds; the numbers are those of `metrics.jsonl`."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in config.trackers:
        kind = LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, Any] = {"logging_dir": folder.path} if kind.requires_logging_directory else {}
        tracker = kind(f"{name}", **options) if options else kind(f"{config.name}/{arm}")
        tracker.start()
        for index in range(config.federation.rounds + 1):
            metrics = folder.metrics(index) or {}
            numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
            tracker.log(numbers, step=index)
        tracker.finish()
