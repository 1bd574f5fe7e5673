"""The policy of an audit: what is expected, thresholds, severities, and what may pass for which reason."""

import fnmatch
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, ValidationError, field_validator

from fedllm_sec.audit.findings import Finding, severity_named, suppressed
from fedllm_sec.audit.rules import RULES
from fedllm_sec.registry import did_you_mean
from fedllm_sec.settings import Count, Fraction, Strict
from fedllm_sec.updates.errors import InputError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Level = Literal["low", "medium", "high", "critical"]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Thresholds(Strict):
    """What a value may be; each is printed with the findings that it decided.

    Attributes:
        z: robust z-scores of a group or a bank past this are outliers.
        pair_z: likewise of the cosines of pairs, of which there are many more.
        least_group: of fewer adapters no z-score is taken.
        scaling: the largest alpha / r (or alpha / sqrt(r)).
        norm: the longest update, in the units of the weights; None: no limit of its own.
        of_base: the longest update of a module, over the norm of the weight that it changes.
        top1: the largest share of an update's squared norm in one direction of each module, of updates of rank 4 up.
        kurtosis: of the entries of a module's update, at most (a normal distribution has 3).
        few_layers: the largest share of the squared norm in one module, of eight modules up.
        gauge: the largest factor between the norms of B and A, either way.
        slack: how far factors may move for what their product moves.
        copy_distance: two updates are copies where they differ by less than this part of their length.
        minus: the cosine with the others' mean below which an update is that mean reversed.
        denormal: the largest share of values that are denormal.
        header_bytes: of a safetensors file.
        file_mib: the largest file that is scanned for pickles.
        entries: of a folder.
        trigger_z: how far the effect of a word stands out of those of all words.
        loss_rise: the most that the loss on clean text may rise, in nats.
        revealed: tokens that an update may tell before it is worth a line.
    """

    z: Positive = 5.0
    pair_z: Positive = 7.0
    least_group: Annotated[int, Field(ge=4)] = 8
    scaling: Positive = 32.0
    norm: Positive | None = None
    of_base: Positive = 1.0
    top1: Fraction = 0.995
    kurtosis: Positive = 100.0
    few_layers: Fraction = 0.9
    gauge: Positive = 1e6
    slack: Positive = 30.0
    copy_distance: Positive = 0.02
    minus: Annotated[float, Field(ge=-1, le=0)] = -0.9
    denormal: Fraction = 0.01
    header_bytes: Count = 2**20
    file_mib: Count = 512
    entries: Count = 1000
    trigger_z: Positive = 8.0
    loss_rise: Positive = 0.1
    revealed: Count = 1


class Suppression(Strict):
    """A finding that may pass, for a reason and perhaps for a time.

    Attributes:
        rule: its id.
        reason: why; it is printed with the finding.
        adapter: a pattern such as `client_*`.
        place: a pattern of the file or the tensor.
        until: the last day that it holds.
    """

    rule: Text
    reason: Text
    adapter: str = "*"
    place: str = "*"
    until: date | None = None

    @field_validator("rule")
    @classmethod
    def known(cls, rule: str) -> str:
        """Refuse a rule that does not exist: it would never suppress anything."""
        return known_rule(rule)

    def covers(self, finding: Finding, today: date) -> bool:
        """Whether it lets a finding pass."""
        places = (finding.file or "", finding.tensor or "")
        return (
            finding.rule.id == self.rule
            and (self.until is None or today <= self.until)
            and fnmatch.fnmatchcase(finding.adapter, self.adapter)
            and any(fnmatch.fnmatchcase(place, self.place) for place in places)
        )


class Policy(Strict):
    """What an organisation decided about adapters; a YAML file. Everything has a default.

    Attributes:
        fail_on: the least severity that fails.
        base_model: the only base that adapters may name.
        revision: and its revision.
        base_sha256: of the base's safetensors, as `SubmitUpdate` writes it into client.json.
        require_revision: whether an adapter must name the revision of its base.
        allowed_files: patterns of files that may be there beside an adapter's own.
        severity: of rules, where it is to be another.
        thresholds: see there.
        suppress: findings that may pass.
        known_bad: SHA-256 of files that must never pass.
        manifest: SHA-256 of adapter_model.safetensors by adapter, as agreed; none: not compared.
    """

    fail_on: Level = "medium"
    base_model: Text | None = None
    revision: Text | None = None
    base_sha256: Sha256 | None = None
    require_revision: bool = False
    allowed_files: tuple[str, ...] = ()
    severity: dict[str, Level] = {}  # noqa: RUF012 (pydantic copies it)
    thresholds: Thresholds = Thresholds()
    suppress: tuple[Suppression, ...] = ()
    known_bad: tuple[Sha256, ...] = ()
    manifest: dict[str, Sha256] = {}  # noqa: RUF012

    @field_validator("severity")
    @classmethod
    def known(cls, severity: dict[str, Level]) -> dict[str, Level]:
        """Refuse rules that do not exist."""
        for rule in severity:
            known_rule(rule)
        return severity

    def finding(self, rule: str, adapter: str, message: str, **more: Any) -> Finding:
        """A finding of a rule, as grave as this policy has it."""
        kind = RULES[rule]
        level = more.pop("severity", None) or kind.severity
        if rule in self.severity:
            level = severity_named(self.severity[rule])
        return Finding(kind, adapter, message, level, **more)

    def judged(self, findings: Sequence[Finding], today: date | None = None) -> tuple[Finding, ...]:
        """The same, those marked that may pass."""
        day = today or date.today()
        reasons = [next((s.reason for s in self.suppress if s.covers(each, day)), None) for each in findings]
        return tuple(suppressed(f, why) if why else f for f, why in zip(findings, reasons, strict=True))

    def as_json(self) -> dict[str, Any]:
        """All of it, defaults included."""
        fields: dict[str, Any] = json.loads(self.model_dump_json())
        return fields


def known_rule(rule: str) -> str:
    """The rule's id; raise ValueError where there is none."""
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r}{did_you_mean(rule, RULES)}")
    return rule


def read_policy(path: Path | None) -> Policy:
    """Read a policy file; None: all defaults.

    Raises:
        InputError: if it cannot be read, naming every field that is wrong.
    """
    if path is None:
        return Policy()
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return Policy.model_validate(fields)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in error.errors()]
        raise InputError(f"--policy {path}: " + "; ".join(lines)) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--policy {path}: cannot be read ({told[:200]})") from None
