"""A curious server: it does its work as it should, and looks at what some clients sent to find out what they have.

It sees every row as it was sent; nobody is malicious, and nothing is rewritten. Of several processes the main one alone
looks, as it alone serves, also where DeepSpeed shards the training: what clients sent lies on the disk, whole.
"""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedllm_sec.attacks.reconstruction.judge import Bounds, judge_images, judge_labels, judge_text
from fedllm_sec.attacks.reconstruction.revealed import Revealed, RevealedImages, RevealedLabels, RevealedText
from fedllm_sec.config import Config
from fedllm_sec.core import Attack, Round, Threat
from fedllm_sec.federation.adversary import Adversary, only_looks
from fedllm_sec.federation.learner import Learner, Truth, finite
from fedllm_sec.federation.participants import participants
from fedllm_sec.federation.run_folder import ArmFolder, client_name
from fedllm_sec.randomness import derived_seed
from fedllm_sec.reports.read import LEAKAGE
from fedllm_sec.reports.reconstructed_images import draw_images
from fedllm_sec.reports.reconstruction import reconstruction_page
from fedllm_sec.settings import ArmSettings
from fedllm_sec.training.procedures import procedure
from fedllm_sec.updates.admit import open_updates
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json, write_json, write_text
from fedllm_sec.updates.update_set import UpdateSet
from fedllm_sec.victim import Victim

logger = logging.getLogger(__name__)


class LookedAtError(Exception):
    """An attack began to read the update of a rehearsal: it has accepted everything else."""


@dataclass(frozen=True)
class Curious:
    """Who acts for an attack that only looks; for any other it does nothing.

    Attributes:
        adversary: what it is shown, and of which arm.
        learner: tells how clients train, and to the judge what they trained on.
    """

    adversary: Adversary
    learner: Learner

    def victims(self, index: int, present: Sequence[int]) -> tuple[int, ...]:
        """The clients that it looks at in a round, of those that answer."""
        arm, config = self.adversary.arm, self.adversary.config
        if not only_looks(self.adversary.attack) or index not in arm.attack_rounds:
            return ()
        return victims_of(arm, config, index, present)

    def look(self, round: Round, present: Sequence[int]) -> dict[str, float]:
        """Reconstruct, judge and keep what the updates of a round's victims reveal; the seconds that each took.

        A victim whose update does not pass the gate, or from which the attack can make nothing, is left out: what a
        client sends ends no run. That the attack works here at all was rehearsed.
        """
        received, took = self.adversary.folder.global_model(round.index - 1), {}
        for client in self.victims(round.index, present):
            sent = self.adversary.folder.sent(round.index, present)
            logger.info("round %d: reconstructing what %s trained on", round.index, client_name(client))
            try:
                row = self.adversary.shown([client], sent, received, "factors")
                claimed = torch.tensor(
                    [float(sent[client].num_samples)], dtype=torch.float64
                )  # not as a mean weighs it
                row, victim = replace(row, num_samples=claimed), self.learner.victim(received, round.index, client)
                found = self.reconstruct(row, self.threat(round, client, len(present), received, victim))
            except InputError as error:
                logger.warning("round %d: nothing can be reconstructed of %s", round.index, error)
                continue
            took[client_name(client)] = found.seconds
            self.keep(round, client, replace(found, seconds=0.0), victim)  # times are in timing.json alone
        return took

    def threat(self, round: Round, client: int, clients: int, received: Path, victim: Victim) -> Threat:
        """What it knows while it looks at a client's update."""

        def noted(attack: str, facts: Mapping[str, Any]) -> None:
            folder = self.adversary.folder.round(round.index)
            write_json(folder / f"adversary_{attack}_{client_name(client)}.json", facts)

        base = self.adversary.opened(received, "factors")
        threat = self.adversary.threat(round, (), (client,), clients, base, victim=victim)
        return replace(threat, knowledge="aggregator", noted=noted)

    def reconstruct(self, row: UpdateSet, threat: Threat) -> Revealed:
        """What the attack makes of one row; what it draws from torch's own stream is its own, and disturbs nobody."""
        attack = self.adversary.attack
        assert attack is not None
        assert attack.reconstruct_data is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(threat.round.seed_for("curious", *row.clients))
            found = attack.reconstruct_data(row, threat)
        (revealed,) = [found] if isinstance(found, Revealed) else found  # it may take rows, and give as many
        assert isinstance(revealed, Revealed)
        return revealed

    def keep(self, round: Round, client: int, found: Revealed, victim: Victim) -> None:
        """Judge what was found, and write it into the round's folder: numbers, a picture of images, a page of texts."""
        folder, name = self.adversary.folder.reconstructed(round.index), client_name(client)
        folder.mkdir(exist_ok=True)
        truth = self.learner.truth(self.adversary.folder, round, client)
        measured = judged(found, truth, victim.bounds)
        if isinstance(found, RevealedImages) and found.images.dim() > 2 and victim.bounds is not None:
            draw_images(found, truth.inputs, truth.labels, victim.bounds, folder, name)
        if isinstance(found, RevealedText):
            write_text(folder / f"{name}.html", reconstruction_page(found, truth.decode, truth.texts, measured))
        write_json(folder / f"{name}.json", {**told(found), "metrics": measured})


def judged(found: Revealed, truth: Truth, bounds: Bounds | None) -> dict[str, float]:
    """How what was found compares with the truth; nothing of what cannot be compared with it."""
    if isinstance(found, RevealedImages) and truth.inputs is not None and truth.labels is not None:
        return judge_images(found, truth.inputs, truth.labels, bounds)
    if isinstance(found, RevealedLabels) and truth.every is not None:
        return judge_labels(found, truth.every)
    if isinstance(found, RevealedText) and truth.texts:
        return judge_text(found, truth.texts)
    return {}


def told(found: Revealed) -> dict[str, Any]:
    """What was found, as JSON holds it; images have a picture of their own."""
    common = {"client": found.client, "method": found.method, "certificate": finite(found.certificate)}
    common |= {"certain": found.certain, "why": found.why}
    if isinstance(found, RevealedImages):
        return common | {"labels": found.labels.tolist(), "loss": finite(found.loss)}
    if isinstance(found, RevealedLabels):
        return common | {"present": list(found.present), "counts": found.counts and list(found.counts)}
    if isinstance(found, RevealedText):
        tokens = [{"id": each.id, "score": finite(each.score), "weight": finite(each.weight)} for each in found.tokens]
        return common | {"rank": found.rank, "tokens": tokens, "sentences": [list(ids) for ids in found.sentences]}
    return common


def mean_leakage(folder: Path) -> dict[str, float]:
    """The mean of each measure over the victims of a round that have it: `leakage/psnr`, ...; none were none looked.

    Args:
        folder: of what was reconstructed in the round.
    """
    rows = [read_json(path)["metrics"] for path in sorted(folder.glob("*.json"))]
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        f"{LEAKAGE}{name}": math.fsum(known) / len(known)
        for name in names
        if (known := [row[name] for row in rows if name in row])
    }


def victims_of(arm: ArmSettings, config: Config, index: int, present: Sequence[int]) -> tuple[int, ...]:
    """Which clients a curious server looks at: those named, or so many drawn, of those that answer in a round.

    Each client's lot depends on the run's seed and its name (with `redraw` on the round too), so that whoever comes
    first in one round does so in all that it answers in.
    """
    if isinstance(arm.victims, tuple):
        return tuple(sorted(set(arm.victims) & set(present)))
    when = index if arm.redraw else "run"
    lots = {client: derived_seed(config.seed, "victims", when, client_name(client)) for client in present}
    return tuple(sorted(sorted(present, key=lots.__getitem__)[: arm.victims]))


def check_victims(arm: ArmSettings, chosen: Attack | None, config: Config) -> None:
    """Check whom an attack that only looks is to look at, and that clients train in a way that it can think of.

    Raises:
        InputError: for clients that do not exist, or fields that are for other attacks; before any work.
    """
    if not only_looks(chosen):
        if arm.victims != 1:
            raise InputError("victims is for attacks that only look at updates; others act by malicious clients")
        return
    name, clients, trained = arm.attack.name if arm.attack else "", config.federation.clients, config.training.procedure
    if arm.malicious not in (0, 1):  # 1: nothing was said
        raise InputError(f"{name} only looks, and nobody is malicious: say by victims at whom it looks")
    named = arm.victims if isinstance(arm.victims, tuple) else ()
    if unknown := [client for client in named if not 0 <= client < clients]:
        raise InputError(f"victims: client {unknown[0]} does not exist: clients are 0 to {clients - 1}")
    if isinstance(arm.victims, int) and not 1 <= arm.victims <= clients:
        raise InputError(f"victims={arm.victims}, but there are {clients} clients")
    if not procedure.build(trained.name, trained.parameters).uses_labels:
        raise InputError(f"{name} looks for labelled examples, and training.procedure={trained.name} has no labels")


def rehearse_looks(config: Config, attacks: Mapping[str, Attack | None], learner: Learner) -> None:
    """Let every arm's attack that only looks begin on an update that cannot be read.

    An attack looks at what it is told of the victim before it reads the update: if that is nothing it can work with, it
    says so then, and nobody has to wait for the training of a round to hear it.

    Raises:
        InputError: if one does.
    """
    for name, arm in config.arms.items():
        rounds = (index for index in range(1, config.federation.rounds + 1) if index in arm.attack_rounds)
        if only_looks(attacks[name]) and (index := next(rounds, None)) is not None:
            try:
                rehearse_look(arm, attacks[name], config, learner, index)
            except InputError as error:
                method = arm.attack.name if arm.attack else ""
                raise InputError(f"arms.{name}.attack: {method} cannot work here: {error}") from None


def rehearse_look(arm: ArmSettings, attack: Attack | None, config: Config, learner: Learner, index: int) -> None:
    """Rehearse one arm's attack for the first round in which it looks."""
    with tempfile.TemporaryDirectory(prefix="fedllm_sec_") as scratch:
        folder = ArmFolder(Path(scratch))
        folder.round(index).mkdir()
        received = folder.global_model(index - 1)
        learner.start(received)
        curious = Curious(Adversary(folder, arm, attack, config), learner)
        present = participants(config.federation, config.seed, index)
        for client in curious.victims(index, present)[:1]:
            victim = learner.victim(received, index, client)
            threat = curious.threat(Round(index, seed=config.seed), client, len(present), received, victim)
            row = open_updates([received], reference=received).map(unread, clients=[client_name(client)])
            try:
                curious.reconstruct(row, threat)
            except LookedAtError:
                return


def unread(*block: object) -> NoReturn:
    """Stands for what a client sent while nobody has sent anything."""
    raise LookedAtError
