"""The embedded base model: a tiny but real GPT-NeoX, trained here, from text generated here.

It stands in for Pythia where there is no network, no hub and no GPU. `build_tiny_base` trains a byte-level BPE
tokenizer and a causal language model on `fedllm_sec.tasks.tiny_world.articles` in about a minute on two cores, and
leaves a folder that `AutoTokenizer` and `AutoModelForCausalLM` load. The same machine writes the same bytes every
time; `tiny_base_fingerprint` names what they depend on, for a cache folder's name.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from fedllm_sec.tasks.tiny_world import articles

END_OF_TEXT = "<|endoftext|>"
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TinyBaseSettings:
    """Everything that the base depends on besides the corpus and the libraries."""

    vocabulary: int = 1024
    context: int = 256
    hidden: int = 192
    layers: int = 4
    heads: int = 3
    train_articles: int = 7000
    held_out_articles: int = 120
    tokenizer_articles: int = 2000
    steps: int = 300
    warmup_steps: int = 25
    batch: int = 8
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    threads: int = 2  # the bytes depend on it, and on nothing else that a machine may vary
    seed: int = 20240


SETTINGS = TinyBaseSettings()


def tiny_base_fingerprint() -> str:
    """Name the base that `build_tiny_base` would write here: world, settings, libraries and processor."""
    machine = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    versions = [torch.__version__, transformers.__version__, tokenizers.__version__]
    parts = [json.dumps(asdict(SETTINGS), sort_keys=True), *versions, *machine, *articles(400, seed=SETTINGS.seed)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_tiny_base(folder: Path, *, on_step: OnStep | None = None) -> None:
    """Train the tokenizer and the model and save both in `folder`, with a `training.json` about the training.

    Args:
        folder: where to; it exists.
        on_step: hears of every step: its number from 1, the number of steps, and the loss in nats per token.
    """
    settings = SETTINGS
    texts = articles(settings.train_articles, seed=settings.seed)
    tokenizer = train_tokenizer(texts[: settings.tokenizer_articles], settings)
    rows = pack(tokenizer, texts, settings.context)
    held_out = pack(tokenizer, articles(settings.held_out_articles, seed=settings.seed + 1), settings.context)
    with own_torch_state(settings.seed, settings.threads):
        model = GPTNeoXForCausalLM(model_config(settings, tokenizer.eos_token_id))
        train(model, rows, settings, on_step)
        loss = mean_loss(model, held_out)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    report = {
        "weights": model.num_parameters(),
        "tokens_seen": settings.steps * settings.batch * settings.context,
        "held_out_loss": loss,
        "held_out_unigram_entropy": unigram_entropy(held_out),
        "fingerprint": tiny_base_fingerprint(),
        "settings": asdict(settings),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@contextmanager
def own_torch_state(seed: int, number: int) -> Iterator[None]:
    """A seed and a number of threads of our own inside the block; afterwards all is as before."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train_tokenizer(texts: list[str], settings: TinyBaseSettings) -> Any:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=settings.context, **ends)


def pack(tokenizer: Any, texts: list[str], context: int) -> Tensor:
    """Join the texts, each closed by the end token, and cut the stream into (rows, context) tokens."""
    encoded = tokenizer(texts, verbose=False).input_ids
    stream = [token for ids in encoded for token in [*ids, tokenizer.eos_token_id]]
    rows = len(stream) // context
    return torch.tensor(stream[: rows * context]).view(rows, context)


def model_config(settings: TinyBaseSettings, end_token: int) -> Any:
    """Pythia's architecture, small."""
    return GPTNeoXConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        bos_token_id=end_token,
        eos_token_id=end_token,
    )


def train(model: Any, rows: Tensor, settings: TinyBaseSettings, on_step: OnStep | None) -> None:
    """One pass of AdamW with a linear warm-up and decay."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    model.train()
    for step in range(settings.steps):
        batch = rows[torch.arange(step * settings.batch, (step + 1) * settings.batch) % len(rows)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step + 1, settings.steps, loss.item())


@torch.no_grad()
def mean_loss(model: Any, rows: Tensor) -> float:
    """Loss on rows of one length, nats per token."""
    model.eval()
    losses = [float(model(part, labels=part).loss) * len(part) for part in torch.split(rows, 8)]
    return sum(losses) / len(rows)


def unigram_entropy(rows: Tensor) -> float:
    """Entropy of the token frequencies, nats per token: what a model blind to order would pay."""
    shares = torch.bincount(rows.flatten()).double() / rows.numel()
    return float(-torch.special.xlogy(shares, shares).sum())
