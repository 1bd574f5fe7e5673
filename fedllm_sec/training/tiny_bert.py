"""The embedded base for texts to classify: a tiny but real BERT, trained here, from posts generated here.

It stands in for BERT where there is no network and no hub. `build_tiny_bert` trains a masked language model
(Devlin et al. 2019, arXiv:1810.04805, section 3.1) on posts of `fedllm_sec.tasks.tiny_posts` that no
client and no test has, in about a minute on two cores, and leaves a folder that `AutoTokenizer` and
`AutoModelForSequenceClassification` load.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from fedllm_sec.tasks.tiny_posts import news
from fedllm_sec.training.tiny_base import own_torch_state

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
IGNORED = -100
MASKED, AS_MASK, AS_OTHER = 0.15, 0.8, 0.1  # of the tokens; of the masked ones [MASK], and another token
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TinyBertSettings:
    """Everything that the base depends on besides the corpus and the libraries."""

    context: int = 128
    hidden: int = 96
    layers: int = 2
    heads: int = 3
    posts: int = 400  # of each subject
    steps: int = 400
    warmup_steps: int = 40
    batch: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    threads: int = 2
    seed: int = 20241


SETTINGS = TinyBertSettings()


def tiny_bert_fingerprint() -> str:
    """Name the base that `build_tiny_bert` would write here: corpus, settings, libraries and processor."""
    machine = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    versions = [torch.__version__, transformers.__version__, tokenizers.__version__]
    parts = [json.dumps(asdict(SETTINGS), sort_keys=True), *versions, *machine, *news("pretraining", 10).texts]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_tiny_bert(folder: Path, *, on_step: OnStep | None = None) -> None:
    """Train the model and save it with its tokenizer in `folder`, with a `training.json` about the training.

    Args:
        folder: where to; it exists.
        on_step: hears of every step: its number from 1, the number of steps, and the loss in nats per masked token.
    """
    settings = SETTINGS
    texts = news("pretraining", settings.posts).texts
    tokenizer = make_tokenizer(texts, settings.context)
    rows = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    with own_torch_state(settings.seed, settings.threads):
        model = BertForMaskedLM(model_config(settings, len(tokenizer)))
        losses = train(model, rows, tokenizer, settings, on_step)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    report = {
        "weights": model.num_parameters(),
        "loss_at_the_end": sum(losses[-20:]) / len(losses[-20:]),
        "fingerprint": tiny_bert_fingerprint(),
        "settings": asdict(settings),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def make_tokenizer(texts: Sequence[str], context: int) -> Any:
    """BERT's tokenizer with the words of some texts; any other word is spelt.

    `tokenizers` can train one, but breaks ties by chance: not the same words every time.
    """
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = sorted({word for text in texts for word in text.lower().split()} - set(letters))
    entries = [*SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters), *words]
    made = tokenizers.BertWordPieceTokenizer({entry: i for i, entry in enumerate(entries)}, lowercase=True)
    return BertTokenizerFast(tokenizer_object=made._tokenizer, do_lower_case=True, model_max_length=context, **SPECIAL)


def model_config(settings: TinyBertSettings, vocabulary: int) -> Any:
    """BERT's architecture, small, without dropout: it sees few texts, and each of them rarely."""
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def train(model: Any, rows: Tensor, tokenizer: Any, settings: TinyBertSettings, on_step: OnStep | None) -> list[float]:
    """AdamW with a linear warm-up and decay, on batches that are drawn and masked anew; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    losses = []
    model.train()
    for step in range(settings.steps):
        batch = rows[torch.randint(len(rows), (settings.batch,))]
        inputs, labels = masked(batch, tokenizer)
        loss = model(inputs, attention_mask=(batch != tokenizer.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, settings.steps, losses[-1])
    return losses


def masked(batch: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """BERT's masking: what the model reads, and what it is to say; both (n, length) int64."""
    special = torch.isin(batch, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(batch.shape) < MASKED) & ~special
    fate = torch.rand(batch.shape)
    inputs = torch.where(chosen & (fate < AS_MASK), tokenizer.mask_token_id, batch)
    other = chosen & (fate >= AS_MASK) & (fate < AS_MASK + AS_OTHER)
    inputs = torch.where(other, torch.randint(len(tokenizer), batch.shape), inputs)
    return inputs, torch.where(chosen, batch, IGNORED)
