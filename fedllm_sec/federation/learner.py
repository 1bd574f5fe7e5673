"""What the loop knows of that which is trained: an adapter on a base, or a small model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fedllm_sec.core import Round
from fedllm_sec.federation.adversary import Poisoning
from fedllm_sec.federation.progress import RoundProgress
from fedllm_sec.federation.run_folder import ArmFolder
from fedllm_sec.federation.shared import SharedWork
from fedllm_sec.victim import Victim


@dataclass(frozen=True)
class Training:
    """The training of a round, as it is asked for.

    Attributes:
        round: which.
        folder: of the arm: what the clients received is there, and what they send goes there.
        clients: whom this process trains.
        poisoning: what malicious ones do.
        progress: is told how far the clients are.
        again: whether malicious clients train for a second time; what they send goes to `ArmFolder.again`.
        cache: where arms share what honest clients send; None: they do not.
        victims: clients of whom is kept what they really train on, because somebody will try to find it out.
    """

    round: Round
    folder: ArmFolder
    clients: Sequence[int]
    poisoning: Poisoning
    progress: RoundProgress
    again: bool = False
    cache: Path | None = None
    victims: frozenset[int] = frozenset()

    @property
    def received(self) -> Path:
        """The global model or adapter that the clients start from."""
        return self.folder.global_model(self.round.index - 1)

    @property
    def out(self) -> Path:
        """Where what the clients send goes."""
        return self.folder.again(self.round.index) if self.again else self.folder.round(self.round.index)

    @cached_property
    def shared(self) -> SharedWork:
        """What honest clients sent in other arms that came to the same model; a learner may use it or not."""
        return SharedWork(self.cache, self.received, self.round.index)


class Split(NamedTuple):
    """Who has what: the label of every training example, the places of each client's, and what the labels are called.

    `names` is their number where they have no names.
    """

    labels: Sequence[int]
    shares: Sequence[Sequence[int]]
    names: int | Sequence[str]


class Truth(NamedTuple):
    """What a client really trained on in a round: for whoever judges an attack, which is never given it.

    Attributes:
        inputs: (m, *shape) the distinct examples of a small model, as it takes them.
        labels: (m,) int64, theirs.
        every: (k,) int64, the label of each example of each batch: one that came twice is there twice.
        texts: the distinct texts of a language model, as far as an update can tell of them.
        decode: writes their tokens as text.
    """

    inputs: Tensor | None = None
    labels: Tensor | None = None
    every: Tensor | None = None
    texts: tuple[tuple[int, ...], ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None


class Learner(Protocol):
    """Something that clients train on examples of their own, and the server tests."""

    @property
    def description(self) -> str:
        """What is trained, in a line."""

    @property
    def has_root(self) -> bool:
        """Whether the server has examples of its own to train on."""

    def digest(self) -> str:
        """A hash of every example and who has it."""

    def split(self) -> Split | None:
        """Who has what, where examples have labels."""

    def start(self, folder: Path) -> None:
        """Write what the first round starts from."""

    def steps(self, client: int) -> int:
        """How many optimizer steps a client does in a round."""

    def train(self, training: Training) -> None:
        """Train some clients of a round, and write what they send with their claims: samples, loss, steps, seconds."""

    def victim(self, received: Path, index: int, client: int) -> Victim:
        """How a client trains in round `index` that received a global model or adapter; all that the server knows."""

    def truth(self, folder: ArmFolder, round: Round, client: int) -> Truth:
        """What one of `Training.victims` really trained on."""

    def evaluate(self, folder: Path) -> dict[str, float]:
        """The metrics of a global model or adapter, the same on every process."""

    def wanted(self, goal: Callable[[Any], Any]) -> Any:
        """What an attack makes of the test examples; raises InputError if there are none, or of no class that is."""

    def success(self, folder: Path, goal: Callable[[Any], Any]) -> float:
        """How often a global model or adapter judges as an attack's goal has it; the same on every process."""

    def show(self, model: Path, folder: Path) -> None:
        """Draw what a global model makes into an arm's folder, where that can be drawn."""


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot say."""
    return value if math.isfinite(value) else None
