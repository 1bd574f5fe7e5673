"""Tokens from B, where A tells nothing: the check of a span, over all pairs of a token and a position.

dB = s Gᵀ X Aᵀ: its rows are combinations of A x, of so many vectors as there are tokens in the batch. Where these are
fewer than the rank, an input x that was there has its A x in the space of the rows, and another has not (DAGER, Petrov
et al. 2024, arXiv:2405.15586, seen through A). Under Adam rows are no such combinations.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEAR = 1e-3  # of the squared length of A x: so much of it may lie beside the space
RANK = 1e-5  # of the largest singular value
CHUNK = 4096


def span_check(
    model: Any, change: Mapping[str, Tensor], received: Mapping[str, Tensor], length: int
) -> dict[int, float]:
    """The tokens whose A x lies in the rows of every B that leaves a direction free, and how near.

    Args:
        model: the base, of which the embeddings are run.
        change: (r, d) and (d_out, r) updates by name.
        received: weights by name.
        length: of the longest text.

    Returns:
        1 - the share beside the space, by token id; none where no B leaves a direction free.
    """
    checks = []
    for name, value in change.items():
        if "encoder.layer.0." not in name or "lora_B" not in name or not value.any():
            continue
        _, values, right = torch.linalg.svd(value.double(), full_matrices=True)
        kept = int((values > RANK * values[0]).sum())
        if kept < value.shape[1]:
            checks.append((received[name.replace("lora_B", "lora_A")].double(), right[kept:]))
    if not checks:
        return {}
    embeddings = model.base_model.model.bert.embeddings.eval()
    vocabulary = embeddings.word_embeddings.num_embeddings
    found: dict[int, float] = {}
    for position in range(length):
        for start in range(0, vocabulary, CHUNK):
            ids = torch.arange(start, min(start + CHUNK, vocabulary))[:, None]
            with torch.no_grad():
                inputs = embeddings(input_ids=ids, position_ids=torch.full_like(ids, position))[:, 0].double()
            beside = torch.zeros(len(ids), dtype=torch.float64)
            for matrix, free in checks:
                seen = inputs @ matrix.T
                beside = torch.maximum(beside, (seen @ free.T).square().sum(dim=1) / seen.square().sum(dim=1))
            for token in (beside < NEAR).nonzero().flatten().tolist():
                found[start + token] = max(found.get(start + token, 0.0), 1 - float(beside[token]))
    return found
