"""The schema of a configuration file: data only, builds nothing.

A file is YAML: the fields below, and `scales`, a mapping from a scale's name to the fields that it changes. The order
of precedence is file < scale < `key=value` on the command line. Every fault is reported at once, before any work.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    field_validator,
)

from fedllm_sec.settings import (
    ArmName,
    ArmSettings,
    Claim,
    Count,
    DataSettings,
    FederationSettings,
    Method,
    ModelSettings,
    Scale,
    Strict,
    TrainingSettings,
    about_known_arms,
)
from fedllm_sec.updates.errors import InputError


class Config(Strict):
    """A whole experiment."""

    name: str
    seed: int = 0
    scale: Scale = "auto"
    out: str | None = None  # default: runs/<name>-<scale>
    task: Method = Method(name="pubmedqa")
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    eval_batch_size: Count = 16
    arms: Annotated[dict[ArmName, ArmSettings], Field(min_length=1)]
    claims: tuple[Annotated[Claim, AfterValidator(about_known_arms)], ...] = ()  # what the report checks
    trackers: tuple[str, ...] = ()  # Accelerate's: tensorboard, wandb, ...

    @field_validator("arms")
    @classmethod
    def leave_the_report_its_folder(cls, arms: dict[str, ArmSettings]) -> dict[str, ArmSettings]:
        """`report/` is taken, and so is `shared/` while a run goes on."""
        for taken in {"report", "shared"} & arms.keys():
            raise ValueError(f"an arm cannot be called {taken!r}")
        return arms


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and set `key.sub=value` on it; the values are YAML too.

    Raises:
        InputError: if the file is missing or no mapping, or an override is not of the form key=value.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds no mapping of fields")
    return merged(tree, override_tree(overrides))


def override_tree(overrides: Sequence[str]) -> dict[str, Any]:
    """`["a.b=3"]` -> `{"a": {"b": 3}}`."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"cannot read {override!r}; overrides are written key=value, e.g. federation.rounds=3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"cannot read the value of {override!r}: {error}") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` laid over `base`: mappings merge, everything else is replaced."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def resolve(path: Path, overrides: Sequence[str], scale: str) -> Config:
    """The configuration at a given scale: file < scale < overrides.

    Raises:
        InputError: with every fault of the tree, each with its place and, for a misspelt field, the nearest one.
    """
    tree = read_tree(path)
    scales = tree.pop("scales", None) or {}
    if not isinstance(scales, Mapping) or not all(isinstance(change, Mapping) for change in scales.values()):
        raise InputError(f"{path}: scales: must map names to the fields that they change")
    validated(tree, str(path))
    for name, change in scales.items():
        validated(merged(tree, change), f"{path} (scales.{name})")
    changes = override_tree(overrides)
    return validated(merged(merged(merged(tree, scales.get(scale, {})), changes), {"scale": scale}), str(path))


def validated(tree: Mapping[str, Any], origin: str) -> Config:
    """Check a tree against the schema."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = [fault_text(fault) for fault in error.errors()]
    raise InputError("\n".join(f"{origin}: {fault}" for fault in faults))


def fault_text(fault: Any) -> str:
    """One line for one fault, with the nearest known field where a field is unknown."""
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        return f"{place}: {fault['msg']} (got {fault['input']!r})"
    known = fields_beside(fault["loc"])
    near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
    return f"{place}: unknown field" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def fields_beside(location: Sequence[Any]) -> list[str]:
    """The known fields of the model in which a location lies."""
    model: Any = Config
    for part in location[:-1]:
        field = model.model_fields.get(part)
        if field is None:  # a name in `arms`
            continue
        model = {"arms": ArmSettings, "claims": Claim}.get(part, field.annotation)
        model = next((kind for kind in (model, *get_args(model)) if hasattr(kind, "model_fields")), model)  # or None
    return sorted(model.model_fields)


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every field in full."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
