"""What a tensor of an adapter file is, by its name: a part of LoRA, or something that PEFT would load over the base.

PEFT (0.21) loads an adapter with `load_state_dict(strict=False)` on the whole model: a key that names a weight of the
base overwrites that weight without a word, survives a merge, and is gone when the adapter is saved again.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

PREFIX = "base_model.model."
WHOLE_HEADS = (  # modules that a model which classifies or scores has, and the base has not
    "classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "pooler", "summary", "v_head",
)  # fmt: skip
Kind = Literal["A", "B", "magnitude", "lora_bias", "tokens", "whole", "bias", "strange"]

INNER = ("original_module", "modules_to_save", "base_layer")  # PEFT's own names inside a model
PARTS: tuple[tuple[Kind, str], ...] = (
    ("A", r"\.lora_A\.weight"),
    ("A", r"\.lora_embedding_A"),
    ("B", r"\.lora_B\.weight"),
    ("B", r"\.lora_embedding_B"),
    ("lora_bias", r"\.lora_B\.bias"),
    ("magnitude", r"\.lora_magnitude_vector"),
    ("tokens", r"(\.token_adapter)?\.trainable_tokens_delta"),
)
FORMS = tuple((kind, re.compile(rf"(?:base_model\.model\.)?(.+?){ending}")) for kind, ending in PARTS)


def classify(name: str, config: Mapping[str, Any]) -> tuple[Kind, str]:
    """What a tensor is, and the module that it belongs to.

    Args:
        name: in the file.
        config: the adapter's: it says which modules are saved whole (`modules_to_save`).
    """
    for kind, form in FORMS:
        if found := form.fullmatch(name):
            return kind, found[1]
    if not name.startswith(PREFIX):
        return "strange", name
    module, _, last = name.removeprefix(PREFIX).rpartition(".")
    if any(part in INNER for part in module.split(".")) and not (last == "bias" and module.endswith(".base_layer")):
        return "strange", module
    saved = config.get("modules_to_save")
    if isinstance(saved, list) and any(isinstance(each, str) and each and is_within(module, each) for each in saved):
        return "whole", module
    return ("bias" if last == "bias" and config.get("bias", "none") != "none" else "strange"), module


def is_within(module: str, saved: str) -> bool:
    """Whether a module is one that modules_to_save names, or lies in it: PEFT compares the ends of whole names."""
    parts = module.split(".")
    return any(".".join(parts[:length]).endswith(saved) for length in range(1, len(parts) + 1))


def is_bias_of(module: str, adapted: Collection[str], bias: str) -> bool:
    """Whether a bias is one that the adapter may train: with `lora_only` it must be an adapted module's."""
    return bias == "all" or module.removesuffix(".base_layer") in adapted


def smuggled(names: Iterable[str], config: Mapping[str, Any] | None) -> list[str]:
    """The tensors of an adapter file that are no part of an adapter; none where it is no adapter's.

    Args:
        names: of all tensors.
        config: the adapter's configuration, which says what else than the head of a model that classifies is saved
            whole; None: it has none.
    """
    every = sorted(names)
    if not any(".lora_" in name or name.startswith(PREFIX) for name in every):
        return []  # a whole model's, or what is not LoRA: there is nothing that it could be smuggled into
    declared = (config or {}).get("modules_to_save")
    saved = [*WHOLE_HEADS, *(declared if isinstance(declared, list) else [])]
    known = {**(config or {}), "modules_to_save": saved}
    kinds = {name: classify(name, known) for name in every}
    adapted = {module for kind, module in kinds.values() if kind in ("A", "B")}
    bias = str(known.get("bias", "none"))
    return [
        name
        for name, (kind, module) in kinds.items()
        if kind == "strange" or (kind == "bias" and not is_bias_of(module, adapted, bias))
    ]
