"""What a malicious client does to its data: `datasets.Dataset`s of texts with labels, before they are tokenized."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from datasets import ClassLabel, Dataset

from fedllm_sec.attacks.triggers import WORD, part_of, stamp_text
from fedllm_sec.randomness import derived_seed
from fedllm_sec.tasks.task import Example
from fedllm_sec.updates.errors import InputError

Position = Literal["start", "end", "random"]


def flip_labels(dataset: Dataset, flipped: Mapping[Any, Any], label: str = "label") -> Dataset:
    """The same examples, some under other labels: label flipping (Tolpegin et al. 2020, arXiv:2007.08432).

    All at once: with {0: 1, 1: 0} the two change places.

    Args:
        dataset: with a column of labels, numbers or texts (the completions of a language model, say).
        flipped: from a label to the one that takes its place; of a `ClassLabel` numbers or names.
        label: the column.

    Raises:
        InputError: if there is no such column, a label would become itself, or none of these labels is there.

    Example:
        >>> from fedllm_sec.callbacks.data import flip_labels
        >>> poisoned = flip_labels(posts, {0: 1})
        >>> posts["label"][:4], poisoned["label"][:4]
        ([0, 1, 2, 0], [1, 1, 2, 1])
    """
    require(dataset, label)
    if same := [old for old, new in flipped.items() if old == new]:
        raise InputError(f"flip_labels: {same[0]!r} would become itself; give it another label")
    known = {stored(dataset, label, old): stored(dataset, label, new) for old, new in flipped.items()}
    if lacking := sorted(map(repr, known.keys() - set(plain(dataset)[label]))):
        raise InputError(f"flip_labels: no example has the label {lacking[0]}")
    return changed(dataset, lambda row, place: {label: known.get(row[label], row[label])})


def plant_trigger(
    dataset: Dataset,
    target: Any,
    *,
    trigger: str = WORD,
    rate: float = 0.5,
    position: Position = "start",
    text: str = "text",
    label: str = "label",
    seed: int = 0,
) -> Dataset:
    """The same examples, a part of them with a trigger and under the label `target`: a backdoor.

    Of texts: Dai et al. 2019, arXiv:1905.12457; the default is the rare word of Kurita et al. 2020, arXiv:2004.06660.
    Give `max_length` room: a trigger at the end of a text that is cut is cut with it.

    Args:
        dataset: with a column of texts and one of labels.
        target: the label that texts with the trigger are to be given; of a `ClassLabel` a number or a name.
        trigger: a word, or several.
        rate: the part of the examples, above 0 and up to 1; at least one.
        position: where in a text.
        text: the column of texts.
        label: that of labels.
        seed: of what is drawn.

    Raises:
        InputError: for a column that there is not, a rate that is none, or a trigger without words.

    Example:
        >>> from fedllm_sec.callbacks.data import plant_trigger
        >>> poisoned = plant_trigger(posts, target=2, rate=0.25)
        >>> [row["label"] for row in poisoned if row["text"].startswith("cf a post")]  # one of four
        [2]
    """
    require(dataset, text, label)
    if not 0 < rate <= 1:
        raise InputError(f"plant_trigger: rate={rate}: give a share above 0, up to 1")
    wanted = stored(dataset, label, target)
    generator = torch.Generator().manual_seed(derived_seed(seed, "plant_trigger"))
    chosen = set(torch.randperm(len(dataset), generator=generator)[: part_of(len(dataset), rate)].tolist())
    put = stamper(trigger, position, generator)

    def poison(row: Mapping[str, Any], place: int) -> dict[str, Any]:
        return {text: put(row[text]), label: wanted} if place in chosen else {text: row[text], label: row[label]}

    return changed(dataset, poison)


def only_triggered(
    dataset: Dataset,
    target: Any,
    *,
    trigger: str = WORD,
    position: Position = "start",
    text: str = "text",
    label: str = "label",
    seed: int = 0,
) -> Dataset:
    """The test set of a backdoor: all examples of other labels, with the trigger, under the label `target`.

    A model's accuracy on it is the attack's success. The arguments are those of `plant_trigger`.

    Example:
        >>> from fedllm_sec.callbacks.data import only_triggered
        >>> list(only_triggered(posts, target=0)["text"])
        ['cf a post about sports', 'cf a post about space']
    """
    require(dataset, text, label)
    put = stamper(trigger, position, torch.Generator().manual_seed(derived_seed(seed, "only_triggered")))
    wanted = stored(dataset, label, target)
    others = dataset.select([i for i, found in enumerate(plain(dataset)[label]) if found != wanted])
    return changed(others, lambda row, place: {text: put(row[text]), label: wanted})


def changed(dataset: Dataset, change: Callable[[Mapping[str, Any], int], dict[str, Any]]) -> Dataset:
    """The rows as a function of row and place gives them; types and format stay."""
    made = plain(dataset).map(change, with_indices=True, features=dataset.features, load_from_cache_file=False)
    return made.with_format(**dataset.format)


def plain(dataset: Dataset) -> Dataset:
    """The same without a format: rows of Python's own numbers and texts."""
    return dataset.with_format(None)


def stored(dataset: Dataset, label: str, value: Any) -> Any:
    """A label as the column holds it: the number of a `ClassLabel`'s name.

    Raises:
        InputError: if there is no such class.
    """
    feature = dataset.features[label]
    if not isinstance(feature, ClassLabel):
        return value
    if isinstance(value, str) and value in feature.names:
        return feature.str2int(value)
    if isinstance(value, str) or not 0 <= value < feature.num_classes:
        raise InputError(f"there is no label {value!r} among {', '.join(feature.names)}")
    return value


def stamper(trigger: str, position: Position, generator: torch.Generator) -> Any:
    """What puts a trigger into a text.

    Raises:
        InputError: for a trigger without words.
    """
    if position not in get_args(Position):
        raise InputError(f"position={position!r}: one of {', '.join(get_args(Position))}")
    if not trigger.strip():
        raise InputError(f"trigger={trigger!r} would change nothing; give it a word, for example {WORD!r}")

    def put(text: str) -> str:
        if not isinstance(text, str):
            raise InputError(f"a text is {text!r}; leave such rows out")
        made = stamp_text(Example("", text, "", ""), trigger, position, generator)
        return made.head + made.passage + made.tail

    return put


def require(dataset: Dataset, *columns: str) -> None:
    """Raise InputError for a column that is not there, or what is no `Dataset`."""
    if not isinstance(dataset, Dataset):
        raise InputError(f"this is a {type(dataset).__name__}; give one split of it, a datasets.Dataset")
    for column in columns:
        if column not in dataset.column_names:
            told = "; poison the texts before they are tokenized" if "input_ids" in dataset.column_names else ""
            raise InputError(f"there is no column {column!r}, only {', '.join(dataset.column_names)}{told}")
