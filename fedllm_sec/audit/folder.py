"""What lies in an adapter's folder: nothing is followed, loaded or run."""

import fnmatch
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fedllm_sec.audit.header import Fault
from fedllm_sec.audit.patterns import hostile_template
from fedllm_sec.audit.pickles import dangers, is_pickle
from fedllm_sec.audit.policy import Policy
from fedllm_sec.updates.sources import ADAPTER_CONFIG, ADAPTER_FILE

DEEPEST = 6  # folders within folders
OWN = (
    ADAPTER_FILE, ADAPTER_CONFIG, "client.json", "decision.json", "update.safetensors", "buffers.safetensors",
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt", ".gitattributes",
    "SHA256SUMS",
)  # fmt: skip
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece*.model", "chat_template.*", "chat_templates", "*.jinja", "*.tiktoken",
)  # fmt: skip
CODE = (
    ".py", ".pyc", ".pyo", ".pyd", ".pyw", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".cmd", ".ps1",
    ".js", ".mjs", ".wasm", ".ipynb", ".pl", ".rb", ".lua", ".jar", ".class", ".app", ".msi", ".pth.py", ".php",
)  # fmt: skip
WEIGHTS = (".safetensors", ".gguf", ".ggml", ".h5", ".keras", ".onnx", ".msgpack", ".tflite", ".pb", ".ot")
EXECUTABLE = (b"\x7fELF", b"MZ", b"#!", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe")
LARGEST_TEMPLATE = 2**22


class Entry(NamedTuple):
    """A regular file: its name within the folder, and where it is."""

    name: str
    path: Path
    size: int


@dataclass
class Listing:
    """What there is.

    Attributes:
        files: regular files, by name.
        faults: what is wrong, with the file's name.
    """

    files: dict[str, Entry] = field(default_factory=dict)
    faults: list[tuple[str | None, Fault]] = field(default_factory=list)

    def at_fault(self, name: str | None, *fault: object) -> None:
        """Note a fault of a file."""
        self.faults.append((name, Fault(*fault)))  # type: ignore[arg-type]


def look(folder: Path, policy: Policy) -> Listing:
    """List a folder, and say of every entry what is wrong with it."""
    listing = Listing()
    if folder.is_symlink():
        listing.at_fault(None, "FS012", f"is itself a link, to {str(folder.readlink())[:200]!r}")
    walk(listing, folder, "", policy.thresholds.entries)
    if ADAPTER_FILE in listing.files and "adapter_model.bin" in listing.files:
        listing.at_fault("adapter_model.bin", "FS002", f"lies beside {ADAPTER_FILE}: loaders disagree which one counts")
    if ADAPTER_FILE not in listing.files and not any(name == ADAPTER_FILE for name, _ in listing.faults):
        listing.at_fault(None, "FS019", f"has no {ADAPTER_FILE}")
    for entry in listing.files.values():
        check_file(listing, entry, policy)
    return listing


def walk(listing: Listing, folder: Path, prefix: str, most: int) -> None:
    """Collect regular files below a folder; links and devices are named and left alone."""
    for name, info in scanned(listing, folder, prefix):
        whole = prefix + name
        if len(listing.files) >= most:
            listing.at_fault(None, "FS018", f"holds more than {most} files", None, most, most)
            return
        if stat.S_ISLNK(info.st_mode):
            target = str((folder / name).readlink())
            listing.at_fault(whole, "FS012", f"is a link to {target[:200]!r}")
        elif stat.S_ISDIR(info.st_mode):
            if whole.count("/") < DEEPEST:
                walk(listing, folder / name, f"{whole}/", most)
            else:
                listing.at_fault(whole, "FS018", f"lies more than {DEEPEST} folders deep")
        elif stat.S_ISREG(info.st_mode):
            listing.files[whole] = Entry(whole, folder / name, info.st_size)
        else:
            listing.at_fault(whole, "FS012", "is no regular file, but a pipe, a socket or a device")


def scanned(listing: Listing, folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """The entries of a folder in order, not followed; what vanishes or is forbidden is a fault."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        listing.at_fault(prefix.rstrip("/") or None, "FS018", f"cannot be listed ({error.strerror})")
        return
    for name in names:
        try:
            yield name, (folder / name).lstat()
        except OSError as error:
            listing.at_fault(prefix + name, "FS018", f"cannot be looked at ({error.strerror})")


def check_file(listing: Listing, entry: Entry, policy: Policy) -> None:
    """What is wrong with a file: at most one thing."""
    name, base = entry.name, entry.name.rpartition("/")[2]
    if name in OWN:
        return
    try:
        with entry.path.open("rb") as file:
            beginning = file.read(8)
    except OSError as error:
        listing.at_fault(name, "FS018", f"cannot be read ({error.strerror})")
        return
    if is_pickle(base, beginning):
        found, worth = dangers(entry.path, policy.thresholds.file_mib * 2**20)
        if found:
            listing.at_fault(name, "FS007", f"calls {', '.join(found[:4])} when it is read", None, found[:20])
        elif name != "adapter_model.bin" or ADAPTER_FILE not in listing.files:  # else FS002 says so
            listing.at_fault(name, "FS001", f"would be unpickled when it is read; {worth}")
    elif allowed(name, policy.allowed_files):
        return
    elif base.lower().endswith(CODE) or beginning.startswith(EXECUTABLE):
        listing.at_fault(name, "FS013", "holds code")
    elif base.lower().endswith(WEIGHTS):
        listing.at_fault(name, "FS016", "holds weights that are not the adapter's")
    elif allowed(base, TOKENIZER):
        check_template(listing, entry)
    else:
        listing.at_fault(name, "FS006", "does not belong to an adapter")


def allowed(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is one of those."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_template(listing: Listing, entry: Entry) -> None:
    """A tokenizer's file, which may hold chat templates; `Base.other_tokenizer` looks whether it is the base's."""
    if not entry.name.endswith((".jinja", ".json")) or entry.name.rpartition("/")[2] == "tokenizer.json":
        return  # vocabularies hold none, and are large
    if entry.size > LARGEST_TEMPLATE:
        listing.at_fault(entry.name, "FS018", f"is {entry.size:,} bytes long", None, entry.size, LARGEST_TEMPLATE)
        return
    text = entry.path.read_text(encoding="utf-8", errors="replace")
    found = next((each for part in texts_in(text, entry.name) if (each := hostile_template(part))), None)
    if found:
        listing.at_fault(entry.name, "FS020", f"has a template with {found[:60]!r} in it")


def texts_in(text: str, name: str) -> Iterator[str]:
    """The text of a template; of JSON every string, as it is read."""
    if name.endswith(".json"):
        try:
            todo = [json.loads(text)]
        except (ValueError, RecursionError):
            todo = [text]
        while todo:
            each = todo.pop()
            if isinstance(each, str):
                yield each
            elif isinstance(each, dict | list):
                todo += [*each.values(), *each] if isinstance(each, dict) else each
    else:
        yield text


def tokenizer_files(listing: Listing) -> dict[str, Entry]:
    """The files of a tokenizer among them."""
    return {name: entry for name, entry in listing.files.items() if allowed(name.rpartition("/")[2], TOKENIZER)}
