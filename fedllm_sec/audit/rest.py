"""What an adapter holds besides factors: whole weights, biases, magnitudes; beside what they replace."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedllm_sec.audit.base import Base, norm_of, spans_of
from fedllm_sec.audit.header import Fault
from fedllm_sec.audit.intake import Opened
from fedllm_sec.audit.policy import Thresholds
from fedllm_sec.updates.smuggling import PREFIX, WHOLE_HEADS, classify
from fedllm_sec.updates.sources import SafetensorsFile

FRESH = 10.0  # times as far as others may a head move that was drawn at random, and is trained from there


def check_rest(
    opened: Opened, start: SafetensorsFile | None, base: Base | None, thresholds: Thresholds
) -> Iterator[Fault]:
    """The tensor that moved farthest for its length, if it moved too far; beside the global adapter, or the base."""
    assert opened.source is not None
    factors = {name for pair in opened.modules.values() for name in pair}
    worst: tuple[float, str, float] | None = None
    for name in sorted(opened.tensors.keys() - factors):
        known = start_of(opened, name, start, base)
        if known is None:
            continue
        moved, length = apart(opened.source.file, name, known)
        head = any(part in WHOLE_HEADS for part in name.split("."))
        fresh = head and (base is None or base.find(plain(name)) is None)
        most = thresholds.of_base * (FRESH if fresh else 1.0)
        if length > 0 and moved / length > most and (worst is None or moved / length > worst[0]):
            worst = (moved / length, name, most)
    if worst is not None:
        ratio, name, most = worst
        yield Fault("W005", f"is {ratio:.3g} times its length away from what it replaces", name, ratio, most)


def start_of(
    opened: Opened, name: str, reference: SafetensorsFile | None, base: Base | None
) -> tuple[SafetensorsFile, str] | Tensor | float | None:
    """What a tensor began as: a tensor of a file, values, or a length to compare with; None where nobody knows."""
    kind, module = classify(name, opened.config or {})
    if kind == "strange":
        return None  # KY001 says so
    if reference is not None and name in reference.layout.sizes and norm_of(reference, name) > 0:
        return reference, name
    if base is None:
        return None
    weight = base.find(f"{module}.weight")
    if kind == "magnitude":
        return row_norms(*weight) if weight is not None else None
    if kind == "lora_bias":
        return norm_of(*weight) if weight is not None else None
    found = base.find(plain(name))
    same = found is not None and dict(found[0].layout.shapes)[found[1]] == opened.tensors[name].shape
    return found if same else None


def plain(name: str) -> str:
    """The name of a tensor in the base."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def apart(file: SafetensorsFile, name: str, known: tuple[SafetensorsFile, str] | Tensor | float) -> tuple[float, float]:
    """How far a tensor is from what it began as, and how long that is."""
    if isinstance(known, float):
        return norm_of(file, name), known
    squares = torch.zeros(2, dtype=torch.float64)
    for span in spans_of(file, name):
        now = file.load(span).double()
        if isinstance(known, Tensor):
            before = known[span.start : span.stop]
        else:
            before = known[0].load(span._replace(tensor=known[1])).double()
        squares += torch.stack([(now - before).square().sum(), before.square().sum()])
    moved, length = squares.sqrt().tolist()
    return moved, length


def row_norms(file: SafetensorsFile, name: str) -> Tensor:
    """The lengths of a matrix's rows, which DoRA's magnitudes begin as."""
    rows, columns = dict(file.layout.shapes)[name][:2]
    squares = [file.load(span).double().square() for span in spans_of(file, name)]
    return torch.cat(squares).view(rows, columns).sum(dim=1).sqrt()


def same_as_base(opened: Opened, names: Sequence[str], base: Base) -> bool:
    """Whether tensors hold just what the base has at their places: then loading them over it changes nothing."""
    assert opened.source is not None
    for name in names:
        found = base.find(plain(name))
        if found is None or dict(found[0].layout.shapes)[found[1]] != opened.tensors[name].shape:
            return False
        if apart(opened.source.file, name, found)[0] > 0:
            return False
    return True
