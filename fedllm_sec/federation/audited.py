"""Merge only what passed an audit, and say in the merged adapter's folder what was merged, and what was not and why."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedllm_sec.audit import Audit, Policy, audit_adapters
from fedllm_sec.audit.output.as_json import audit_json
from fedllm_sec.audit.output.markdown import card_section
from fedllm_sec.updates.adapters import adapter_config
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import sha256, write_json, write_text
from fedllm_sec.updates.sources import adapter_file

logger = logging.getLogger(__name__)

Chain = Sequence[tuple[str, Mapping[str, Any]]]

CARD = "README.md"  # where the hub and PEFT look for a model card
REPORT = "audit.json"


class Audited(NamedTuple):
    """What passed.

    Attributes:
        audit: of all.
        clients: those that are fit, in the order given.
        num_samples: of them; None where none were given.
        sha256: of their weights, as audited.
    """

    audit: Audit
    clients: list[Path]
    num_samples: list[float] | None
    sha256: list[str]

    def check_unchanged(self) -> None:
        """Make sure that what was merged is what was audited.

        Raises:
            InputError: if a file has changed since.
        """
        for client, before in zip(self.clients, self.sha256, strict=True):
            if sha256(adapter_file(client)) != before:
                raise InputError(f"{client}: was changed after it had been audited; start again")

    def summary(self) -> dict[str, Any]:
        """For `decision.json`: who was left out, and for which findings."""
        told = audit_json(self.audit)
        failing = [each for each in told["findings"] if each["adapter"] not in self.audit.fit]
        left_out: dict[str, list[dict[str, Any]]] = {}
        for each in failing:
            fields = ("rule", "severity", "message", "measured", "threshold", "tensor", "suppressed")
            left_out.setdefault(each["adapter"], []).append({name: each[name] for name in fields})
        return {
            "fail_on": told["fail_on"],
            "policy_sha256": told["policy_sha256"],
            "sources": {each["name"]: each["sha256"] for each in told["adapters"]},
            "left_out": left_out,
        }

    def write(self, folder: Path, reference: Path, chain: Chain) -> dict[str, Any]:
        """Put the model card and the whole audit into the folder of the merged adapter; return the summary.

        Raises:
            InputError: if a file has changed since it was audited.
        """
        self.check_unchanged()
        told = audit_json(self.audit)
        write_json(folder / REPORT, {name: value for name, value in told.items() if name != "cost"})
        write_text(folder / CARD, card(self.audit, adapter_config(reference) or {}, chain))
        return self.summary()


def audited(
    clients: Sequence[Path],
    reference: Path,
    num_samples: Sequence[float] | None,
    policy: Policy,
    *,
    device: str = "cpu",
    memory: str = "1GiB",
) -> Audited:
    """Audit what clients sent, and keep what is fit.

    Raises:
        InputError: if nothing is, naming every client's gravest finding.
    """
    if num_samples is not None and len(num_samples) != len(clients):
        raise InputError(f"{len(clients)} clients but {len(num_samples)} sample counts; give one for each client")
    result = audit_adapters(clients, reference=reference, policy=policy, device=device, memory=memory)
    fit = set(result.fit)
    keep = [i for i, subject in enumerate(result.subjects) if subject.name in fit]
    gravest = {finding.adapter: finding for finding in reversed(result.failing)}
    lines = [f"{name}: {gravest[name].rule.id}: {gravest[name].message}" for name in sorted(gravest)]
    if not keep:
        raise InputError("no adapter passed the audit:\n" + "\n".join(lines))
    for line in lines:
        logger.warning("left out %s", line)
    kept = [clients[i] for i in keep]
    counts = [float(num_samples[i]) for i in keep] if num_samples is not None else None
    return Audited(result, kept, counts, [result.subjects[i].sha256[adapter_file(clients[i]).name] for i in keep])


def card(audit: Audit, config: Mapping[str, Any], chain: Chain) -> str:
    """A model card: PEFT's front matter, how it was merged, and the audit."""
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "federated-learning"]}
    if config.get("base_model_name_or_path"):
        front = {"base_model": str(config["base_model_name_or_path"]), **front}
    steps = [f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})" for name, given in chain]
    how = " → ".join(steps) or "FedAvg"
    head = f"# Merged adapter\n\nMade of {len(audit.fit)} clients' adapters under `{how}`; see `decision.json`.\n"
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{head}\n{card_section(audit)}"
