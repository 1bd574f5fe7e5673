"""One adapter, looked at before any of its values are: its folder, its header, its configuration, its keys."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fedllm_sec.audit.census import Watched
from fedllm_sec.audit.configuration import (
    CONDITIONS,
    check_configuration,
    check_scaling,
    kind,
    other_configuration,
    read_configuration,
    sane,
)
from fedllm_sec.audit.findings import Finding, Subject
from fedllm_sec.audit.folder import Listing, look
from fedllm_sec.audit.header import Fault, TensorEntry, read_header
from fedllm_sec.audit.policy import Policy
from fedllm_sec.audit.structure import Structure, check_structure, differences, structure_of
from fedllm_sec.updates.adapters import adapter_config
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import sha256
from fedllm_sec.updates.pairs import scaling
from fedllm_sec.updates.smuggling import PREFIX
from fedllm_sec.updates.sources import ADAPTER_CONFIG, ADAPTER_FILE, SafetensorsFile


@dataclass(frozen=True)
class Expected:
    """What an adapter is compared with.

    Attributes:
        shapes: by tensor.
        whose: in words.
        config: the configuration that counts; None: the adapter's own.
        dtypes: of its tensors, as safetensors calls them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    whose: str
    config: Mapping[str, Any] | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Opened:
    """An adapter as far as it is known.

    Attributes:
        subject: who it is.
        findings: so far.
        config: its own; None where there is none that can be read.
        tensors: as its header has them.
        source: its values, which have not been looked at yet; None where they cannot be read.
        scalings: of each module's product.
        modules: the names of A and B by module, of those that are products.
        listing: of its folder.
        structure: what its tensors are, of a LoRA adapter.
    """

    subject: Subject
    findings: list[Finding] = field(default_factory=list)
    config: Mapping[str, Any] | None = None
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    source: Watched | None = None
    scalings: dict[str, float] = field(default_factory=dict)
    modules: dict[str, tuple[str, str]] = field(default_factory=dict)
    listing: Listing = field(default_factory=Listing)
    structure: Structure = field(default_factory=Structure)

    @property
    def name(self) -> str:
        """By which findings call it."""
        return self.subject.name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all its tensors."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    def has(self, *rules: str) -> bool:
        """Whether it has a finding of one of these rules."""
        return any(finding.rule.id in rules for finding in self.findings)


def expected_of(reference: Path) -> Expected:
    """What the global adapter says that others are.

    Raises:
        InputError: if it cannot be read, or has other tensors than an adapter has.
    """
    file = reference / ADAPTER_FILE if reference.is_dir() else reference
    header = read_header(file, 2**26)
    if not header.is_whole:
        raise InputError(f"--global {reference}: {header.faults[0].message}; give the adapter that the clients got")
    config = adapter_config(reference) if reference.is_dir() else None
    if strange := structure_of(list(header.tensors), config or {}).strange:
        raise InputError(f"--global {reference}: tensor {strange[0]!r} is no part of a LoRA adapter; give a clean one")
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    return Expected(shapes, "the global adapter", config, {n: e.dtype for n, e in header.tensors.items()})


def open_adapter(path: Path, name: str, policy: Policy, expected: Expected | None) -> Opened:
    """Look at an adapter; nothing of it is loaded but its header and its configuration."""
    opened = Opened(Subject(name, path))
    if path.is_dir():
        opened.listing = look(path, policy)
        for file, fault in opened.listing.faults:
            add(opened, policy, [fault], file)
        weights = path / ADAPTER_FILE if ADAPTER_FILE in opened.listing.files else None
        look_at_config(opened, path, policy)
    else:
        weights = path
    if weights is not None:
        look_at_weights(opened, weights, policy, expected)
    if opened.config is not None and expected is not None and expected.config is not None:
        drop_agreed(opened, expected.config)
        add(opened, policy, other_configuration(opened.config, expected.config), ADAPTER_CONFIG)
    return opened


def drop_agreed(opened: Opened, agreed: Mapping[str, Any]) -> None:
    """What the global adapter's configuration has too was agreed."""
    assert opened.config is not None
    same = {name for name in CONDITIONS if opened.config.get(name) == agreed.get(name)}
    opened.findings = [f for f in opened.findings if not (f.rule.id == "CF005" and f.tensor in same)]


def look_at_config(opened: Opened, folder: Path, policy: Policy) -> None:
    """The configuration by itself."""
    if ADAPTER_CONFIG not in opened.listing.files:
        if not opened.has("FS012"):
            add(
                opened,
                policy,
                [Fault("FS015", f"is missing: nobody can tell how {ADAPTER_FILE} is scaled")],
                ADAPTER_CONFIG,
            )
        return
    config, faults = read_configuration(folder / ADAPTER_CONFIG)
    add(opened, policy, faults, ADAPTER_CONFIG)
    if config is not None:
        add(opened, policy, check_configuration(config, policy), ADAPTER_CONFIG)
        opened.config = sane(config)


def look_at_weights(opened: Opened, file: Path, policy: Policy, expected: Expected | None) -> None:
    """The header, the keys and the shapes."""
    try:
        header = read_header(file, policy.thresholds.header_bytes)
    except OSError as error:
        add(opened, policy, [Fault("FS008", f"cannot be read ({error.strerror})")], file.name)
        return
    add(opened, policy, header.faults, file.name)
    opened.tensors = header.tensors
    if not header.is_whole:
        return
    if not header.tensors:
        add(opened, policy, [Fault("SH003", "holds no tensor")], file.name)
        return
    if opened.config is None or kind(opened.config) == "LORA":
        look_at_keys(opened, file.name, policy, expected)
    read_values(opened, file, policy)


def look_at_keys(opened: Opened, file: str, policy: Policy, expected: Expected | None) -> None:
    """Smuggled weights first; then what the configuration, the global adapter or the base imply."""
    config = opened.config if opened.config is not None else (expected.config if expected else None)
    known: Mapping[str, Any] = config if config is not None else {"r": None, "lora_alpha": None}
    undeclared = opened.config is None and (expected is None or expected.config is None)
    if undeclared:
        known = {**known, "use_dora": True, "lora_bias": True}  # nobody says that they are not: only keys are judged
    opened.structure = structure_of(list(opened.tensors), known)
    faults = [
        fault
        for fault in check_structure(opened.structure, opened.tensors, known, known_whole=expected is not None)
        if not (undeclared and fault.rule in ("KY008", "KY005"))
    ]
    add(opened, policy, faults, file)
    set_scalings(opened, policy, expected)
    if expected is not None:
        strange = set(opened.structure.strange)
        ours = {name: shape for name, shape in opened.shapes.items() if name not in strange}
        found = list(differences(ours, expected.shapes, expected.whose))
        told = {"SH002": ("SH001", "SH003", "CF007"), "KY006": ("KY002", "KY006"), "KY007": ("KY002", "KY004", "KY005")}
        add(opened, policy, [f for f in found if not explained(opened, f, told.get(f.rule, ()), expected)], file)
        add(opened, policy, other_types(opened.tensors, expected), file)


def explained(opened: Opened, fault: Fault, by: Sequence[str], expected: Expected) -> bool:
    """Whether another finding says why."""
    if fault.rule == "SH002" and expected.config is not None and opened.config is not None:
        same = opened.config.get("r") == expected.config.get("r")
        return opened.has("SH001", "SH003") or not same
    if fault.rule == "KY007" and isinstance(fault.measured, list):
        rest = [name for name in fault.measured if name.startswith(PREFIX)]
        return opened.has(*by) or not rest
    return opened.has(*by)


def other_types(tensors: Mapping[str, TensorEntry], expected: Expected) -> Iterator[Fault]:
    """Tensors of another type than the global adapter's, where all are: mixed ones are told by themselves."""
    differs = [n for n in sorted(tensors) if n in expected.dtypes and expected.dtypes[n] != tensors[n].dtype]
    if differs and len({entry.dtype for entry in tensors.values()}) == 1:
        ours, theirs = tensors[differs[0]].dtype, expected.dtypes[differs[0]]
        yield Fault("SH004", f"is {ours}, and {expected.whose}'s is {theirs}", differs[0], ours, theirs)


def set_scalings(opened: Opened, policy: Policy, expected: Expected | None) -> None:
    """What each module's product is multiplied by: a server's configuration counts where there is one."""
    counts = expected.config if expected is not None and expected.config is not None else opened.config
    for name, module in opened.structure.modules.items():
        a, b = module.tensors.get("A"), module.tensors.get("B")
        if a is None or b is None or min(len(opened.tensors[x].shape) for x in (a, b)) < 2:
            continue
        if not all(opened.tensors[a].shape) or not all(opened.tensors[b].shape):
            continue
        opened.modules[name] = (a, b)
        try:
            opened.scalings[name] = scaling(counts, a, opened.tensors[a].shape[0])
        except InputError as error:
            if not opened.has("CF008"):
                add(opened, policy, [Fault("CF008", str(error))])
            opened.scalings[name] = 1.0
    if opened.config is not None and (expected is None or expected.config is None):
        add(opened, policy, check_scaling(opened.config, opened.scalings, policy), ADAPTER_CONFIG)


def read_values(opened: Opened, file: Path, policy: Policy) -> None:
    """Open the values, to be read later."""
    try:
        opened.source = Watched(SafetensorsFile(file))
    except InputError as error:
        add(opened, policy, [Fault("FS008", f"cannot be opened ({str(error)[:200]})")], file.name)


def hashed(opened: Opened, policy: Policy) -> None:
    """Hash the files that were read, and compare them with what the policy knows."""
    path = opened.subject.path
    files = [opened.listing.files[name].path for name in (ADAPTER_FILE, ADAPTER_CONFIG) if name in opened.listing.files]
    found = {file.name: sha256(file) for file in (files if path.is_dir() else [path])}
    for name, value in found.items():
        if value in policy.known_bad:
            add(opened, policy, [Fault("L001", "is on the list of known bad files", None, value)], name)
    agreed = policy.manifest.get(opened.name)
    weights = found.get(ADAPTER_FILE if path.is_dir() else path.name)
    if agreed is not None and weights != agreed:
        add(
            opened,
            policy,
            [Fault("L002", f"has the hash {weights}, agreed was {agreed}", None, weights, agreed)],
            ADAPTER_FILE,
        )
    size = opened.listing.files[ADAPTER_FILE].size if ADAPTER_FILE in opened.listing.files else 0
    size = size if path.is_dir() else path.stat().st_size
    opened.subject = Subject(opened.name, path, found, size, len(opened.tensors))


def add(opened: Opened, policy: Policy, faults: Iterable[Fault], file: str | None = None) -> None:
    """Make findings of faults: those of one rule are one finding, at the first place."""
    for rule, group in groupby(sorted(faults, key=lambda fault: fault.rule), key=lambda fault: fault.rule):
        same = list(group)
        first = same[0]
        what = f"tensor {first.tensor[:200]!r}" if first.tensor and first.tensor in opened.tensors else file or "it"
        opened.findings.append(
            policy.finding(
                rule,
                opened.name,
                f"{what} {first.message}",
                file=file,
                tensor=first.tensor,
                measured=first.measured,
                threshold=first.threshold,
                places=max(len(same), len(first.measured) if isinstance(first.measured, list) and first.tensor else 1),
            )
        )
