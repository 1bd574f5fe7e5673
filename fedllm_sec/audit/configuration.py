"""An adapter's configuration, read with distrust: what changes the base, what imports code, what hides a scaling."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm_sec.audit.header import Fault, unique
from fedllm_sec.audit.patterns import is_positive
from fedllm_sec.audit.policy import Policy
from fedllm_sec.updates.adapters import LARGEST_CONFIG
from fedllm_sec.updates.layout import and_more
from fedllm_sec.updates.patterns import TooSlowError, matches

PEFT = "0.21"  # whose fields these are; importing it takes seconds
FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "use_dora", "velora_config", "alora_invocation_tokens",
    "use_qalora", "qalora_group_size", "monteclora_config", "layer_replication", "runtime_config", "lora_bias",
    "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying", "enable_lora",
    "merge_weights",
}  # fmt: skip
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "lora_ga")
SAFE_PARENTS = ("transformers.", "diffusers.", "sentence_transformers.", "trl.")  # whose classes auto_mapping may name
PASSING = {"inference_mode", "peft_version", "auto_mapping", "lora_dropout", "init_lora_weights", "revision"}
SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "inference_mode", "use_qalora")
NAMES = ("target_modules", "modules_to_save", "exclude_modules", "layers_pattern", "target_parameters")
REMOTE = ("auto_map", "trust_remote_code", "custom_pipelines")  # fields of models, at which loaders run code
VARIANTS = ("use_bdlora", "arrow_config", "monteclora_config", "velora_config", "use_qalora")
DICTIONARIES = {"rank_pattern", "alpha_pattern", "loftq_config"}  # which are empty where there is nothing
MOST_PATTERNS = 2000
MOST_NAMES = 10_000
CONDITIONS = {
    "alora_invocation_tokens": "it acts only behind certain tokens",
    "trainable_token_indices": "it replaces the embeddings of certain tokens",
    "layer_replication": "it repeats layers of the base",
}


def read_configuration(path: Path) -> tuple[dict[str, Any] | None, list[Fault]]:
    """Read adapter_config.json; None, with a fault, where it cannot be read in one way only."""
    try:
        size = path.stat().st_size
        if size > LARGEST_CONFIG:
            return None, [Fault("FS015", f"is {size:,} bytes long", None, size, LARGEST_CONFIG)]
        doubled: list[str] = []
        text = path.read_bytes().decode("utf-8")
        found = json.loads(text, object_pairs_hook=lambda pairs: unique(pairs, doubled), parse_constant=no_number)
    except (OSError, ValueError, RecursionError) as error:
        return None, [Fault("FS015", f"cannot be read as JSON ({type(error).__name__})")]
    if not isinstance(found, dict):
        return None, [Fault("FS015", "is no JSON object")]
    if doubled:
        return None, [Fault("FS015", f"gives {doubled[0][:60]!r} twice", None, doubled[:5])]
    return found, []


def no_number(text: str) -> Any:
    """NaN and Infinity are not JSON."""
    raise ValueError(text)


def check_configuration(config: Mapping[str, Any], policy: Policy) -> Iterator[Fault]:
    """What is wrong with a configuration by itself."""
    yield from bad_values(config)
    yield from gadgets(config)
    yield from other_base(config, policy)
    yield from changes_base(config)
    unknown = sorted(config.keys() - FIELDS - set(REMOTE))
    if unknown and kind(config) == "LORA":
        text = f"has fields that PEFT {PEFT} does not know: {shown(unknown)}"
        yield Fault("CF006", text, None, unknown[:20])
    if kind(config) != "LORA":
        yield Fault("CF010", f"is an adapter of the kind {kind(config)[:40]}, not LORA", None, kind(config)[:40])


def kind(config: Mapping[str, Any]) -> str:
    """LORA, or another of PEFT's kinds."""
    return str(config.get("peft_type") or "LORA")


def bad_values(config: Mapping[str, Any]) -> Iterator[Fault]:
    """Values that a field cannot have; patterns that are no regular expressions."""
    for name in sorted(unfit(config)):
        yield Fault("CF008", f"has {name}={str(config[name])[:60]}, which it cannot be", None, str(config[name])[:60])
    for field, pattern in patterns_of(sane(config)):
        try:
            matches(pattern, "model.layers.0.self_attn.q_proj")
        except TooSlowError as error:
            yield Fault("CF008", f"has {field} with {error}")


def unfit(config: Mapping[str, Any]) -> set[str]:
    """The fields whose values make no sense."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "r": lambda value: isinstance(value, int) and is_positive(value),
        "lora_alpha": is_positive,
        "bias": lambda value: value in ("none", "all", "lora_only"),
        "layers_to_transform": lambda value: isinstance(value, int) or is_list(value, int),
        "init_lora_weights": lambda value: isinstance(value, bool | str),
        "trainable_token_indices": lambda value: value != [],
    }
    kinds |= dict.fromkeys(SWITCHES, lambda value: isinstance(value, bool))
    kinds |= dict.fromkeys(NAMES, lambda value: isinstance(value, str) or is_list(value, str))
    kinds |= dict.fromkeys(("rank_pattern", "alpha_pattern"), is_pattern)
    kinds |= dict.fromkeys(("peft_type", "task_type", "revision"), lambda value: isinstance(value, str))
    needed = ("r", "lora_alpha", "bias")  # null is no value of theirs
    given = {name for name in kinds if name in config and (config[name] is not None or name in needed)}
    return {name for name in given if not kinds[name](config[name])}


def sane(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as far as it makes sense: what has an impossible value is not there, or unknown."""
    bad = unfit(config)
    return {name: value for name, value in config.items() if name not in bad} | dict.fromkeys(bad & {"r"})


def is_list(value: Any, kind: type) -> bool:
    """Whether it is a list of names that are not empty, or of numbers."""
    few = isinstance(value, list) and len(value) <= MOST_NAMES
    return few and all(type(each) is kind and each != "" for each in value)


def is_pattern(value: Any) -> bool:
    """Whether it maps names to numbers above zero."""
    return isinstance(value, dict) and len(value) <= MOST_PATTERNS and all(map(is_positive, value.values()))


def patterns_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every regular expression in it, by its field."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str) and config[name] != "all-linear":
            yield name, config[name]
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(name), dict):
            yield from ((name, pattern) for pattern in config[name])


def gadgets(config: Mapping[str, Any]) -> Iterator[Fault]:
    """Fields that have reached importlib, with anything but what PEFT itself writes there."""
    mapping = config.get("auto_mapping")
    if mapping is not None:
        parent = str(mapping.get("parent_library", "")) if isinstance(mapping, dict) else str(mapping)
        if parent == "__main__":  # PEFT writes this for a model of the trainer's own script
            text = "has auto_mapping with the library '__main__': a model of the trainer's own"
            yield Fault("CF010", text, "auto_mapping", parent)
        elif not parent.startswith(SAFE_PARENTS):
            yield Fault("CF001", f"has auto_mapping with the library {parent[:80]!r}", "auto_mapping", parent[:80])
    core = config.get("megatron_core", "megatron.core")
    if core not in (None, "megatron.core") or config.get("megatron_config") is not None:
        yield Fault(
            "CF001", f"has megatron_core={str(core)[:80]!r} or a megatron_config", "megatron_core", str(core)[:80]
        )
    for name in REMOTE:
        if config.get(name):
            yield Fault("CF001", f"has {name}", name)


def other_base(config: Mapping[str, Any], policy: Policy) -> Iterator[Fault]:
    """The base model that it names, and the revision."""
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if policy.base_model and named != policy.base_model:
        text = f"is for the base {str(named)[:120]!r}, expected {policy.base_model!r}"
        yield Fault("CF002", text, None, str(named)[:120], policy.base_model)
    elif policy.revision and revision != policy.revision:
        text = f"is for the revision {str(revision)[:60]!r}, expected {policy.revision!r}"
        yield Fault("CF002", text, None, str(revision)[:60], policy.revision)
    elif policy.require_revision and not revision:
        yield Fault("CF002", "names no revision of its base, and the policy wants one", None, None, "a revision")


def changes_base(config: Mapping[str, Any]) -> Iterator[Fault]:
    """What acts on the base when it is loaded, or on a condition."""
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in HARMLESS_INITS:
        text = f"has init_lora_weights={str(init)[:40]!r}, which changes the base's weights on load"
        yield Fault("CF004", text, None, str(init)[:40], list(HARMLESS_INITS))
    elif init is False:
        text = "has init_lora_weights=false: targets that the file lacks get random factors that act"
        yield Fault("CF004", text, None, "false", list(HARMLESS_INITS))
    if config.get("kasa_config") is not None:
        yield Fault("CF004", "has a kasa_config: the base's weights are truncated on load", "kasa_config")
    variants = [name for name in VARIANTS if config.get(name) not in (None, False)]
    if variants:
        yield Fault("CF011", f"has {shown(variants)}, with which its factors mean something else", None, variants)
    for name, what in CONDITIONS.items():
        if config.get(name):
            yield Fault("CF005", f"has {name}: {what}", name, str(config[name])[:80])


def check_scaling(config: Mapping[str, Any], scalings: Mapping[str, float], policy: Policy) -> Iterator[Fault]:
    """How much the product of each module's factors is multiplied by; one finding, of the largest."""
    if not scalings:
        return
    module = max(scalings, key=lambda name: scalings[name])
    most = policy.thresholds.scaling
    if scalings[module] > most:
        how = f"lora_alpha={str(config.get('lora_alpha'))[:20]}" + (
            ", alpha_pattern" if config.get("alpha_pattern") else ""
        )
        yield Fault(
            "CF003", f"multiplies {module[:120]} by {scalings[module]:g} ({how})", module, scalings[module], most
        )


def other_configuration(config: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Fault]:
    """In what it departs from the global adapter's, besides what does not matter to what the tensors mean."""
    keys = (config.keys() | expected.keys()) - PASSING
    differs = sorted(key for key in keys if plain(key, config.get(key)) != plain(key, expected.get(key)))
    if differs:
        first = differs[0]
        told = f"{first[:60]} is {str(config.get(first))[:60]}, expected {str(expected.get(first))[:60]}"
        yield Fault("CF007", f"differs from the global adapter's: {told}{and_more(differs)}", None, differs[:20])


def plain(field: str, value: Any) -> Any:
    """Without order and repetitions where they mean nothing (PEFT repeats names as it loads and saves again)."""
    if isinstance(value, list):
        return sorted(set(map(str, value))) or None
    if value == {} and field not in DICTIONARIES:
        return value
    return value or None


def shown(names: list[str]) -> str:
    """A few of them."""
    return ", ".join(repr(name[:40]) for name in names[:4]) + and_more(names[3:])
