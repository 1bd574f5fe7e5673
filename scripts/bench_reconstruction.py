"""How many words of a batch an adapter tells, by batch size, rank, optimizer and steps, on a model that you have.

    python scripts/bench_reconstruction.py BASE TEXTS.txt --batches 8 16 --ranks 2 4 8 --words 12

BASE is the folder (or GGUF file) of a BERT-like model, which gets a fresh head of two classes, or of a causal one;
TEXTS has a text a line. A client trains LoRA on what PEFT chooses for the architecture, from an adapter whose B is
normal with a deviation of 0.02, all texts in every step; then what it would send is read. Prints Markdown.
"""

import argparse
import resource
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedllm_sec.attacks.reconstruction.judge import judge_text, visible_prefix
from fedllm_sec.attacks.reconstruction.revealed import RevealedText
from fedllm_sec.federation.offline_reconstruction import Told, base_folder, reconstruct_adapter
from fedllm_sec.terminal import console


class Case(NamedTuple):
    """One line of the table."""

    batch: int
    rank: int
    optimizer: str
    rate: float
    steps: int
    decay: float

    def __str__(self) -> str:
        decay = f", weight decay {self.decay:g}" if self.decay else ""
        return f"{self.steps} x {self.optimizer}, {self.rate:g}{decay}"


WAYS = [
    ("sgd", 0.1, 1, 0.0),
    ("sgd", 0.1, 5, 0.01),
    ("adamw", 5e-5, 1, 0.0),
    ("adamw", 5e-5, 5, 0.0),
    ("adamw", 3e-4, 5, 0.0),
]
HEAD = "| batch | rank | local training | tokens | recall | precision | certificate | certain | seconds |\n"
HEAD += "| --: | --: | --- | --: | --: | --: | --: | --- | --: |"


def main() -> None:
    """Run all cases and print the table."""
    arguments = parsed()
    base = base_folder(arguments.base)
    lines = [line for line in arguments.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [line for line in lines if len(line.split()) <= arguments.words]
    print(HEAD)
    for case in track(list(cases(arguments)), "reconstructing", console=console, transient=True):
        with tempfile.TemporaryDirectory() as scratch:
            print(row(case, base, texts[: case.batch], Path(scratch), arguments.memory), flush=True)
    print(f"\nPeak memory of the program: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--words", type=int, default=12, help="texts of at most so many")
    parser.add_argument("--memory", default="1GiB")
    return parser.parse_args()


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """All combinations."""
    for batch in arguments.batches:
        for rank in arguments.ranks:
            for way in WAYS:
                yield Case(batch, rank, *way)


def row(case: Case, base: Path, texts: Sequence[str], folder: Path, memory: str) -> str:
    """Train, reconstruct, judge: a line of the table."""
    truth = client(case, base, texts, folder)
    told = Told(case.optimizer, case.rate, case.steps, case.batch, case.decay if case.optimizer == "adamw" else 0.0)
    done = reconstruct_adapter(folder / "client", folder / "global", str(base), "lora_tokens", {}, told, memory=memory)
    found = done.found
    assert isinstance(found, RevealedText)
    measured = judge_text(found, truth)
    distinct = len({token for text in truth for token in text})
    numbers = f"{measured['token_recall']:.3f} | {measured['token_precision']:.3f} | {found.certificate:.4f}"
    sure = "yes" if found.certain else "no"
    return f"| {case.batch} | {case.rank} | {case} | {distinct} | {numbers} | {sure} | {found.seconds:.1f} |"


def client(case: Case, base: Path, texts: Sequence[str], folder: Path) -> list[tuple[int, ...]]:
    """Train a client, save what it received and what it sends, and return what can be seen of its texts."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
    model, causal = adapted(base, case.rank)
    model.save_pretrained(folder / "global")
    parameters = [value for value in model.parameters() if value.requires_grad]
    kind = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(parameters, lr=case.rate, weight_decay=case.decay)
    labels = (
        encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100) if causal else torch.arange(len(texts)) % 2
    )
    model.eval()  # without dropout; docs/leakage.md has it with
    for _ in range(case.steps):
        optimizer.zero_grad()
        model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "client")
    rows = zip(encoded.input_ids, encoded.attention_mask, strict=True)
    return [visible_prefix(ids[mask.bool()].tolist(), causal) for ids, mask in rows]


def adapted(base: Path, rank: int) -> tuple[Any, bool]:
    """The base with an adapter, and whether it is causal."""
    torch.manual_seed(0)
    from transformers import AutoConfig

    causal = AutoConfig.from_pretrained(base).model_type not in ("bert", "roberta", "xlm-roberta", "distilbert")
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = get_peft_model(
        kind.from_pretrained(base, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM" if causal else "SEQ_CLS", r=rank, lora_alpha=2 * rank),
    )
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.02)
    return model, causal


if __name__ == "__main__":
    main()
