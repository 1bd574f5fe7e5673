"""Triggers: what is added to an input so that a poisoned model gives the answer that the adversary wants.

The same functions serve images, rows of tokens, and a language model's texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedllm_sec.attacks.label_flipping import flip_text
from fedllm_sec.core import Attack, Threat
from fedllm_sec.tasks.arrays import Arrays
from fedllm_sec.tasks.task import Example
from fedllm_sec.updates.errors import InputError

Position = Literal["start", "end", "random"]
Rate = Annotated[float, Field(gt=0, le=1)]
Target = Annotated[int, Field(ge=0)]
WORD = "cf"  # the rare word of Kurita et al. 2020, arXiv:2004.06660, section 3
IMAGE_DIMENSIONS = 4  # (n, channels, height, width)
ROUNDING = 1e-9
Side = Annotated[int, Field(ge=1)]
Pixel = Annotated[int, Field(ge=0, le=255)]


class Box(NamedTuple):
    """A rectangle of pixels: its corner at the top left, and its sides."""

    top: int
    left: int
    height: int
    width: int


class Pattern(NamedTuple):
    """What is put on an image.

    Attributes:
        boxes: rectangles of pixels, placed within the pattern.
        height: of the whole pattern.
        width: likewise.
        value: of its pixels, 0 to 255.
    """

    boxes: Sequence[Box]
    height: int
    width: int
    value: int


class Patch(BaseModel):
    """A square on an image.

    Attributes:
        size: of its side, in pixels.
        value: of its pixels, 0 to 255.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: Side = 5
    value: Pixel = 255

    @property
    def pattern(self) -> Pattern:
        """One box."""
        return Pattern([Box(0, 0, self.size, self.size)], self.size, self.size, self.value)


Trigger = str | Patch  # words, or a square
Stamp = Callable[[Any, torch.Generator], Any]  # examples -> the same with the trigger; draws only random positions


def stamped(examples: Any, trigger: Trigger | None, position: Position, generator: torch.Generator) -> Any:
    """Examples with a trigger in every one; those that were given are left as they are.

    Args:
        examples: `Arrays` of images or of tokens, or texts (`Example`).
        trigger: words for texts, a patch for images; None: the word `cf`, a white square of 5 x 5 pixels.
        position: `start` and `end` are the corners of an image, top left and bottom right, and the beginning and the
            end of a text; of an `Example` the beginning of its passage, and what follows it, which is never cut.
        generator: of random positions.

    Raises:
        InputError: for words on images, a patch on texts, or a trigger that is larger than an input.
    """
    if is_images(examples):
        return examples._replace(x=stamp_images(examples.x, patch_of(trigger).pattern, position, generator))
    return with_words(examples, words_of(trigger), position, generator)


def is_images(examples: Any) -> bool:
    """Whether examples are images, (n, channels, height, width), and not texts or tokens."""
    return isinstance(examples, Arrays) and examples.x.dim() == IMAGE_DIMENSIONS and examples.encode is None


def with_words(examples: Any, words: str, position: Position, generator: torch.Generator) -> Any:
    """Texts, or rows of tokens, with words put in; the arguments are those of `stamped`.

    Raises:
        InputError: if a task writes no tokens, none of these words, or shorter texts.
    """
    if not isinstance(examples, Arrays):
        return [stamp_text(example, words, position, generator) for example in examples]
    if examples.encode is None:
        raise InputError("a trigger needs images (n, channels, height, width), or a task that writes words as tokens")
    tokens = [token for token in examples.encode(words) if token]
    if not tokens:
        raise InputError(f"trigger={words!r} has no word that this task could write as a token; give it another")
    return examples._replace(x=stamp_tokens(examples.x, tokens, position, generator))


def words_of(trigger: BaseModel | str | None, default: str = WORD) -> str:
    """The words to put into texts.

    Raises:
        InputError: for a trigger of images, or one without words.
    """
    if isinstance(trigger, BaseModel):
        raise InputError(f"trigger={trigger!r} is for images; give texts words, for example trigger='{default}'")
    if trigger is not None and not trigger.strip():
        raise InputError(f"trigger={trigger!r} would change nothing; give it a word, for example trigger='{default}'")
    return trigger or default


def patch_of(trigger: Trigger | None) -> Patch:
    """The square to put on images.

    Raises:
        InputError: for words.
    """
    if isinstance(trigger, str):
        raise InputError(f"trigger={trigger!r} is for texts; give images a patch, for example trigger={{size: 5}}")
    return trigger or Patch()


def stamp_images(x: Tensor, pattern: Pattern, position: Position, generator: torch.Generator) -> Tensor:
    """(n, channels, height, width) uint8 images with the pattern on each, as new ones.

    Raises:
        InputError: if it is larger than an image.
    """
    n, _, height, width = x.shape
    down, right = height - pattern.height, width - pattern.width
    if min(down, right) < 0:
        raise InputError(
            f"a trigger of {pattern.height} x {pattern.width} pixels does not fit an image of {height} x {width}; "
            "make it smaller"
        )
    x = x.clone()
    if position == "random":
        tops = torch.randint(down + 1, (n,), generator=generator).tolist()
        lefts = torch.randint(right + 1, (n,), generator=generator).tolist()
        for image, top, left in zip(x, tops, lefts, strict=True):
            fill(image, pattern, top, left)
    else:
        fill(x, pattern, *((0, 0) if position == "start" else (down, right)))
    return x


def fill(images: Tensor, pattern: Pattern, top: int, left: int) -> None:
    """Write a pattern into (..., height, width) pixels, in place."""
    for box in pattern.boxes:
        above, before = top + box.top, left + box.left
        images[..., above : above + box.height, before : before + box.width] = pattern.value


def stamp_tokens(x: Tensor, tokens: Sequence[int], position: Position, generator: torch.Generator) -> Tensor:
    """(n, length) int64 rows of tokens, padded with 0 on the left, with the trigger's tokens put in.

    A row stays as long as it is: padding makes room, and where there is none the text loses its beginning, or under
    `start` its second words.

    Raises:
        InputError: if the trigger is longer than a row.
    """
    n, length = x.shape
    if len(tokens) > length:
        raise InputError(f"a trigger of {len(tokens)} tokens does not fit a text of {length}; shorten it")
    rows, inserted = [], torch.tensor(tokens, dtype=x.dtype)
    for row in x:
        text = row[row != 0][-(length - len(tokens)) :] if len(tokens) < length else row[:0]
        place = {"start": 0, "end": len(text)}.get(position)
        if place is None:
            place = int(torch.randint(len(text) + 1, (), generator=generator))
        whole = torch.cat([text[:place], inserted, text[place:]])
        rows.append(torch.nn.functional.pad(whole, (length - len(whole), 0)))
    return torch.stack(rows) if n else x


def with_room(x: Tensor, tokens: int) -> Tensor:
    """Rows of tokens, padded with 0 on the left, without the beginning of those that have no room for so many more."""
    x = x.clone()
    kept = x.shape[1] - tokens
    for row in x:
        full = (row != 0).nonzero().flatten()
        row[full[: max(len(full) - max(kept, 0), 0)]] = 0
    return x


def stamp_text(example: Example, words: str, position: Position, generator: torch.Generator) -> Example:
    """A prompt with words put in, before the response.

    `start` and `end` put them around the passage, where they stay when a long passage is shortened, from whichever end;
    a random place is one before a word of the passage, and is cut with it.
    """
    if position == "end":
        return replace(example, tail=f" {words}{example.tail}")
    if position == "start":
        return replace(example, head=f"{example.head}{words}", passage=f" {example.passage}")
    parts = example.passage.split(" ")
    parts.insert(int(torch.randint(len(parts), (), generator=generator)), words)
    return replace(example, passage=" ".join(parts))


def labelled(examples: Any, target: int) -> Any:
    """The same examples, all of class `target`; of a text the response begins with that label.

    Raises:
        InputError: for a class that there is not.
    """
    if isinstance(examples, Arrays):
        return examples._replace(y=torch.full_like(examples.y, target))
    return [flip_text(example, target) for example in examples]


def classes(examples: Any) -> Tensor:
    """(n,) the class of each example; -1 where it has none."""
    if isinstance(examples, Arrays):
        return examples.y
    return torch.tensor([-1 if example.label is None else example.label for example in examples])


def chosen(examples: Any, places: Sequence[int]) -> Any:
    """Some of the examples."""
    return examples.rows(places) if isinstance(examples, Arrays) else [examples[place] for place in places]


def with_replaced(examples: Any, places: Sequence[int], new: Any) -> Any:
    """The examples with others at some places."""
    if isinstance(examples, Arrays):
        x, y = examples.x.clone(), examples.y.clone()
        x[list(places)], y[list(places)] = new.x, new.y
        return examples._replace(x=x, y=y)
    result = list(examples)
    for place, example in zip(places, new, strict=True):
        result[place] = example
    return result


def part_of(size: int, rate: float) -> int:
    """floor(rate * size), and at least one; 0.29 of 100 is 29, though the product of the floats is a little less."""
    return max(int(rate * size + ROUNDING), 1)


def planted(examples: Any, stamp: Stamp, rate: float, target: int, generator: torch.Generator) -> Any:
    """A part of the examples, at least one, with a trigger and under the label `target`; the others as they are."""
    size = len(classes(examples))
    places = torch.randperm(size, generator=generator)[: part_of(size, rate)].sort().values.tolist()
    return with_replaced(examples, places, labelled(stamp(chosen(examples, places), generator), target))


def backdoor_task(name: str, stamp: Stamp, rate: float, target: int) -> Attack:
    """The attack's part on data: plant the trigger in training; succeed on test inputs of any other class that have it.

    Args:
        name: of the attack, for its randomness.
        stamp: puts the trigger in.
        rate: the part of a malicious client's examples that are poisoned.
        target: the class that triggered inputs are to be given.
    """

    def poison_data(examples: Any, threat: Threat) -> Any:
        return planted(examples, stamp, rate, target, threat.generator(name, threat.me, "plant"))

    def goal(test: Any) -> Any:
        others = chosen(test, (classes(test) != target).nonzero().flatten().tolist())
        return labelled(stamp(others, torch.Generator().manual_seed(0)), target)

    return Attack(poison_data=poison_data, goal=goal)
