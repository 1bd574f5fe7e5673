"""The folder that a run leaves: names of its parts, what is whole, and what must go before a run is resumed."""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import (
    PARTIAL,
    atomic_file,
    atomic_folder,
    delete_partials,
    read_json,
    write_json,
    write_text,
)
from fedllm_sec.updates.refactor import save_as_adapters
from fedllm_sec.updates.sources import ADAPTER_CONFIG, ADAPTER_FILE, MODEL_CONFIG, MODEL_FILE, Row, adapter_file
from fedllm_sec.updates.update_set import UpdateSet

BUFFERS = "buffers"  # the stem of a file beside a model's
MANY = "clients"  # the stem of a file that holds what many clients sent
SKIPPED = "skipped.json"
POISONED = "poisoned"  # begins the name of what the adversary sent in a client's place
RECONSTRUCTED = "reconstructed"  # in a round's folder: what a curious server found out
SERVER = -1  # stands for a client's number where the server trains on its own texts


@dataclass(frozen=True)
class ArmFolder:
    """The part of a run's folder that belongs to one arm."""

    path: Path

    def global_model(self, index: int) -> Path:
        """The server's adapter or model after round `index`; 0 is what it began with."""
        return self.path / f"global_{index:04d}"

    def round(self, index: int) -> Path:
        """Everything of round `index`."""
        return self.path / f"round_{index:04d}"

    def client(self, index: int, client: int) -> Path:
        """What a client sent."""
        return self.round(index) / client_name(client)

    def again(self, index: int) -> Path:
        """What malicious clients sent that trained for a second time, after they had seen what others sent."""
        return self.round(index) / "adversary"

    def sent(self, index: int, clients: Sequence[int]) -> dict[int, "Sent"]:
        """What some clients sent in a round, before any of them trained again."""
        found = sent_in(self.round(index))
        return {client: found[client_name(client)] for client in clients}

    def sent_at_last(self, index: int, clients: Sequence[int]) -> dict[int, "Sent"]:
        """The same, of those that trained again what they sent then."""
        found = {**sent_in(self.round(index)), **sent_in(self.again(index))}
        return {client: found[client_name(client)] for client in clients}

    def trained_on(self, index: int, client: int) -> Path:
        """What a client really trained on, where an attack that tries to find it out is to be judged."""
        return self.round(index) / "trained_on" / f"{client_name(client)}.json"

    def reconstructed(self, index: int) -> Path:
        """What a curious server found out in a round."""
        return self.round(index) / RECONSTRUCTED

    def poisoned(self, index: int, client: int) -> Path:
        """What the server received in its place, where the adversary rewrote it."""
        return self.round(index) / f"{POISONED}_{client:02d}"

    def metrics(self, index: int) -> dict[str, Any] | None:
        """The metrics of a whole round, or None: they are written last."""
        path = self.round(index) / "metrics.json"
        return read_json(path) if path.exists() else None

    def skip(self, index: int, reason: str) -> None:
        """Note that the server left the model of a round as it was."""
        write_json(self.round(index) / SKIPPED, {"reason": reason})

    def skipped(self, index: int) -> str | None:
        """Why the server left the model of a round as it was; None where it did not."""
        path = self.round(index) / SKIPPED
        reason: str | None = read_json(path)["reason"] if path.exists() else None
        return reason

    def clear_unfinished(self, index: int) -> None:
        """Delete what is there of a round that is not whole."""
        shutil.rmtree(self.round(index), ignore_errors=True)
        shutil.rmtree(self.global_model(index), ignore_errors=True)

    def finish_round(self, index: int, metrics: Mapping[str, Any]) -> None:
        """Write all rounds' metrics anew, one line each, and then this round's own, which makes it whole."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()[:index] if path.exists() else []
        lines += [json.dumps(self.metrics(i)) for i in range(len(lines), index)]
        write_text(path, "\n".join([*lines, json.dumps(metrics)]) + "\n")
        write_json(self.round(index) / "metrics.json", metrics)


class Sent(NamedTuple):
    """What a client sent, and what it says about it."""

    address: Path | Row
    claims: Mapping[str, Any]

    @property
    def num_samples(self) -> Any:
        """How many samples it claims; the gate looks at it."""
        return self.claims["num_samples"]

    @property
    def steps(self) -> int:
        """How many local steps it claims; one that claims nonsense counts as one."""
        steps = self.claims.get("steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0 else 1


def sent_in(folder: Path) -> dict[str, Sent]:
    """What clients sent into a folder, by their names: each a folder of its own, or a row of a file of many."""
    found = {path.parent.name: Sent(path.parent, read_json(path)) for path in folder.glob("*/client.json")}
    for path in folder.glob(f"{MANY}*.json"):
        for name, claims in read_json(path).items():
            found[name] = Sent(Row(path.with_suffix(".safetensors"), claims["row"]), claims)
    return found


def client_name(client: int) -> str:
    """`client_03`; the server, when it trains an update of its own, is called so."""
    return "server" if client == SERVER else f"client_{client:02d}"


def save_many(
    clients: Sequence[int], parts: Mapping[str, Mapping[str, Tensor]], claims: Sequence[Any], stem: Path
) -> None:
    """Write what many clients sent: one file for each part, with an axis more in front, and their claims.

    Args:
        clients: who.
        parts: by the ending of the file's stem, names to (n, ...) tensors; an empty part has no file.
        claims: of each.
        stem: of the files' names.
    """
    for part, tensors in parts.items():
        if tensors:
            with atomic_file(stem.with_name(f"{stem.name}{part}.safetensors")) as partial:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    rows = {
        client_name(client): {"row": row, **told}
        for row, (client, told) in enumerate(zip(clients, claims, strict=True))
    }
    write_json(stem.with_suffix(".json"), rows)


def save_adapter(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    *,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    **files: Any,
) -> None:
    """Write a PEFT adapter folder, whole or not at all.

    Args:
        state: the adapter; with a model's configuration a whole model's, whose folder is one of transformers.
        config: PEFT's adapter configuration, or the model's.
        folder: where.
        beside: more tensors, by the stem of their file.
        files: JSON files, by stem.
    """
    adapted = "peft_type" in config
    with atomic_folder(folder) as partial:
        save_file(dict(state), partial / (ADAPTER_FILE if adapted else MODEL_FILE), {"format": "pt"})
        write_json(partial / (ADAPTER_CONFIG if adapted else MODEL_CONFIG), config)
        for stem, tensors in (beside or {}).items():
            save_file(dict(tensors), partial / f"{stem}.safetensors")
        for stem, content in files.items():
            write_json(partial / f"{stem}.json", content)


def save_updates(updates: UpdateSet, base: UpdateSet, like: Path, folders: Sequence[Path]) -> None:
    """Write each row plus the global `base` as a folder like that of the global adapter or model."""
    with ExitStack() as stack:
        fill_folder(updates, base, like, [stack.enter_context(atomic_folder(folder)) for folder in folders])


def fill_folder(updates: UpdateSet, base: UpdateSet, like: Path, folders: Sequence[Path]) -> list[float] | None:
    """Put `updates` plus `base`, one row a folder, into folders that exist, with file names and configuration as in
    the folder (or the file of an adapter) `like`; one pass.

    Rows of the product space are brought back to the rank of the adapter.

    Returns:
        The share of each update's energy that its rank could not hold; None in the space of factors, where all is held.
    """
    name = adapter_file(like).name if like.is_dir() else ADAPTER_FILE
    files = [folder / name for folder in folders]
    discarded = None
    if updates.layout.pairs:
        discarded = [lost.share for lost in save_as_adapters(updates, files, base)]
    else:
        updates.add(base).save(files)
    for config in (ADAPTER_CONFIG, MODEL_CONFIG):
        for folder in folders if (like / config).is_file() else ():
            shutil.copyfile(like / config, folder / config)
    return discarded


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder of ours, or of a whole model's."""
    state: dict[str, Tensor] = load_file(adapter_file(folder))
    return state


def check_free(folder: Path, config: str, *, resume: bool) -> None:
    """Make sure that a run of this configuration may go into a folder, before any work.

    Raises:
        InputError: if the folder holds a run already and `resume` is not set, or holds another run, or other things.
    """
    path = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose a folder with out=FOLDER")
    if not folder.exists() or all(entry.name.endswith(PARTIAL) for entry in folder.iterdir()):
        return
    if not path.is_file():
        raise InputError(f"{folder}: is not empty and holds no run; choose another with out=FOLDER")
    if not resume:
        raise InputError(f"{folder}: holds a run already; go on with --resume, or choose another with out=FOLDER")
    if path.read_text(encoding="utf-8") != config:
        raise InputError(f"{folder}: holds a run of another configuration ({path}); choose another with out=FOLDER")


def claim(folder: Path, config: str) -> None:
    """Make a run's folder ours; what a killed run left half-written goes."""
    folder.mkdir(parents=True, exist_ok=True)
    delete_partials(folder)
    write_text(folder / "config.yaml", config)
