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
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from fedllm_sec.tasks.tiny_world import articles

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TinyBaseSettings:
    """Everything the base depends on besides the corpus and the libraries."""

    vocabulary: int = 1_024
    context: int = 256
    hidden: int = 192
    layers: int = 4
    heads: int = 3
    rotary_share: float = 0.5
    train_articles: int = 9_000
    held_out_articles: int = 120
    tokenizer_articles: int = 2_000
    steps: int = 330
    warmup_steps: int = 25
    batch: int = 8
    matrix_rate: float = 0.02
    other_rate: float = 0.004
    workers: int = 2
    seed: int = 20_240


SETTINGS = TinyBaseSettings()


class _Muon:
    """Momentum with orthogonalised updates (Newton-Schulz, in float32) for the matrices inside the blocks.

    At this size it reaches a given loss in roughly half of AdamW's tokens. ``torch.optim.Muon`` iterates in bfloat16,
    which many processors only emulate.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.matrices = matrices
        self.momentum = momentum
        self.averages = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float, pool: ThreadPoolExecutor) -> None:
        """Move every matrix by its orthogonalised gradient average."""
        list(pool.map(lambda pair: self._move(*pair, rate), zip(self.matrices, self.averages, strict=True)))

    @torch.no_grad()
    def _move(self, matrix: nn.Parameter, average: Tensor, rate: float) -> None:
        average.lerp_(matrix.grad, 1 - self.momentum)
        update = _orthogonalise(matrix.grad.lerp(average, self.momentum))
        matrix.add_(update, alpha=-rate * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))


def _orthogonalise(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Bring the singular values of ``matrix`` near one by the quintic Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if tall else x


def tiny_base_fingerprint() -> str:
    """Name the base that :func:`build_tiny_base` would write here: world, settings, libraries and processor kind."""
    parts = [
        json.dumps(asdict(SETTINGS), sort_keys=True),
        *articles(400, seed=SETTINGS.seed),
        torch.__version__, transformers.__version__, tokenizers.__version__, platform.machine(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_tiny_base(folder: Path, *, on_step: Callable[[int, int, float], None] | None = None) -> None:
    """Train the tokenizer and the model and save both in ``folder``, with a ``training.json`` about the training.

    ``on_step`` hears of every step: its number from one, the number of steps, and the step's loss in nats per token.
    """
    settings = SETTINGS
    train_texts = articles(settings.train_articles, seed=settings.seed)
    held_out_texts = articles(settings.held_out_articles, seed=settings.seed + 1)
    tokenizer = _train_tokenizer(train_texts[: settings.tokenizer_articles], settings)
    train_rows = _pack(tokenizer, train_texts, settings.context)
    held_out_rows = _pack(tokenizer, held_out_texts, settings.context)
    with _own_torch_state(settings.seed):
        model = GPTNeoXForCausalLM(_model_config(settings, tokenizer.eos_token_id))
        _train(model, train_rows, settings, on_step)
        held_out_loss = _mean_loss(model, held_out_rows)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    report = {
        "weights": model.num_parameters(),
        "tokens_seen": settings.steps * settings.batch * settings.context,
        "held_out_loss": held_out_loss,
        "held_out_unigram_entropy": _unigram_entropy(held_out_rows),
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
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=settings.context,
    )


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
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": settings.rotary_share,
        },
        bos_token_id=end_token,
        eos_token_id=end_token,
        pad_token_id=end_token,
        use_cache=False,
    )


def _train(
    model: GPTNeoXForCausalLM,
    rows: Tensor,
    settings: TinyBaseSettings,
    on_step: Callable[[int, int, float], None] | None,
) -> None:
    """Train ``model`` once over ``rows`` (or as far as the steps go), each worker taking its share of every batch."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    muon, adamw = _Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
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
            muon.step(settings.matrix_rate * pace, pool)
            for replica in replicas:
                replica.zero_grad(set_to_none=True)
            if on_step is not None:
                on_step(step + 1, settings.steps, sum(losses) / len(losses))


def _sharing_copy(model: GPTNeoXForCausalLM) -> GPTNeoXForCausalLM:
    """Copy ``model`` so that the copy reads the same weights but gathers gradients of its own."""
    replica = copy.deepcopy(model).train()
    for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    return replica


def _backward(replica: GPTNeoXForCausalLM, rows: Tensor) -> float:
    loss = replica(rows, labels=rows).loss
    loss.backward()
    return loss.item()


def _add_up_gradients(replicas: list[GPTNeoXForCausalLM]) -> None:
    """Average the replicas' gradients into the first one's, in a fixed order, and clip their norm."""
    first, *rest = (list(replica.parameters()) for replica in replicas)
    for index, weight in enumerate(first):
        for other in rest:
            weight.grad.add_(other[index].grad)
        weight.grad.div_(len(replicas))
    nn.utils.clip_grad_norm_(first, 1.0)


@torch.no_grad()
def _mean_loss(model: GPTNeoXForCausalLM, rows: Tensor) -> float:
    model.eval()
    losses = [model(part, labels=part).loss.item() * len(part) for part in rows.split(8)]
    return sum(losses) / len(rows)


def _unigram_entropy(rows: Tensor) -> float:
    """Entropy of the token frequencies of ``rows``, in nats per token: what a model blind to order would pay."""
    shares = torch.bincount(rows.flatten()).double() / rows.numel()
    return -torch.special.xlogy(shares, shares).sum().item()
