"""What an update reveals of what it was trained on, and how much that is to be trusted: no truth is looked at here."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Revealed:
    """What one client's update reveals.

    Attributes:
        client: who sent it.
        method: the attack's name.
        certificate: how well what was found explains the update, from 0 to 1 (each method says what it is); found
            without the truth, so that an attacker has it too.
        certain: whether the method vouches for it.
        why: in a line, what the method vouches for, or why it does not.
        seconds: what it took.
    """

    client: str
    method: str
    certificate: float
    certain: bool
    why: str
    seconds: float


@dataclass(frozen=True)
class RevealedImages(Revealed):
    """Inputs of a small model.

    Attributes:
        images: (n, *shape) float32, as the model takes them.
        labels: (n,) int64.
        loss: how far the gradient of what was found is from the client's; each method says how it is measured.
    """

    images: Tensor
    labels: Tensor
    loss: float


@dataclass(frozen=True)
class RevealedLabels(Revealed):
    """Which classes were trained on.

    Attributes:
        present: classes, in their order.
        counts: how many examples of each class; None where the method tells only which.
    """

    present: tuple[int, ...]
    counts: tuple[int, ...] | None


@dataclass(frozen=True)
class FoundToken:
    """A token that was trained on.

    Attributes:
        id: in the base model's vocabulary.
        score: the share of its vector that the update accounts for, once those found before it are taken out; 1: all.
        weight: the length of what it contributed to the update, as a share of that of the heaviest one.
    """

    id: int
    score: float
    weight: float


@dataclass(frozen=True)
class RevealedText(Revealed):
    """Tokens of a language model, and sentences where the rank allows.

    Attributes:
        tokens: distinct ones, the surest first.
        sentences: token ids of whole texts; none where only the bag of tokens can be told.
        rank: of what the update tells about the first layer's inputs: so many directions.
        sentence_scores: of each sentence, the share of a hidden state that the update accounts for, the least of all
            its states; 1: all.
    """

    tokens: tuple[FoundToken, ...]
    sentences: tuple[tuple[int, ...], ...]
    rank: int
    sentence_scores: tuple[float, ...] = ()
