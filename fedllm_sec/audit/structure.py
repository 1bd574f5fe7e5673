"""The tensors of an adapter by their names and shapes alone: what they are, and whether they belong there."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm_sec.audit.header import Fault, TensorEntry
from fedllm_sec.audit.patterns import is_positive
from fedllm_sec.updates.patterns import TooSlowError, matches, matching
from fedllm_sec.updates.smuggling import PREFIX, WHOLE_HEADS, Kind, classify, is_bias_of

EMBEDDINGS = ("lm_head", "embed_tokens", "embed_in", "embed_out", "wte", "word_embeddings", "shared", "embeddings")


@dataclass
class Module:
    """The tensors of one adapted module, by kind."""

    name: str
    tensors: dict[Kind, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """What the tensors of an adapter are.

    Attributes:
        modules: adapted ones, by name.
        whole: tensors of modules that are saved whole.
        strange: tensors that are no part of an adapter.
        biases: of the whole base, which the configuration declares.
    """

    modules: Mapping[str, Module] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()


def structure_of(tensors: Sequence[str], config: Mapping[str, Any]) -> Structure:
    """Sort names into modules."""
    modules: dict[str, Module] = {}
    whole, strange, biases = [], [], {}
    for name in sorted(tensors):
        what, module = classify(name, config)
        if not name.startswith(PREFIX):
            strange.append(name)
        elif what == "whole":
            whole.append(name)
        elif what == "strange":
            strange.append(name)
        elif what == "bias":
            biases[name] = module
        else:
            modules.setdefault(module, Module(module)).tensors[what] = name
    bias = str(config.get("bias", "none"))
    foreign = [name for name, module in biases.items() if not is_bias_of(module, modules, bias)]
    declared = [name for name in biases if name not in foreign] if bias == "all" else []
    return Structure(modules, tuple(whole), tuple(sorted([*strange, *foreign])), tuple(declared))


def check_structure(
    found: Structure, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], *, known_whole: bool
) -> Iterator[Fault]:
    """Everything that names and shapes tell of one adapter by itself.

    Args:
        found: what its tensors are.
        tensors: as the header has them.
        config: the adapter's own.
        known_whole: whether a global adapter says which modules are saved whole; then it is compared with that.
    """
    if found.strange:
        text = "is no part of a LoRA adapter: PEFT would load it over the base's weight of that name"
        yield Fault("KY001", text, found.strange[0], list(found.strange[:20]))
    if found.whole and not known_whole:
        yield from whole_weights(found.whole)
    if found.biases and not known_whole:
        yield Fault(
            "KY003", "replaces a bias of the base, as bias='all' declares", found.biases[0], list(found.biases[:20])
        )
    yield from halves(found, tensors)
    yield from declared(found, config)
    yield from targeted(found, config)
    yield from gaps(found, config)
    yield from ranks(found, tensors, config)
    yield from types(found, tensors)


def whole_weights(names: Sequence[str]) -> Iterator[Fault]:
    """Weights that are saved whole, other than of a head that the base has not."""
    of_base = [name for name in names if not any(part in WHOLE_HEADS for part in name.split("."))]
    if of_base:
        embeds = all(any(part in EMBEDDINGS for part in name.split(".")) for name in of_base)
        what = "embeddings or the language model's head" if embeds else "weights of the base"
        yield Fault("KY003" if embeds else "KY009", f"replaces {what} whole", of_base[0], list(of_base[:20]))


def halves(found: Structure, tensors: Mapping[str, TensorEntry]) -> Iterator[Fault]:
    """A without B, B without A, and factors without two dimensions."""
    for module in found.modules.values():
        for one, other in (("A", "B"), ("B", "A")):
            if one in module.tensors and other not in module.tensors:
                name = module.tensors[one]  # type: ignore[index]
                yield Fault("KY002", f"has no partner: lora_{other} of {module.name[:120]} is missing", name)
    for name in factors(found):
        shape = tensors[name].shape
        if len(shape) < 2 or 0 in shape:
            text = f"has shape {list(shape)}: so does an adapter look that ZeRO-3 saved without gathering"
            yield Fault("SH003", text, name, list(shape))


def factors(found: Structure) -> Iterator[str]:
    """The names of all A and B."""
    for module in found.modules.values():
        yield from (name for kind, name in module.tensors.items() if kind in ("A", "B"))


def declared(found: Structure, config: Mapping[str, Any]) -> Iterator[Fault]:
    """Magnitudes, biases and token embeddings against the switches that declare them."""
    switches: tuple[tuple[Kind, str], ...] = (
        ("magnitude", "use_dora"),
        ("lora_bias", "lora_bias"),
        ("tokens", "trainable_token_indices"),
    )
    for what, switch in switches:
        there = [module for module in found.modules.values() if what in module.tensors]
        pairs = [module for module in found.modules.values() if "A" in module.tensors]
        if there and not config.get(switch):
            yield Fault("KY005", f"is there, and {switch} is not set", there[0].tensors[what])
        elif config.get(switch) and pairs and what == "magnitude" and len(there) < len(pairs):
            missing = next(module for module in pairs if what not in module.tensors)
            yield Fault("KY008", f"promises {switch}, and {missing.name[:120]} has none of it", missing.name)
        elif config.get(switch) and not there:
            yield Fault("KY008", f"promises {switch}, and nothing of it is in the file")
    saved = config.get("modules_to_save")
    if isinstance(saved, list) and saved and not found.whole and not found.strange:
        yield Fault("KY008", f"promises modules_to_save={str(saved)[:80]}, and none of them is in the file")


def targeted(found: Structure, config: Mapping[str, Any]) -> Iterator[Fault]:
    """Modules that target_modules does not name."""
    for name, module in found.modules.items():
        if "A" not in module.tensors and "B" not in module.tensors:
            continue
        try:
            meant = is_targeted(name, config)
        except TooSlowError:
            return  # CF008 says so
        if not meant:
            some = next(iter(module.tensors.values()))
            yield Fault("KY004", f"belongs to {name[:120]}, which target_modules does not name", some)
    targets = config.get("target_modules")
    if isinstance(targets, list) and found.modules:
        names = [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in found.modules)]
        if names:
            random = config.get("init_lora_weights") in (False, "orthogonal")
            then = ": PEFT draws factors that act" if random else ""
            rule = "KY008" if random else "KY010"
            yield Fault(rule, f"targets {names[0][:80]!r}, and nothing of it is in the file{then}", None, names[:20])


def is_targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would adapt a module, by target_modules, exclude_modules and layers_to_transform."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if named(module, excluded):
        return False
    if not isinstance(targets, str | list) or targets == "all-linear" or config.get("target_parameters"):
        return True
    layers = config.get("layers_to_transform")
    if isinstance(targets, list) and layers not in (None, []):
        index = re.search(r"\.(\d+)\.", module)
        wanted = layers if isinstance(layers, list) else [layers]
        if index is None or int(index[1]) not in wanted:
            return False
    return named(module, targets)


def named(module: str, names: Any) -> bool:
    """Whether a list of names or a pattern means a module."""
    if isinstance(names, str):
        return matches(names, module)
    return isinstance(names, list) and any(module == name or module.endswith(f".{name}") for name in names)


def gaps(found: Structure, config: Mapping[str, Any]) -> Iterator[Fault]:
    """Layers that lack what all others have, where short names are to mean every layer."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return
    if any(re.search(r"\d", target) for target in targets):
        return
    layers: dict[str, set[int]] = {}
    for name in found.modules:
        if index := re.search(r"\.(\d+)\.", name):
            layers.setdefault(name[: index.start()] + ".*." + name[index.end() :], set()).add(int(index[1]))
    for kind, there in layers.items():
        missing = sorted(set(range(min(there), max(there) + 1)) - there)
        if missing and len(missing) < len(there):
            text = f"has {kind[:100]} in {len(there)} layers, and not in layer {missing[0]}"
            yield Fault("KY006", text, kind[:200].replace("*", str(missing[0])), missing[:20])


def ranks(found: Structure, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Iterator[Fault]:
    """Both factors have the rank that the configuration gives them."""
    for name, module in found.modules.items():
        try:
            rank = rank_of(name, config)
        except TooSlowError:
            return
        for kind, axis in (("A", 0), ("B", 1)):
            tensor = module.tensors.get(kind)  # type: ignore[call-overload]
            shape = tensors[tensor].shape if tensor else ()
            if rank is None or len(shape) < 2 or 0 in shape or shape[axis] == rank:
                continue
            if config.get("target_parameters") and shape[axis] % rank == 0:
                continue
            yield Fault(
                "SH001", f"is of rank {shape[axis]}, and the configuration says {rank}", tensor, shape[axis], rank
            )
            break


def rank_of(module: str, config: Mapping[str, Any]) -> int | None:
    """The rank that the configuration gives a module; None where it gives none that makes sense."""
    patterns = config.get("rank_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    pattern = matching(patterns, module)
    rank = config.get("r", 8) if pattern is None else patterns[pattern]
    return rank if isinstance(rank, int) and is_positive(rank) else None


def types(found: Structure, tensors: Mapping[str, TensorEntry]) -> Iterator[Fault]:
    """All factors are of one type."""
    by_type: dict[str, str] = {}
    for name in factors(found):
        by_type.setdefault(tensors[name].dtype, name)
    if len(by_type) > 1:
        first, second = sorted(by_type)[:2]
        yield Fault("SH004", f"is {second}, and other factors are {first}", by_type[second], sorted(by_type))


def differences(
    tensors: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], whose: str
) -> Iterator[Fault]:
    """Where names and shapes depart from those that are expected."""
    if missing := sorted(expected.keys() - tensors.keys()):
        yield Fault("KY006", f"is missing; {whose} has it", missing[0], missing[:20])
    if extra := sorted(tensors.keys() - expected.keys()):
        yield Fault("KY007", f"is there, and {whose} does not have it", extra[0], extra[:20])
    for name in sorted(tensors.keys() & expected.keys()):
        if tensors[name] != expected[name]:
            text = f"has shape {list(tensors[name])}, and {whose} has {list(expected[name])}"
            yield Fault("SH002", text, name, list(tensors[name]), list(expected[name]))
            return
