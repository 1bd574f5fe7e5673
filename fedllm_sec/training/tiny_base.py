"""The embedded base model: a tiny but real GPT-NeoX, trained here, from text generated here.

It stands in for Pythia where there is no network, no hub and no GPU. :func:`build_tiny_base` trains a byte-level BPE
tokenizer and a causal language model on :func:`fedllm_sec.tasks.tiny_world.articles` in about a minute on two cores,
and leaves a folder that ``AutoTokenizer`` and ``AutoModelForCausalLM`` load. The same machine writes the same bytes
every time; :func:`tiny_base_fingerprint` names what they depend on, for use in a cache folder's name.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from fedllm_sec.tasks.tiny_world import articles

END_OF_TEXT = "<|endoftext|>"
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TinyBaseSettings:
    """Everything the base depends on besides the corpus and the libraries."""

    vocabulary: int = 1_024
    context: int = 256
    hidden: int = 192
    layers: int = 4
    heads: int = 3
    rotary_share: float = 0.5
    train_articles: int = 7_000
    held_out_articles: int = 120
    tokenizer_articles: int = 2_000
    steps: int = 270
    warmup_steps: int = 25
    batch: int = 8
    matrix_rate: float = 0.02
    other_rate: float = 0.004
    workers: int = 2
    seed: int = 20_240


SETTINGS = TinyBaseSettings()


def tiny_base_fingerprint() -> str:
    """Name the base that :func:`build_tiny_base` would write here: world, settings, libraries and processor kind."""
    versions = [torch.__version__, transformers.__version__, tokenizers.__version__, platform.machine()]
    parts = [json.dumps(asdict(SETTINGS), sort_keys=True), *versions, *articles(400, seed=SETTINGS.seed)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_tiny_base(folder: Path, *, on_step: OnStep | None = None) -> None:
    """Train the tokenizer and the model and save both in ``folder``, with a ``training.json`` about the training.

    ``on_step`` hears of every step: its number from one, the number of steps, and the step's loss in nats per token.
    """
    settings = SETTINGS
    texts = articles(settings.train_articles, seed=settings.seed)
    tokenizer = _train_tokenizer(texts[: settings.tokenizer_articles], settings)
    rows = _pack(tokenizer, texts, settings.context)
    held_out = _pack(tokenizer, articles(settings.held_out_articles, seed=settings.seed + 1), settings.context)
    with _own_torch_state(settings.seed):
        model = GPTNeoXForCausalLM(_model_config(settings, tokenizer.eos_token_id))
        _train(model, rows, settings, on_step)
        loss = _mean_loss(model, held_out)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    report = {
        "weights": model.num_parameters(),
        "tokens_seen": settings.steps * settings.batch * settings.context,
        "held_out_loss": loss,
        "held_out_unigram_entropy": _unigram_entropy(held_out),
        "fingerprint": tiny_base_fingerprint(),
        "settings": asdict(settings),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _own_torch_state(seed: int) -> Iterator[None]:
    """Seed torch and give each thread one core inside the block; put both back as they were after it."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _train_tokenizer(texts: list[str], settings: TinyBaseSettings) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts``."""
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


def _pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int) -> Tensor:
    """Join the texts, each closed by the end token, and cut the stream into rows of ``context`` tokens."""
    encoded = tokenizer(texts, verbose=False).input_ids
    stream = [token for ids in encoded for token in [*ids, tokenizer.eos_token_id]]
    rows = len(stream) // context
    return torch.tensor(stream[: rows * context]).view(rows, context)


def _model_config(settings: TinyBaseSettings, end_token: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": settings.rotary_share},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_token),
    )


def _train(model: GPTNeoXForCausalLM, rows: Tensor, settings: TinyBaseSettings, on_step: OnStep | None) -> None:
    """Train ``model`` on ``rows`` in order, each worker thread taking its fixed share of every batch.

    Whole threads share the work, not torch's own ones, which stall one another on a machine busy with other things.
    """
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    averages = [torch.zeros_like(matrix) for matrix in matrices]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    replicas = [model, *(_sharing_copy(model) for _ in range(settings.workers - 1))]
    model.train()
    with ThreadPoolExecutor(settings.workers) as pool:
        for step in range(settings.steps):
            picked = torch.arange(step * settings.batch, (step + 1) * settings.batch) % len(rows)
            losses = list(pool.map(_backward, replicas, rows[picked].chunk(settings.workers)))
            _add_up_gradients(replicas)
            pace = min(1.0, (step + 1) / settings.warmup_steps) * (1 - step / settings.steps)
            adamw.param_groups[0]["lr"] = settings.other_rate * pace
            adamw.step()
            list(pool.map(_muon, matrices, averages, repeat(settings.matrix_rate * pace)))
            for replica in replicas:
                replica.zero_grad(set_to_none=True)
            if on_step is not None:
                on_step(step + 1, settings.steps, sum(losses) / len(losses))


@torch.no_grad()
def _muon(matrix: nn.Parameter, average: Tensor, rate: float, momentum: float = 0.95) -> None:
    """Take one step of Muon: momentum whose update is made nearly orthogonal by Newton-Schulz rounds.

    It learned this corpus in far fewer tokens than AdamW. ``torch.optim.Muon`` iterates in bfloat16; this is float32.
    """
    assert matrix.grad is not None
    average.lerp_(matrix.grad, 1 - momentum)
    update = matrix.grad.lerp(average, momentum)
    tall = update.shape[0] > update.shape[1]
    x = (update.T if tall else update) / (update.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    stretch = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
    matrix.add_(x.T if tall else x, alpha=-rate * stretch)


def _sharing_copy(model: GPTNeoXForCausalLM) -> GPTNeoXForCausalLM:
    """Copy ``model`` so that the copy reads the same weights but gathers gradients of its own."""
    replica = copy.deepcopy(model).train()
    for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    return replica


def _backward(replica: GPTNeoXForCausalLM, rows: Tensor) -> float:
    loss = replica(rows, labels=rows).loss
    loss.backward()
    return float(loss.item())


def _add_up_gradients(replicas: list[GPTNeoXForCausalLM]) -> None:
    """Average the replicas' gradients into the first one's, in a fixed order, and clip their norm."""
    for weight, *others in zip(*(replica.parameters() for replica in replicas), strict=True):
        for other in others:
            weight.grad.add_(other.grad)
        weight.grad.div_(len(replicas))
    nn.utils.clip_grad_norm_(replicas[0].parameters(), 1.0)


@torch.no_grad()
def _mean_loss(model: GPTNeoXForCausalLM, rows: Tensor) -> float:
    model.eval()
    return sum(float(model(row[None], labels=row[None]).loss.item()) for row in rows) / len(rows)


def _unigram_entropy(rows: Tensor) -> float:
    """Entropy of the token frequencies of ``rows``, in nats per token: what a model blind to order would pay."""
    shares = torch.bincount(rows.flatten()).double() / rows.numel()
    return -float(torch.special.xlogy(shares, shares).sum().item())
