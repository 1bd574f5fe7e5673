"""Where an architecture keeps what its first layer reads: embeddings, the norm before it, and who reads them.

The first layer's input is a function of the token, and of its position where positions are added: nothing that is
trained under LoRA comes before it. So it is the same in every client and in every step, and can be listed beforehand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm_sec.updates.errors import InputError


@dataclass(frozen=True)
class Family:
    """Names are those of a checkpoint, without the prefix of the model's head (`bert.`, `model.`, ...).

    Attributes:
        words: the token embeddings, (V, d).
        norm: what is applied to them before anybody reads them; a weight, and a bias where it is LayerNorm.
        readers: modules that read it, a regular expression for the whole name.
        positions: position embeddings that are added to the words'; None: positions come later (rotary).
        types: segment embeddings that are added as well.
        kind: LayerNorm, or RMSNorm.
        shift: what is added to RMSNorm's weight (Gemma: 1).
        grown: whether embeddings are multiplied by the root of their width first (Gemma).
        eps: the configuration's field with the norm's epsilon, or its value.
        skipped: positions that are never used, at the start of the table.
        causal: whether a token sees those before it only; then nobody reads the last one.
        blocks: names of the model's layers, before their number.
    """

    words: str
    norm: str
    readers: str
    blocks: str
    positions: str | None = None
    types: str | None = None
    kind: Literal["layer", "rms"] = "layer"
    shift: float = 0.0
    grown: bool = False
    eps: str | float = 1e-5
    skipped: int = 0
    causal: bool = True

    def reads(self, module: str) -> bool:
        """Whether a module, by its full name, reads the first layer's input."""
        return re.search(rf"(^|\.){self.readers}$", module) is not None


BERT = Family(
    words="embeddings.word_embeddings.weight",
    positions="embeddings.position_embeddings.weight",
    types="embeddings.token_type_embeddings.weight",
    norm="embeddings.LayerNorm",
    readers=r"encoder\.layer\.0\.attention\.self\.(query|key|value)",
    blocks="encoder.layer",
    eps="layer_norm_eps",
    causal=False,
)
ROBERTA = Family(**{**vars(BERT), "skipped": 2})  # padding is token 1: positions begin behind it
DISTILBERT = Family(
    words="embeddings.word_embeddings.weight",
    positions="embeddings.position_embeddings.weight",
    norm="embeddings.LayerNorm",
    readers=r"transformer\.layer\.0\.attention\.(q|k|v)_lin",
    blocks="transformer.layer",
    eps=1e-12,
    causal=False,
)
GPT2 = Family(
    words="wte.weight",
    positions="wpe.weight",
    norm="h.0.ln_1",
    readers=r"h\.0\.attn\.c_attn",
    blocks="h",
    eps="layer_norm_epsilon",
)
NEOX = Family(
    words="embed_in.weight",
    norm="layers.0.input_layernorm",
    readers=r"layers\.0\.attention\.query_key_value",
    blocks="layers",
    eps="layer_norm_eps",
)
LLAMA = Family(
    words="embed_tokens.weight",
    norm="layers.0.input_layernorm",
    readers=r"layers\.0\.self_attn\.(q|k|v)_proj",
    blocks="layers",
    kind="rms",
    eps="rms_norm_eps",
)
GEMMA = Family(**{**vars(LLAMA), "shift": 1.0, "grown": True})
FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "gemma": GEMMA,
}


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a model's `config.json`.

    Raises:
        InputError: for an architecture that is not listed here, or one in a form whose first layer reads otherwise.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"{where}: what the first layer of a {kind!r} reads is not known here; known: {known}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{where}: position_embedding_type={config['position_embedding_type']!r} is not known here")
    return FAMILIES[kind]


def epsilon(family: Family, config: Mapping[str, Any]) -> float:
    """The norm's epsilon."""
    return float(config.get(family.eps, 1e-5)) if isinstance(family.eps, str) else family.eps
