"""Trained embeddings: which of their rows changed, and whether these are the tokens that were read."""

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.dictionary import Checkpoint
from fedllm_sec.attacks.reconstruction.lenses import ROUNDING
from fedllm_sec.attacks.reconstruction.reading import Sent
from fedllm_sec.updates.layout import Layout
from fedllm_sec.victim import Victim

CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", "QUESTION_ANS")  # PEFT's tasks without a head of words
HEADS = ("lm_head.weight", "embed_out.weight", "decoder.weight")  # of words, where a checkpoint has its own


def may_be_tied(sent: Sent, checkpoint: Checkpoint, victim: Victim) -> bool:
    """Whether a head of words may share the embeddings, of which training then changes many a row that was not read."""
    task = (victim.adapter or {}).get("task_type")
    classifies = any("classifier" in name or ".score." in name for name in sent.rows.layout.sizes)
    own = any(name.endswith(HEADS) for name in checkpoint.files)
    return not (task in CLASSIFYING or classifies or own)


def changed(sent: Sent, name: str, width: int, victim: Victim) -> Tensor:
    """(V,) float64: by how much each row of a table changed, squared, besides weight decay; one streamed pass."""
    part = Layout(((name, dict(sent.rows.layout.shapes)[name]),))
    energy = torch.zeros(part.columns // width, dtype=torch.float64)
    decayed = 1 - (1 - victim.learning_rate * victim.weight_decay) ** victim.steps
    both = sent.rows.rows([sent.row]).concat(sent.threat.reference)
    for span, (change, base) in both.blocks(part):
        decay = decayed * base.double()
        values = change.double() + decay
        values[values.abs() < 2 * ROUNDING * base.double().abs()] = 0
        energy.index_add_(0, torch.arange(span.start, span.stop) // width, values.square().cpu())
    return energy
