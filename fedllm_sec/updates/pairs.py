"""LoRA pairs: which tensors of an adapter are factors B and A of one product, and how PEFT scales it.

`(B, A)` and `(BR⁻¹, RA)` are the same update: what is done with the factors depends on that choice, what is done with
the products does not.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.layout import Layout, Pair
from fedllm_sec.updates.patterns import matching

FACTOR = re.compile(r"\.lora_(embedding_)?A(?=\.|$)(?!\.bias$)")


def product_layout(factors: Layout, config: Mapping[str, Any] | None) -> Layout:
    """The columns of the product space: each LoRA pair becomes a (d_out, d_in) tensor, all other tensors stay.

    Args:
        factors: the layout of an adapter file.
        config: its adapter configuration, for the scaling; without one the scaling is 1.

    Raises:
        InputError: if there is no pair, a factor lacks its other half, or the adapter is not bilinear (DoRA, LoRA of
            convolutions).
    """
    if config and (config.get("use_dora") or config.get("peft_type", "LORA") != "LORA"):
        kind = "DoRA" if config.get("use_dora") else config["peft_type"]
        raise InputError(f"an adapter of the kind {kind} is no sum of products B A; use space='factors'")
    shapes = dict(factors.shapes)
    pairs = []
    for a in [name for name in shapes if FACTOR.search(name)]:
        b = FACTOR.sub(lambda found: found[0][:-1] + "B", a)
        if b not in shapes:
            raise InputError(f"tensor {a!r} has no partner {b!r}")
        (rank, d_in), (d_out, other) = two_dimensional(a, shapes[a]), two_dimensional(b, shapes[b])
        if rank != other:
            raise InputError(f"tensors {a!r} and {b!r} are of rank {rank} and {other}")
        name = FACTOR.sub(lambda found: found[0][:-1] + "BA", a)
        pairs.append(Pair(name, a, b, d_out, d_in, rank, scaling(config, a, rank)))
    if not pairs:
        raise InputError("there is no LoRA pair in it; use space='factors'")
    factor_names = {name for pair in pairs for name in (pair.a, pair.b)}
    kept = {name: shape for name, shape in shapes.items() if name not in factor_names}
    for name in kept:
        if ".lora_" in name and not name.endswith(".lora_B.bias"):
            partner = re.search(r"\.lora_(embedding_)?B(\.|$)", name)
            why = "has no partner lora_A" if partner else "is no factor of a product B A; use space='factors'"
            raise InputError(f"tensor {name!r} {why}")
    return Layout.of({**kept, **{pair.name: (pair.d_out, pair.d_in) for pair in pairs}}, pairs)


def two_dimensional(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The two sizes of a factor; raise InputError if it has not two."""
    if len(shape) != 2:
        raise InputError(f"tensor {name!r} has shape {list(shape)}: only matrices have products; use space='factors'")
    return shape[0], shape[1]


def scaling(config: Mapping[str, Any] | None, factor: str, rank: int) -> float:
    """What PEFT multiplies B A by: alpha / r, or alpha / sqrt(r) with rsLoRA, with alpha by pattern.

    Raises:
        InputError: if the configuration does not say so in a way that can be read, or says zero.
    """
    if not config:
        return 1.0
    module = re.sub(r"^base_model\.model\.", "", FACTOR.split(factor)[0])
    try:
        patterns = dict(config.get("alpha_pattern") or {})
        key = matching(patterns, module)
        alpha = float(config.get("lora_alpha", rank) if key is None else patterns[key])
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"adapter_config.json: lora_alpha and alpha_pattern cannot be read ({error})") from None
    if not (alpha != 0 and math.isfinite(alpha)):
        raise InputError(f"adapter_config.json: with lora_alpha={alpha:g} for {module} every product is the same")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
