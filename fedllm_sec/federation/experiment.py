"""A whole experiment: the same model, data and seeds for every arm, and a report at the end."""

import gc
import logging
import math
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from fedllm_sec.config import Config, read_tree, resolve, to_yaml
from fedllm_sec.federation.adapters import AdapterLearner
from fedllm_sec.federation.curious import rehearse_looks
from fedllm_sec.federation.evaluator import Evaluator
from fedllm_sec.federation.examples import load_examples
from fedllm_sec.federation.knowledge import KnowledgeLearner
from fedllm_sec.federation.learner import Learner
from fedllm_sec.federation.loop import Arm, prepare_arm
from fedllm_sec.federation.methods import build_methods, trains
from fedllm_sec.federation.models import ModelLearner
from fedllm_sec.federation.optimizers import optimizer
from fedllm_sec.federation.run_folder import ArmFolder, check_free, claim
from fedllm_sec.federation.scale import choose_scale, stand_ins
from fedllm_sec.federation.shared import SHARED
from fedllm_sec.federation.success import goals_of
from fedllm_sec.federation.texts import Data, load_data
from fedllm_sec.federation.trackers import check_trackers
from fedllm_sec.federation.world import World
from fedllm_sec.models import Shape, model
from fedllm_sec.models.split import Halves, cut
from fedllm_sec.randomness import derived_seed
from fedllm_sec.reports.split import draw_split
from fedllm_sec.tasks.arrays import ArrayTask
from fedllm_sec.tasks.forms import Form, form_of
from fedllm_sec.tasks.task import Classification, Task, task
from fedllm_sec.terminal import console
from fedllm_sec.training.base_model import BaseModel, load_base
from fedllm_sec.training.prepare import prepare_base
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json, write_json

logger = logging.getLogger(__name__)

PACKAGES = ("fedllm-sec", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "deepspeed")


def load_config(path: Path, overrides: Sequence[str], world: World) -> Config:
    """Read a configuration, choose its scale, and say which.

    Raises:
        InputError: for anything wrong with it.
    """
    choice = choose_scale(read_tree(path, overrides))
    config = resolve(path, overrides, choice.scale)
    if world.is_main:
        console.print(f"[bold]scale={choice.scale}[/bold]: {choice.reason}", highlight=False, soft_wrap=True)
        if config.model.name and (smaller := stand_ins(resolve(path, overrides, "paper"), config)):
            console.print(f"[bold]standing in[/bold]: {smaller}", highlight=False, soft_wrap=True)
    return config


def run_experiment(config: Config, world: World, *, resume: bool = False) -> Path:
    """Run every arm of an experiment and return its folder.

    Args:
        config: of the experiment, at a scale that was chosen.
        world: the processes of this launch.
        resume: go on with a run that was cut off; it ends with the bytes that it would have had.

    Raises:
        InputError: for anything that is wrong with the configuration or the data, before any training.
    """
    check_trackers(config.trackers)
    methods = {name: build_methods(arm, config) for name, arm in config.arms.items()}
    if world.sharded and (deaf := [name for name, each in methods.items() if each.attack and trains(each.attack)]):
        raise InputError(
            f"arms.{deaf[0]}.attack acts on parameters and gradients while clients train, and DeepSpeed shards them "
            "over processes: launch without it"
        )
    work = task.build(config.task.name, config.task.parameters)
    folder = Path(config.out or f"runs/{config.name}-{config.scale}")
    check_free(folder, to_yaml(config), resume=resume)
    world.wait()  # nobody claims the folder before everybody has looked
    learner = learner_of(config, work, world)
    rehearse_looks(config, {name: each.attack for name, each in methods.items()}, learner)
    for name in config.arms:
        for goal in goals_of(name, config, methods).values():
            learner.wanted(goal)
    if world.is_main:
        claim(folder, to_yaml(config))
        if split := learner.split():
            draw_split(*split, folder)
    world.wait()
    here = environment(learner, world)
    gc.freeze()  # `Trainer` collects garbage for every client: half a second each, were all that was loaded looked at
    cache = folder / SHARED
    for name, arm in config.arms.items():
        place = ArmFolder(folder / name)
        if world.is_main:
            alone = config.model_copy(update={"arms": {name: arm}, "claims": ()})
            prepare_arm(place, to_yaml(alone), here, learner)
        world.wait()
        goals = goals_of(name, config, methods)
        Arm(name, arm, methods[name], config, place, world, learner, goals, None if world.sharded else cache).run()
    if world.is_main:
        shutil.rmtree(cache, ignore_errors=True)
        write_json(folder / "summary.json", summary(config, folder))
    world.wait()
    return folder


def learner_of(config: Config, work: ArrayTask | Task | Classification, world: World) -> Learner:
    """What a task trains.

    Raises:
        InputError: for data or a model that cannot be had.
    """
    return model_learner(config, work, world) if isinstance(work, ArrayTask) else adapter_learner(config, work, world)


def model_learner(config: Config, work: ArrayTask, world: World) -> Learner:
    """A federation of small models.

    Raises:
        InputError: if no small model is named, or examples are missing.
    """
    if config.model.name is None:
        raise InputError(f"task {config.task.name} is one for small models: set model.name, for example model.name=lr")
    if config.federation.space != "factors":
        raise InputError("federation.space=product is for LoRA adapters; small models are sent whole: use factors")
    builder = model.build(config.model.name, config.model.parameters)
    examples = load_examples(config, work)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "model"))
        shape = Shape(work.shape, work.classes, work.vocabulary)
        network = cut(builder, shape, config.model.name) if exchanges_knowledge(config) else builder(shape)
    weights = sum(parameter.numel() for parameter in network.parameters())
    description = f"{config.model.name}, {weights:,} weights"
    if isinstance(network, Halves):
        description += f", of which a client has {sum(p.numel() for p in network.edge.parameters()):,}"
    if world.is_main:
        sizes = sorted(len(shard) for shard in examples.shards)
        console.print(
            f"{description}; {len(sizes)} clients with {sizes[0]:,} to {sizes[-1]:,} examples each, "
            f"{len(examples.test.y):,} to test on",
            highlight=False,
            soft_wrap=True,
        )
    if isinstance(network, Halves):
        return KnowledgeLearner(network, description, work, examples, config, world)
    return ModelLearner(network, description, work, examples, config, world)


def exchanges_knowledge(config: Config) -> bool:
    """Whether clients and server exchange knowledge in place of weights."""
    chosen = config.federation.optimizer
    return optimizer.build(chosen.name, chosen.parameters).transfer is not None


def adapter_learner(config: Config, work: Task | Classification, world: World) -> Learner:
    """A federation of LoRA adapters on a base model, or of the whole base.

    Raises:
        InputError: if base or texts are missing, or a field is for small models only.
    """
    check_for_trainer(config)
    data = load_data(config, work)
    base = load_base_once(config, work, world)
    form = form_of(work, base.tokenizer, check_lengths(base, work, world))
    if world.is_main:
        tell_lengths(form, data)
    evaluate = Evaluator(base, form, data.test, config.eval_batch_size, config.training.threads, world)
    if config.training.gradient_checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return AdapterLearner(base, base.adapter(), data, config, world, form, evaluate)


def check_for_trainer(config: Config) -> None:
    """Raise InputError for what only small models know."""
    training, other, lora = config.training, config.model.name, config.model.lora
    for fault, wrong in {
        "model.load_in_4bit trains an adapter; without one (model.lora=null) weights cannot change": (
            config.model.load_in_4bit and lora is None
        ),
        "federation.space=product is for LoRA adapters; without one (model.lora=null) use factors": (
            config.federation.space == "product" and lora is None
        ),
        f"model.name={other}: task {config.task.name} fine-tunes a base model: set model.path": other is not None,
        "training.batch_size=null is for small models": training.batch_size is None,
        "training.optimizer=adam is for small models; use adamw or sgd": training.optimizer == "adam",
        "training.proximal is for small models": training.proximal,
        "training.together is for small models": training.together is not None,
        "training.procedure is for small models": training.procedure.name != "supervised",
        "federation.optimizer=fedgkt is for small models": exchanges_knowledge(config),
        "data.partition.kind=natural is for small models": config.data.partition.kind == "natural",
    }.items():
        if wrong:
            raise InputError(fault)


def load_base_once(config: Config, work: Task | Classification, world: World) -> BaseModel:
    """Load the base; where something must be made first, the main process makes it while the others wait."""
    made, classes = "", work.labels if isinstance(work, Classification) else ()
    if world.is_main:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("training the embedded base model, once", total=None, visible=False)
            made = prepare_base(
                config.model,
                lambda step, steps, loss: progress.update(bar, completed=step, total=steps, visible=True),
                classifies=bool(classes),
            )
    folder = world.gather(made)[0]
    base = load_base(config.model, folder, config.seed, is_sharded=world.sharded, classes=classes)
    if world.is_main:
        console.print(f"base model: {base.description}; {trained_part(base)}", highlight=False, soft_wrap=True)
    return base


def trained_part(base: BaseModel) -> str:
    """What of a base is trained, for people."""
    if not base.is_adapted:
        return "trained whole"
    lora = base.model.peft_config["default"]
    heads = sorted({name.split(".")[-2] for name in base.parameters if ".lora_" not in name})
    beside = f", and {', '.join(heads)} whole" if heads else ""
    return f"LoRA r={lora.r} on {', '.join(sorted(lora.target_modules))}{beside}"


def check_lengths(base: BaseModel, work: Task | Classification, world: World) -> int:
    """The longest text that is used, in tokens."""
    limit = min(work.max_length, base.context or work.max_length)
    if limit < work.max_length and world.is_main:
        logger.warning("task.max_length=%d, but the model reads %d tokens: using %d", work.max_length, limit, limit)
    return limit


def tell_lengths(form: Form, data: Data) -> None:
    """Say how many texts are longer than that, and what is cut of them; fail early on those that do not fit."""
    for name, examples in (("train", [row for shard in data.shards for row in shard]), ("test", data.test)):
        report = form.shortened(examples)
        console.print(f"{name}: {report.texts} texts; {report}", highlight=False, soft_wrap=True)


def environment(learner: Learner, world: World) -> dict[str, Any]:
    """On what a run ran."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "processes": world.size,
        "sharded": world.sharded,
        "base": learner.description,
        "data": learner.digest(),
        "packages": versions,
    }


def summary(config: Config, folder: Path) -> dict[str, Any]:
    """The last value of each metric, by arm, and the time of all rounds, resumed or not."""
    last = {name: ArmFolder(folder / name).metrics(config.federation.rounds) or {} for name in config.arms}
    numbers = {arm: {k: v for k, v in row.items() if isinstance(v, int | float)} for arm, row in last.items()}
    times = [read_json(path)["round_seconds"] for path in folder.glob("*/round_*/timing.json")]
    return {**numbers, "wall_seconds": round(math.fsum(times), 1)}
