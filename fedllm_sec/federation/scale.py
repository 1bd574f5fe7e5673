"""Which scale of an experiment this machine can run, said out loud."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import torch

from fedllm_sec.config import Config
from fedllm_sec.registry import did_you_mean
from fedllm_sec.settings import EMBEDDED, Scale
from fedllm_sec.updates.errors import InputError

PAPER_GPU_MEMORY = 12 * 2**30  # Pythia-1B in bfloat16 with activations of 8 x 1024 tokens


class Choice(NamedTuple):
    """A scale, and why."""

    scale: str
    reason: str


def choose_scale(tree: Mapping[str, Any]) -> Choice:
    """Take the scale that was asked for, or for `auto` the largest that can run here.

    Args:
        tree: the configuration with what the command line changes.

    Raises:
        InputError: if there is no such scale, or it lacks something; nothing is ever substituted for it.
    """
    asked = tree.get("scale", "auto")
    if asked not in get_args(Scale):
        raise InputError(f"unknown scale {asked!r}{did_you_mean(str(asked), dict.fromkeys(get_args(Scale)))}")
    if branch(tree, "model").get("name") is not None:
        return choose_for_small(asked, branch(tree, "scales"))
    if asked in ("tiny", "laptop"):
        return Choice(asked, "as asked")
    if asked == "paper":
        return Choice("paper", "as asked")
    has_model = branch(tree, "model").get("path", EMBEDDED) != EMBEDDED
    if asked == "local":
        if not has_model:
            raise InputError("scale=local needs model.path=FOLDER_OR_GGUF (and data.train=FILE, data.test=FILE)")
        return Choice("local", "as asked")
    if has_model:
        return Choice("local", "model.path is given")
    paper = branch(tree, "scales", "paper")
    why_not = why_not_paper(branch(paper, "model").get("path", ""), branch(paper, "data"))
    if why_not is None:
        return Choice("paper", "there is a GPU, and model and data can be had")
    return Choice(
        "tiny",
        f"not paper ({why_not}); not local (no model.path=... given). A tiny model, trained here on texts that the "
        "project makes, stands in: the curves show the mechanism, not the paper's figures. For the real thing: "
        "scale=paper on a machine with a GPU, or model.path=... data.train=... data.test=...",
    )


def choose_for_small(asked: str, scales: Mapping[str, Any]) -> Choice:
    """Small models run anywhere: `laptop` unless another scale is asked for, the file as it is where it has none."""
    if asked != "auto":
        return Choice(asked, "as asked")
    if "laptop" in scales:
        return Choice("laptop", "smaller than the papers'; for theirs: scale=paper")
    return Choice("paper", "the file as it is: it has no scales")


def stand_ins(paper: Config, here: Config) -> str:
    """What a smaller scale has in the place of the papers' model, examples, rounds and training; '' if nothing."""
    before, after = leaves(paper.model_dump()), leaves(here.model_dump())
    changed = [key for key in after if key != "scale" and after[key] != before.get(key)]
    return ", ".join(f"{key}={after[key]} for {before.get(key, 'its default')}" for key in changed)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 3}}` -> `{"a.b": 3}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def branch(tree: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """What lies under some keys, where it is a mapping; else an empty one (the schema is checked elsewhere)."""
    for key in keys:
        below = tree.get(key)
        tree = below if isinstance(below, Mapping) else {}
    return tree


def why_not_paper(model: str, data: Mapping[str, Any]) -> str | None:
    """What the paper's scale lacks on this machine, or None."""
    if not torch.cuda.is_available():
        return "no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < PAPER_GPU_MEMORY:
        return f"the GPU has {memory / 2**30:.0f} GiB, {PAPER_GPU_MEMORY / 2**30:.0f} GiB are needed"
    from huggingface_hub import HfApi, try_to_load_from_cache

    names = {str(source).partition(":")[0] for key, source in data.items() if key in ("train", "test")}
    try:
        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            HfApi().model_info(model, timeout=5)
        for name in sorted(names):
            HfApi().dataset_info(name, timeout=5)
    except Exception as error:  # offline, blocked, unknown: the hub's client has many errors, all mean no
        return f"{model} or {', '.join(sorted(names))} is out of reach: {type(error).__name__}"
    return None
