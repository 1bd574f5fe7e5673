"""The fields of a configuration file, and what each may hold: data only, builds nothing."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)

from fedllm_sec.core import Knowledge

Scale = Literal["auto", "paper", "local", "laptop", "tiny"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
ArmName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]  # it names a folder of the run
EMBEDDED = "embedded"  # the model or the data that the project makes itself


class Strict(BaseModel):
    """Unknown keys are errors; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(BaseModel):
    """An attack, a defense or a task by its registry name; every other key is a parameter of it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """What is passed to the registered factory."""
        return dict(self.model_extra or {})


class LoraSettings(Strict):
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    r: Count = 8
    alpha: Count = 16
    dropout: Fraction = 0.05
    target_modules: tuple[str, ...] | None = None  # None: PEFT's choice for the architecture
    freeze_a: bool = False  # train B only, A stays as it was drawn: FFA-LoRA (Sun et al. 2024, arXiv:2403.12313)


class ModelSettings(Strict):
    """A small model, by `name`; or the base of an adapter, by `path`: a hub id, a folder, a GGUF file, `embedded`."""

    name: str | None = None
    parameters: dict[str, Any] = {}  # of the small model
    path: str = EMBEDDED
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    load_in_4bit: bool = False  # QLoRA (Dettmers et al. 2023, arXiv:2305.14314): bitsandbytes NF4
    lora: LoraSettings | None = LoraSettings()  # None: train the whole model, and send all of it


class PartitionSettings(Strict):
    """How the training data is split over the clients."""

    kind: Literal["iid", "dirichlet", "quantity", "natural"] = "iid"  # dirichlet: over labels; quantity: over sizes
    alpha: Positive = 0.5


class DataSettings(Strict):
    """Where rows come from: `hub/id:config`, a local .json, .jsonl(.gz) or .parquet file, or `embedded`."""

    train: str = EMBEDDED
    test: str | None = EMBEDDED  # None: a fifth of the training rows is held out
    train_limit: Count | None = None
    test_limit: Count | None = None
    partition: PartitionSettings = PartitionSettings()


class TrainingSettings(Strict):
    """Local training of one client in one round: by `transformers.Trainer`, or of a small model by loops of our own."""

    steps: Count | None = 200  # optimizer steps a round; None: `epochs` decide
    epochs: Positive = 1.0
    batch_size: Count | None = 8  # of one process; None: all of a client's examples (small models)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: Fraction = 0.0  # of sgd
    procedure: Method = Method(name="supervised")  # small models: what a client does with one (gan, milenas)
    proximal: NotNegative = 0.0  # FedProx's mu (Li et al. 2020, arXiv:1812.06127; small models)
    together: bool | None = None  # small models: train clients side by side; None: where the model allows and gains
    gradient_accumulation: Count = 1
    learning_rate: Positive = 3e-4
    schedule: Literal["linear", "constant", "cosine"] = "linear"  # over the whole run, not anew each round
    warmup: Fraction = 0.05  # part of the whole run
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive | None = 1.0
    gradient_checkpointing: bool = False
    threads: Count = 1  # CPU threads of one process; results depend on it (last bits: and on who trains together)


class FederationSettings(Strict):
    """The rounds, and what the server does with the clients' updates."""

    clients: Count = 7
    participants: Count | None = None  # clients drawn for each round; None: all
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the chance that a drawn client never answers
    rounds: Count = 5
    optimizer: Method = Method(name="fedavg")  # the server's
    weights: Literal["samples", "equal"] = "samples"  # of FedAvg
    sample_cap: Annotated[float, Field(ge=1)] | None = 10.0  # a claim counts as at most so many times the median one
    root_samples: Annotated[int, Field(ge=0)] = 0  # texts that the server keeps, to train an update that it can trust
    on_refused: Literal["drop", "stop"] = "drop"  # a client whose update does not pass the gate
    space: Literal["factors", "product"] = "factors"  # in which the server decides and aggregates LoRA adapters
    memory: str = "1GiB"  # for the blocks of the server's step
    device: str = "cpu"


class Window(Strict):
    """Rounds: every so many, from the first to the last."""

    first: Count = 1
    last: Count | None = None  # None: of the run
    every: Count = 1

    @model_validator(mode="after")
    def has_a_round(self) -> "Window":
        """A window that ends before it begins is a slip."""
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last={self.last} is before first={self.first}")
        return self

    def __contains__(self, index: object) -> bool:
        if not isinstance(index, int) or index < self.first or (self.last is not None and index > self.last):
            return False
        return (index - self.first) % self.every == 0


class OwnTraining(Strict):
    """How malicious clients train where they do not as all others: who plants a backdoor may take his time over it.

    In the paper of model replacement (arXiv:1807.00459, section 4.1) they do more local epochs, at another rate.
    """

    steps: Count | None = None
    epochs: Positive | None = None
    learning_rate: Positive | None = None

    def applied(self, training: TrainingSettings) -> TrainingSettings:
        """The settings of all clients, with what is set here in their place."""
        changes = self.model_dump(exclude_none=True)
        if self.epochs is not None and self.steps is None:
            changes["steps"] = None
        return training.model_copy(update=changes)


class ArmSettings(Strict):
    """One curve: who attacks how, and how the server defends."""

    attack: Method | None = None
    malicious: int | tuple[int, ...] = 1  # how many clients (drawn by seed), or which
    redraw: bool = False  # draw the malicious clients anew each round
    own_training: OwnTraining = OwnTraining()  # of malicious clients, in rounds in which they act
    visible: Knowledge = "own"  # the updates that the adversary sees; aggregator: and what the server makes of them
    victims: int | tuple[int, ...] = 1  # of an attack that only looks: at how many clients (drawn by seed), or which
    attack_rounds: Window | Annotated[tuple[Count, ...], Field(min_length=1)] = Window()  # when it acts: or a list
    defenses: tuple[Method, ...] = ()


class Claim(Strict):
    """What is said of the arms, as a check of a metric (`reports/claims.py` measures it).

    The number is the metric of `arm`; with `share_of`, the share of what that arm learnt that `arm` has kept; with
    `against`, how much more of it `arm` has than that arm.
    """

    says: Annotated[str, StringConstraints(min_length=1)]
    arm: str
    against: str | None = None
    share_of: str | None = None
    metric: str = "accuracy"
    at_least: Annotated[float, Field(allow_inf_nan=False)] | None = None
    at_most: Annotated[float, Field(allow_inf_nan=False)] | None = None
    last: Count = 5  # rounds, of which the mean counts: one round alone is noise
    source: str | None = None  # who says so

    @model_validator(mode="after")
    def can_hold_and_can_fail(self) -> "Claim":
        """A claim without a bound holds always, and one whose bounds cross never."""
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if not bounds or bounds != sorted(bounds):
            raise ValueError("set at_least or at_most, or both with at_least <= at_most")
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it needs."""
        return tuple(name for name in (self.arm, self.against, self.share_of) if name is not None)


def about_known_arms(claim: Claim, info: ValidationInfo) -> Claim:
    """Raise ValueError for a claim about an arm that the configuration does not have."""
    known = info.data.get("arms", claim.arms)  # arms that are faulty themselves are told of elsewhere
    if unknown := set(claim.arms) - set(known):
        raise ValueError(f"no arm is called {' or '.join(sorted(unknown))}; there are {', '.join(known)}")
    return claim
