"""An adapter beside the base that it is for."""

from collections.abc import Iterator

from fedllm_sec.audit.base import Base
from fedllm_sec.audit.folder import tokenizer_files
from fedllm_sec.audit.header import Fault
from fedllm_sec.audit.intake import Expected, Opened, add
from fedllm_sec.audit.policy import Policy
from fedllm_sec.audit.rest import same_as_base
from fedllm_sec.audit.structure import differences
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json
from fedllm_sec.updates.smuggling import WHOLE_HEADS
from fedllm_sec.updates.sources import ADAPTER_FILE

CLAIMS = "client.json"  # what SubmitUpdate writes beside an adapter


def against_base(opened: Opened, base: Base | None, policy: Policy, expected: Expected | None) -> None:
    """Shapes, tokenizer and hashes against the base's."""
    tokenizer = tokenizer_files(opened.listing)
    if base is not None and (other := base.other_tokenizer(tokenizer)):
        text = f"is not the base model's ({len(other)} of {len(tokenizer)} files differ)"
        add(opened, policy, [Fault("FS021", text, None, other[:20])], other[0])
    elif tokenizer and not opened.has("FS018", "FS020"):
        first = next(iter(tokenizer))
        add(opened, policy, [Fault("FS014", "belongs to a tokenizer", None, sorted(tokenizer)[:20])], first)
    add(opened, policy, other_files(opened, base, policy), CLAIMS)
    suspect = base is not None and opened.has("KY001") and opened.source is not None
    if base is not None and suspect and same_as_base(opened, opened.structure.strange, base):
        opened.findings = [f for f in opened.findings if f.rule.id != "KY001"]  # PEFT saves the base's own
    if base is not None and expected is None and opened.config is not None and opened.tensors:
        shapes = base.shapes(opened.config)
        if isinstance(shapes, str):
            add(opened, policy, [Fault("SH002", f"does not fit the base: {shapes}")], ADAPTER_FILE)
            return
        fresh = {name for name in shapes if any(part in WHOLE_HEADS for part in name.split("."))}
        ours = {name: shape for name, shape in opened.shapes.items() if name not in {*opened.structure.strange, *fresh}}
        theirs = {name: shape for name, shape in shapes.items() if name not in fresh}
        faults = list(differences(ours, theirs, "the base"))
        if opened.has("KY002", "KY004", "KY005", "KY006", "KY008", "SH001", "SH003"):
            faults = []
        add(opened, policy, faults, ADAPTER_FILE)


def other_files(opened: Opened, base: Base | None, policy: Policy) -> Iterator[Fault]:
    """The hash of the base that the client says it trained on."""
    agreed = policy.base_sha256 or (base.sha256() if base is not None else None)
    entry = opened.listing.files.get(CLAIMS)
    if agreed is None or entry is None or entry.size > 2**20:
        return
    try:
        claims = read_json(entry.path)
    except InputError:
        yield Fault("CF009", "cannot be read, and should say on which base's files it was trained", None, None, agreed)
        return
    told = claims.get("base_sha256") if isinstance(claims, dict) else None
    if told is not None and told != agreed:
        yield Fault("CF009", f"says that the base's files have the hash {str(told)[:64]}", None, str(told)[:64], agreed)
