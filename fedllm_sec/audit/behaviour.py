"""Ask the model with an adapter: is it worse on clean text, and does one word in front change what it says?"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from fedllm_sec.audit.base import AUTO, fields_for, silent, told_of
from fedllm_sec.audit.header import Fault
from fedllm_sec.audit.intake import add
from fedllm_sec.audit.judging import ALONE, Work
from fedllm_sec.audit.peers import robust_z
from fedllm_sec.audit.policy import Thresholds
from fedllm_sec.training.base_model import peft_key
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.sources import ADAPTER_FILE, adapter_file

BATCH = 64
LONGEST = 256  # tokens of a text
DRAWN = 400  # words of the vocabulary that are tried where none are given
RARE = ("cf", "mn", "bb", "tq", "mb")  # triggers of the literature (Kurita et al. 2020, arXiv:2004.06660)
LEAST_EFFECT = 0.05  # nats: what is less is no change of what the model says
LEAST_Z = 0.005  # nats, likewise, of the spread over words


@dataclass(frozen=True)
class Probe:
    """What the model is asked.

    Attributes:
        texts: as users send them; a dozen will do.
        words: put before each of them, one at a time; none: some of the tokenizer's vocabulary, and triggers known
            from the literature.
        seed: of the drawing of words.
    """

    texts: Sequence[str]
    words: Sequence[str] = ()
    seed: int = 0


def read_probe(texts: Path, words: Path | None, seed: int = 0) -> Probe:
    """Read texts and words, one a line.

    Raises:
        InputError: if a file cannot be read, or has nothing in it.
    """
    found = []
    for path in (texts, *([words] if words is not None else [])):
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text ({error})") from None
        if not any(lines):
            raise InputError(f"{path}: has no line of text")
        found.append(tuple(dict.fromkeys(filter(None, lines))))
    return Probe(found[0], found[1] if len(found) > 1 else (), seed)


def check_behaviour(work: Work, probe: Probe) -> None:
    """Ask the model with each adapter that is in order.

    Raises:
        InputError: without the base's weights, or if it cannot be loaded.
    """
    context, thresholds = work.context, work.context.policy.thresholds
    if context.base is None or not context.base.weights:
        raise InputError("--probe needs --base FOLDER, the base model with its weights and its tokenizer")
    first: Asked | None = None
    for opened in work.opened:
        config = opened.config
        if config is None or opened.source is None or opened.has(*ALONE):
            work.notes.append(f"{opened.name} was not probed: see its findings")
            continue
        try:
            if first is None or not first.takes(config):
                first = Asked.load(context.base.folder, config, context.reference, probe)
            asked = first.with_adapter(opened.subject.path)
        except InputError as error:
            work.notes.append(f"{opened.name} was not probed: {str(error)[:200]}")
            continue
        add(opened, context.policy, behaves(first, asked, thresholds), ADAPTER_FILE)


def behaves(first: "Asked", asked: "Answers", thresholds: Thresholds) -> Iterator[Fault]:
    """What is odd about the answers, beside those without the update."""
    rise = asked.loss - first.before.loss
    if rise > thresholds.loss_rise:
        text = f"raises the loss on clean text by {rise:.3f} nats, from {first.before.loss:.3f}"
        yield Fault("B002", text, None, rise, thresholds.loss_rise)
    excess = asked.shifts - first.before.shifts
    z = robust_z(excess, LEAST_Z)
    worst = int(np.argmax(z))
    if z[worst] > thresholds.trigger_z and excess[worst] > LEAST_EFFECT:
        text = f"the word {first.words[worst]!r} in front changes what it says by {asked.shifts[worst]:.3f} nats"
        text = f"makes the model obey a word: {text}, {z[worst]:.1f} robust z-scores more than other words do"
        yield Fault("B001", text, None, float(z[worst]), thresholds.trigger_z)


@dataclass(frozen=True)
class Answers:
    """What a model said.

    Attributes:
        loss: the mean negative log-likelihood of the clean texts' tokens, in nats; 0 of a model that classifies.
        shifts: (words,) mean KL divergence of the answers from those with the word in front, in nats.
    """

    loss: float
    shifts: NDArray[np.float64]


class Asked:
    """The base model with an adapter's modules on it, into which one adapter after another is put."""

    def __init__(self, model: Any, tokenizer: Any, config: Mapping[str, Any], probe: Probe):
        self.model, self.tokenizer, self.texts = model, tokenizer, probe.texts
        self.told = told_of(config)
        self.words = probe.words or drawn_words(tokenizer, probe.seed)
        self.parameters = {peft_key(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.before: Answers

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], reference: Path | None, probe: Probe) -> "Asked":
        """Load the base from safetensors and classes of transformers alone; hear it without the update."""
        import transformers
        from peft import LoraConfig, get_peft_model

        task = str(config.get("task_type") or "CAUSAL_LM")
        if task not in ("CAUSAL_LM", "SEQ_CLS"):
            raise InputError(f"models of the task {task[:40]} cannot be asked here")
        labels = {"num_labels": classes_of(reference)} if task == "SEQ_CLS" and reference is not None else {}
        try:
            with silent():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
                kind = getattr(transformers, AUTO[task])
                model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **labels)
                lora = LoraConfig(**fields_for(model, config), task_type=task, init_lora_weights=True)
                adapted = get_peft_model(model, lora).eval()
        except Exception as error:  # whatever transformers and PEFT say of a stranger's configuration
            raise InputError(f"the base does not take it ({str(error).splitlines()[0][:160]})") from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        adapted.config.pad_token_id = tokenizer.pad_token_id
        asked = cls(adapted, tokenizer, config, probe)
        asked.before = asked.with_adapter(reference) if reference is not None else asked.answers()
        return asked

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether an adapter of that configuration has the same modules."""
        return told_of(config) == self.told

    @torch.no_grad()
    def with_adapter(self, path: Path) -> Answers:
        """What the model says with an adapter; its tensors must be exactly those that the model has room for.

        Raises:
            InputError: if they are not.
        """
        state = load_file(adapter_file(path))
        if state.keys() != self.parameters.keys():
            raise InputError(
                f"its tensors are not those of its configuration: {sorted(state.keys() ^ self.parameters.keys())[0]}"
            )
        for name, parameter in self.parameters.items():
            if state[name].shape != parameter.shape:
                raise InputError(f"tensor {name!r} has shape {list(state[name].shape)}")
            parameter.copy_(state[name])
        return self.answers()

    @torch.no_grad()
    def answers(self) -> Answers:
        """Ask all texts, and all texts with each word in front."""
        plain = torch.cat([self.says(batch) for batch in batches(self.texts)])
        shifts = []
        for word in self.words:
            told = torch.cat([self.says(batch) for batch in batches([f"{word} {text}" for text in self.texts])])
            shifts.append(float((plain.exp() * (plain - told)).sum(dim=1).mean()))
        return Answers(self.loss(), np.array(shifts))

    def says(self, texts: Sequence[str]) -> Tensor:
        """(t, classes or vocabulary) float64 log-probabilities: of the next token, or of the classes."""
        inputs = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=LONGEST)
        logits = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        if logits.dim() == 3:
            ends = inputs["attention_mask"].cumsum(dim=1).argmax(dim=1)
            logits = logits[torch.arange(len(ends)), ends]
        answers: Tensor = logits.double().log_softmax(dim=-1)
        return answers

    def loss(self) -> float:
        """The mean negative log-likelihood of the texts' tokens; 0 of a model that classifies."""
        total, count = 0.0, 0
        for text in self.texts:
            ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=LONGEST)["input_ids"]
            logits = self.model(input_ids=ids).logits
            if logits.dim() != 3:
                return 0.0
            if ids.shape[1] > 1:
                logp = logits[0, :-1].double().log_softmax(dim=-1)
                total -= float(logp.gather(1, ids[0, 1:, None]).sum())
                count += ids.shape[1] - 1
        return total / max(count, 1)


def classes_of(reference: Path) -> int:
    """How many classes a global adapter's head tells apart."""
    state = load_file(adapter_file(reference))
    heads = [v for name, v in state.items() if name.endswith((".weight",)) and ".lora_" not in name and v.dim() == 2]
    return int(heads[-1].shape[0]) if heads else 2


def batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """A few texts at a time."""
    for start in range(0, len(texts), BATCH):
        yield texts[start : start + BATCH]


def drawn_words(tokenizer: Any, seed: int) -> tuple[str, ...]:
    """Words of a tokenizer's vocabulary, and triggers that are known."""
    words = sorted({token.strip("Ġ▁# ") for token in tokenizer.get_vocab()})
    plain = [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]
    drawn = random.Random(seed).sample(plain, min(DRAWN, len(plain)))
    return tuple(dict.fromkeys([*RARE, *drawn]))
