"""Clients that fine-tune a real BERT of six layers on SST-2 with LoRA, and send what a row of the table lets them send.

Shapes and dtypes are PEFT's: float32 factors, and the classifier whole.
"""

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedllm_sec import InputError, Round, UpdateSet, stack_updates
from fedllm_sec.randomness import derived_seed
from leakage.rows import Row

LAYERS = ["query", "value"]
B_SPREAD = 0.02  # of the entries of B in an adapter that is not fresh


class Text(NamedTuple):
    """A sentence and its label."""

    sentence: str
    label: int


def sst2(folder: Path, part: str, words: int) -> list[Text]:
    """Sentences of at most so many words.

    Raises:
        InputError: if the file is not there.
    """
    path = folder / f"sst-2_{part}.tsv.gz"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of SST-2 as tab-separated files (--sst2)")
    with gzip.open(path, "rt") as file:
        lines = [line.rstrip("\n").split("\t") for line in list(file)[1:]]
    return [Text(sentence, int(label)) for sentence, label in lines if len(sentence.split()) <= words]


@dataclass(frozen=True)
class Learner:
    """The base with an adapter on it.

    Attributes:
        model: the `PeftModel`; in training mode, where dropout is what the row says.
        tokenizer: its.
        parameters: what is sent, by its name in an adapter file; those that are frozen among them.
    """

    model: Any
    tokenizer: Any
    parameters: Mapping[str, torch.nn.Parameter]

    def encoded(self, texts: Sequence[Text]) -> tuple[Any, Tensor]:
        """A batch, padded to its longest text, and its labels."""
        batch = self.tokenizer([text.sentence for text in texts], padding=True, return_tensors="pt")
        return batch, torch.tensor([text.label for text in texts])

    def state(self) -> dict[str, Tensor]:
        """A copy of what is sent."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite it."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def train(self, batches: Sequence[Sequence[Text]], optimizer: str, rate: float) -> None:
        """One step on each batch."""
        trained = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        made: torch.optim.Optimizer = (
            torch.optim.SGD(trained, lr=rate)
            if optimizer == "sgd"
            else torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        )
        self.model.train()
        for texts in batches:
            batch, labels = self.encoded(texts)
            made.zero_grad()
            self.model(**batch, labels=labels).loss.backward()
            made.step()

    def accuracy(self, texts: Sequence[Text], size: int = 64) -> float:
        """The share of texts with the right label, without dropout."""
        self.model.eval()
        right = 0
        ordered = sorted(texts, key=lambda text: len(text.sentence))
        with torch.no_grad():
            for start in range(0, len(ordered), size):
                batch, labels = self.encoded(ordered[start : start + size])
                right += int((self.model(**batch).logits.argmax(dim=1) == labels).sum())
        return right / len(texts)


def learner(base: Path, row: Row, rank: int, seed: int) -> Learner:
    """A base with an adapter whose values depend on the seed alone; B is zero where the row says fresh."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rates = {"hidden_dropout_prob": row.dropout, "attention_probs_dropout_prob": row.dropout}
    config = LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, lora_dropout=row.lora_dropout, target_modules=LAYERS
    )
    torch.manual_seed(derived_seed("measure_leakage", seed, rank))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32, **rates)
    adapted = get_peft_model(model, config)
    parameters = {
        name.replace("modules_to_save.default.", "").replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    for name, parameter in parameters.items():
        if "lora_B" in name and not row.fresh:
            torch.nn.init.normal_(parameter.data, std=B_SPREAD)
        if "lora_A" in name and row.freeze_a:
            parameter.requires_grad_(False)
    return Learner(adapted, AutoTokenizer.from_pretrained(base), parameters)


def sent(row: Row, trained: Mapping[str, Tensor], received: Mapping[str, Tensor], client: str, at: Round) -> UpdateSet:
    """What a client sends: one row."""
    update = {name: trained[name] - received[name] for name in received}
    return row.send(stack_updates([update], [1.0], [client]), at)


def whole(update: UpdateSet) -> dict[str, Tensor]:
    """The tensors of one row, flat."""
    parts: dict[str, list[Tensor]] = {name: [] for name in update.layout.sizes}
    for span, block in update.blocks():
        parts[span.tensor].append(block[0])
    return {name: torch.cat(each) for name, each in parts.items()}
