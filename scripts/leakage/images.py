"""The same on a small network and real digits: Soteria and noise against the search for a client's image.

The network has three convolutions and one linear layer, the defended one: its weight's gradient loses the columns that
Soteria chooses. Shapes: images are (n, 1, 28, 28) from 0 to 1.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedllm_sec import InputError, Round, Threat, UpdateSet, attack, stack_updates
from fedllm_sec.attacks.reconstruction.judge import judge_images
from fedllm_sec.defenses.client_side import Soteria, masked_gradient
from fedllm_sec.defenses.upload import UpdateNoise
from fedllm_sec.victim import Victim
from leakage.clients import sent, whole
from leakage.federation import together
from leakage.rows import Row, as_it_is, generator

DEFENDED = "7.weight"
BOUNDS = torch.tensor(0.0), torch.tensor(1.0)
SHAPE, CLASSES = (1, 28, 28), 10
CLIENTS, ROUNDS, STEPS, BATCH, RATE = 4, 10, 10, 10, 0.1
ATTACKS: Mapping[str, Mapping[str, object]] = {
    "inverting_gradients": {"iterations": 600, "restarts": 2},
    "dlg": {"iterations": 60, "restarts": 2, "label": "idlg"},
}


@dataclass(frozen=True)
class ImageRow:
    """One defense of the small network.

    Attributes:
        name: for `--only`.
        label: for people.
        percentile: Soteria's; 0: not used.
        noise: times the root mean square of the update; 0: none.
    """

    name: str
    label: str
    percentile: float = 0.0
    noise: float = 0.0

    @property
    def sends(self) -> Row:
        """What it does to an update."""
        return Row(self.name, self.label, UpdateNoise(self.noise).sent if self.noise else as_it_is)


IMAGE_ROWS = (
    ImageRow("image_plain", "none"),
    *(ImageRow(f"image_soteria_{p}", f"Soteria, {p} % of the entries", percentile=p) for p in (1, 40, 80)),
    *(ImageRow(f"image_noise_{s:g}", f"noise of {s:g} x the update's rms", noise=s) for s in (0.1, 0.3, 1.0, 3.0)),
)


class Digits(NamedTuple):
    """Images and labels."""

    x: Tensor
    y: Tensor


def digits(folder: Path, part: str) -> Digits:
    """MNIST.

    Raises:
        InputError: if it is not there.
    """
    import numpy as np

    path = folder / "mnist.npz"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of MNIST as mnist.npz (--mnist)")
    with np.load(path, allow_pickle=False) as arrays:
        x, y = torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"])
    return Digits(x[:, None].float() / 255, y.long())


def network(seed: int) -> nn.Sequential:
    """7,162 parameters, from a normal distribution that keeps the size of activations (He et al. 2015)."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2, stride=2), nn.GELU(),
        nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.GELU(),
        nn.Conv2d(12, 12, 3, padding=1, stride=2), nn.GELU(),
        nn.Flatten(), nn.Linear(192, CLASSES),
    )  # fmt: skip
    for name, parameter in net.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return net


def slopes(net: nn.Sequential, state: Mapping[str, Tensor], batch: Digits, percentile: float) -> dict[str, Tensor]:
    """The gradient of the mean cross entropy, as Soteria leaves it."""
    leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
    loss = functional.cross_entropy(functional_call(net, leaves, (batch.x,)), batch.y)
    made = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    if percentile:
        net.load_state_dict(dict(state))
        keep = Soteria(percentile).keep_for(net[:-1].forward, batch.x, chunk=192)
        made[DEFENDED] = masked_gradient(made[DEFENDED], keep)
    return made


def trained(
    net: nn.Sequential, state: Mapping[str, Tensor], batches: list[Digits], percentile: float
) -> dict[str, Tensor]:
    """After a step of SGD on each batch."""
    now = dict(state)
    for batch in batches:
        made = slopes(net, now, batch, percentile)
        now = {name: value - RATE * made[name] for name, value in now.items()}
    return now


def cost(row: ImageRow, train: Digits, test: Digits, seed: int, on_round: Callable[[], None]) -> float:
    """Test accuracy of a federation in which all clients use the defense."""
    net = network(seed)
    current = {name: value.detach().clone() for name, value in net.named_parameters()}
    for number in range(1, ROUNDS + 1):
        at = Round(index=number, seed=seed)
        rows = []
        for client in range(CLIENTS):
            draw = at.generator("batches", client)
            drawn = torch.randint(len(train.y) // CLIENTS, (STEPS, BATCH), generator=draw) * CLIENTS + client
            batches = [Digits(train.x[index], train.y[index]) for index in drawn]
            after = trained(net, current, batches, row.percentile)
            rows.append(sent(row.sends, after, current, f"client_{client}", at))
        change = whole(together(rows).mean())
        current = {name: value + change[name].reshape(value.shape) for name, value in current.items()}
        on_round()
    with torch.no_grad():
        return float((functional_call(net, current, (test.x,)).argmax(dim=1) == test.y).float().mean())


def hidden(
    row: ImageRow, train: Digits, images: int, seed: int, on_image: Callable[[], None]
) -> dict[str, list[float]]:
    """PSNR in dB of each image that each attack finds; `..., defended layer ignored`: it matches all other tensors."""
    found: dict[str, list[float]] = {}
    for number in range(images):
        net = network(seed + number)
        state = {name: value.detach().clone() for name, value in net.named_parameters()}
        place = int(torch.randint(len(train.y), (), generator=generator("image", seed, number)))
        batch = Digits(train.x[place : place + 1], train.y[place : place + 1])
        after = trained(net, state, [batch], row.percentile)
        update = sent(row.sends, after, state, "client_0", Round(seed=seed + number))
        for name, parameters in ATTACKS.items():
            found.setdefault(name, []).append(psnr(name, parameters, net, update, state, batch))
        ignored = "inverting_gradients, defended layer ignored"
        labels = {"client_0": (label_of(update),)}
        blind = {**ATTACKS["inverting_gradients"], "labels": labels}
        others = without(update, DEFENDED), {key: value for key, value in state.items() if key != DEFENDED}
        found.setdefault(ignored, []).append(psnr("inverting_gradients", blind, frozen(net), *others, batch))
        on_image()
    return found


def psnr(
    name: str,
    parameters: Mapping[str, object],
    net: nn.Module,
    update: UpdateSet,
    state: Mapping[str, Tensor],
    batch: Digits,
) -> float:
    """Of what an attack finds, in dB."""
    victim = Victim(learning_rate=RATE, model=net, shape=SHAPE, classes=CLASSES, bounds=BOUNDS)
    threat = Threat(Round(), (), (0,), stack_updates([dict(state)], [1.0]), "all", 1, victim=victim)
    method = attack.build(name, dict(parameters))
    assert method.reconstruct_data is not None
    (found,) = method.reconstruct_data(update, threat)
    return judge_images(found, batch.x, batch.y, BOUNDS)["psnr"]


def label_of(update: UpdateSet) -> int:
    """Of one example: the class whose bias alone is to rise (Zhao et al. 2020)."""
    return int(whole(update)[DEFENDED.replace("weight", "bias")].argmax())


def without(update: UpdateSet, tensor: str) -> UpdateSet:
    """An update that lacks one tensor."""
    shapes = dict(update.layout.shapes)
    kept = {name: value.reshape(shapes[name]) for name, value in whole(update).items() if name != tensor}
    return replace(stack_updates([kept], [1.0], update.clients), num_samples=update.num_samples)


def frozen(net: nn.Sequential) -> nn.Sequential:
    """A copy whose defended weight is a buffer, which nobody sends: all that is left is matched."""
    made = copy.deepcopy(net)
    defended = made[-1]
    weight = net.get_parameter(DEFENDED).detach().clone()
    del defended.weight
    defended.register_buffer("weight", weight)
    return made
