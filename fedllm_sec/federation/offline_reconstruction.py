"""What one client's adapter reveals to whoever receives it: reconstruction from files, without a federation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fedllm_sec.attacks.reconstruction.embeddings import CLASSIFYING
from fedllm_sec.attacks.reconstruction.families import family_of
from fedllm_sec.attacks.reconstruction.judge import judge_text, visible_prefix
from fedllm_sec.attacks.reconstruction.optimizer import Guess, guesses
from fedllm_sec.attacks.reconstruction.revealed import Revealed, RevealedLabels, RevealedText
from fedllm_sec.core import Round, Threat
from fedllm_sec.federation.curious import told
from fedllm_sec.registry import attack
from fedllm_sec.reports.reconstruction import Decode, reconstruction_page
from fedllm_sec.settings import ModelSettings
from fedllm_sec.training.prepare import prepare_base
from fedllm_sec.updates.adapters import adapter_config
from fedllm_sec.updates.admit import open_updates
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json, write_text
from fedllm_sec.victim import Victim

READ = ("*.safetensors", "*.json", "*.txt", "*.model")  # of a model on the hub: no pickle, no code
LISTED = 60  # tokens that are printed


@dataclass(frozen=True)
class Told:
    """How the client trained, as far as the user says.

    Attributes:
        optimizer: None: it is guessed from the update's values, and so are the others then.
        learning_rate: None: as the optimizer is.
        steps: optimizer steps; None likewise.
        batch_size: examples in a step.
        weight_decay: the optimizer's.
    """

    optimizer: str | None = None
    learning_rate: float | None = None
    steps: int | None = None
    batch_size: int = 1
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Reconstruction:
    """What was found, and what it is compared with.

    Attributes:
        found: by the attack.
        assumed: how the client trained, in a line.
        decode: from tokens to text; None: there is no tokenizer.
        truth: token ids of the texts trained on, as far as an update can tell of them; none: not given.
    """

    found: Revealed
    assumed: str
    decode: Decode | None
    truth: tuple[tuple[int, ...], ...]

    @property
    def metrics(self) -> dict[str, float]:
        """How it compares with the truth; none without one."""
        return judge_text(self.found, self.truth) if self.truth and isinstance(self.found, RevealedText) else {}

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        result = {**told(self.found), "assumed": self.assumed, "seconds": round(self.found.seconds, 3)}
        if self.decode is not None and isinstance(self.found, RevealedText):
            for token in result["tokens"]:
                token["text"] = self.decode([token["id"]])
            result["texts"] = [self.decode(ids) for ids in self.found.sentences]
        return result | ({"metrics": self.metrics} if self.truth else {})

    def page(self) -> str:
        """For people: one self-contained HTML page."""
        return reconstruction_page(self.found, self.decode, self.truth, self.metrics)


def reconstruct_adapter(
    client: Path,
    reference: Path,
    base: str | None,
    name: str,
    parameters: Mapping[str, Any],
    how: Told,
    *,
    truth: Path | None = None,
    memory: str = "1GiB",
    seed: int = 0,
) -> Reconstruction:
    """Run a reconstruction attack on one client's adapter.

    Args:
        client: its PEFT adapter folder, or a safetensors file.
        reference: the adapter that it started from.
        base: folder, GGUF file or hub id of the base model; None: for attacks that need none.
        name: of the attack.
        parameters: its own.
        how: the client trained.
        truth: a file of the texts that it trained on, to compare with: `.txt` a text a line, `.json` or `.jsonl` texts,
            lists of token ids, or objects with a `text`.
        memory: for blocks of the update and for the atoms of the base's vocabulary.
        seed: of what the attack draws.

    Raises:
        InputError: for an unknown attack or one that reveals nothing, an adapter that does not pass the gate, a base
            that cannot be read; all before any work.
    """
    method = attack.build(name, parameters)
    if method.reconstruct_data is None:
        raise InputError(f"{name} reconstructs nothing; methods that do: {', '.join(reconstructing())}")
    rows = open_updates([client], reference=reference, memory=memory)
    weights = open_updates([reference], memory=memory)
    folder = None if base is None else base_folder(base)
    tokenizer = None if folder is None else tokenizer_of(folder)
    config = adapter_config(reference) if reference.is_dir() else None
    classifies = (config or {}).get("task_type") in CLASSIFYING
    texts = () if truth is None else read_truth(truth, tokenizer, folder, classifies=classifies)
    tried: list[Reconstruction] = []
    for guess in guesses(rows, how.optimizer, how.learning_rate, how.steps):
        victim = victim_of(guess, how, folder, config)
        (found,) = method.reconstruct_data(rows, Threat(Round(seed=seed), (), (0,), weights, "all", 1, victim=victim))
        tried.append(Reconstruction(found, str(guess), tokenizer and tokenizer.decode, texts))
        if found.certain:
            break
    return max(tried, key=lambda each: each.found.certificate)


def reconstructing() -> list[str]:
    """The names of attacks that reveal something."""
    return [entry.name for entry in attack if attack.build(entry.name, {}).reconstruct_data is not None]


def victim_of(guess: Guess, how: Told, folder: Path | None, config: Mapping[str, Any] | None) -> Victim:
    """What the attack is told."""
    return Victim(
        learning_rate=guess.learning_rate,
        steps=guess.steps,
        batch_size=how.batch_size,
        optimizer=guess.optimizer,
        weight_decay=how.weight_decay,
        base=folder,
        adapter=config,
    )


def base_folder(base: str) -> Path:
    """The folder of a base model: a local one, one made of a GGUF file, or one fetched from the hub.

    Raises:
        InputError: if it cannot be had.
    """
    prepared = Path(prepare_base(ModelSettings(path=base)))
    if prepared.is_dir():
        return prepared
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=list(READ)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--base {base}: no such folder, and not to be had from the hub ({reason})") from None


def tokenizer_of(folder: Path) -> Any:
    """The base's tokenizer; None where its folder has none that can be read: tokens are then numbers."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception:  # whatever transformers makes of somebody else's files
        return None


def read_truth(
    path: Path, tokenizer: Any, folder: Path | None, *, classifies: bool = False
) -> tuple[tuple[int, ...], ...]:
    """The texts that were trained on, as far as an update can tell of them; a classifier reads all of them.

    Raises:
        InputError: if they cannot be read, or there is nothing to tokenise them with.
    """
    if folder is None:
        raise InputError(f"--truth {path}: texts are compared as tokens of the base model; give --base")
    texts = [each["text"] if isinstance(each, dict) and "text" in each else each for each in read_texts(path)]
    causal = family_of(read_json(folder / "config.json"), folder).causal and not classifies
    result = []
    for text in texts:
        if isinstance(text, list) and text and all(type(token) is int for token in text):
            result.append(visible_prefix(text, causal))
        elif not isinstance(text, str):
            raise InputError(f"{path}: holds {str(text)[:60]!r}, which is neither a text nor a list of token ids")
        elif tokenizer is None:
            raise InputError(f"{path}: {folder} has no tokenizer for its texts; give lists of token ids")
        else:
            result.append(visible_prefix(tokenizer(text)["input_ids"], causal))
    if not result:
        raise InputError(f"{path}: holds no text")
    return tuple(result)


def read_texts(path: Path) -> Sequence[Any]:
    """What a file holds, line by line or as JSON.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        if path.suffix == ".json":
            whole = read_json(path)
            return whole if isinstance(whole, list) else [whole]
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as texts ({error})") from None


def write_page(result: Reconstruction, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_text(path, result.page())


def reconstruction_table(result: Reconstruction) -> Table:
    """For people: what was found, the surest first, and whether it is right where that is known."""
    found = result.found
    sure = "certain" if found.certain else "not certain"
    caption = f"{found.why}; {result.assumed}; certificate {found.certificate:.3f}, {sure}; {found.seconds:.1f} s"
    if measured := result.metrics:
        caption += "\n" + ", ".join(f"{name} {value:.3g}" for name, value in measured.items())
    table = Table(title=escape(f"what {found.client} reveals ({found.method})"), caption=escape(caption))
    if isinstance(found, RevealedText):
        fill_tokens(table, found, result)
    elif isinstance(found, RevealedLabels):
        table.add_column("class")
        table.add_column("examples", justify="right")
        for place, label in enumerate(found.present):
            table.add_row(str(label), "" if found.counts is None else str(found.counts[place]))
    return table


def fill_tokens(table: Table, found: RevealedText, result: Reconstruction) -> None:
    """Sentences first, then tokens; of many the surest."""
    known = {token for text in result.truth for token in text}
    decode = result.decode or (lambda ids: " ".join(map(str, ids)))
    for column in ("found", "score", "weight", *(["trained on"] if known else [])):
        table.add_column(column, justify="left" if column == "found" else "right")
    for ids in found.sentences:
        right = ["yes" if ids in result.truth else "[red]no[/red]"] if known else []
        table.add_row(escape(decode(list(ids))), "", "", *right)
    for token in found.tokens[:LISTED]:
        right = ["yes" if token.id in known else "[red]no[/red]"] if known else []
        table.add_row(escape(repr(decode([token.id]))), f"{token.score:.3f}", f"{token.weight:.3f}", *right)
    if rest := len(found.tokens) - LISTED:
        table.add_row(f"... and {rest} more (--json, --html)", "", "", *([""] if known else [])) if rest > 0 else None
