"""Small clients that are attacked: their networks, their images, and what they send."""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional

from fedllm_sec import Round, Threat, attack
from fedllm_sec.settings import TrainingSettings
from fedllm_sec.tasks.arrays import Arrays
from fedllm_sec.training.plan import Plan
from fedllm_sec.training.small import train_one
from fedllm_sec.updates import stack_updates
from fedllm_sec.victim import Victim

BLACK_AND_WHITE = torch.tensor(0.0), torch.tensor(1.0)


def seeded(seed, make):
    """What `make` draws from torch's global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def lenet(seed, channels=1, side=16, classes=10):
    """The network of Zhu et al. 2019 (their code): weights and biases are from U(-0.5, 0.5)."""

    def make():
        net = nn.Sequential(
            nn.Conv2d(channels, 12, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2, stride=1), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(12 * (side // 4) ** 2, classes),
        )  # fmt: skip
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        return net

    return seeded(seed, make)


def strided(seed, width=16, side=16, classes=10):
    """Three convolutions, of which two halve the size, with GELU."""
    return seeded(seed, lambda: nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, stride=2), nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2), nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(width * (side // 4) ** 2, classes),
    ))  # fmt: skip


def perceptron(seed, inputs=64, hidden=100, classes=10, activation=nn.ReLU, bias=True):
    """Three linear layers."""
    return seeded(seed, lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation(),
        nn.Linear(hidden, classes, bias=bias),
    ))  # fmt: skip


def smooth_images(n, channels, side, seed):
    """(n, C, H, W) images from 0 to 1 without an edge: 4 x 4 random values, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, channels, 4, 4, generator=generator)
    large = functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
    low, high = large.amin((1, 2, 3), keepdim=True), large.amax((1, 2, 3), keepdim=True)
    return (large - low) / (high - low)


def weights_of(net):
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def gradient_row(net, x, y):
    """Minus the gradient: what a step of SGD at a learning rate of 1 changes."""
    slopes = torch.autograd.grad(functional.cross_entropy(net.train()(x), y), list(net.parameters()))
    return {name: -slope for (name, _), slope in zip(net.named_parameters(), slopes, strict=True)}


def trained_row(net, x, y, victim, max_grad_norm=None):
    """What a client of the real trainer sends: batches are the examples in their order, the same in each epoch."""
    size, indices, sizes = victim.batch_size, [], []
    starts = range(0, len(x), size)
    for step in range(victim.steps):
        start = starts[step % len(starts)]
        batch = torch.arange(start, min(start + size, len(x)))
        indices.append(functional.pad(batch, (0, size - len(batch))))
        sizes.append(len(batch))
    settings = TrainingSettings(
        optimizer=victim.optimizer, learning_rate=victim.learning_rate, momentum=victim.momentum,
        weight_decay=victim.weight_decay, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    received = {name: value.clone() for name, value in net.state_dict().items()}
    work = Plan(torch.stack(indices), torch.tensor(sizes))
    sent, _ = train_one(net, received, Arrays(x, y, None), work, settings, lambda batch: batch)
    net.load_state_dict(received)
    return {name: sent[name] - received[name] for name, _ in net.named_parameters()}


def noise_row(net, seed=0, scale=0.01):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(value.shape, generator=generator) for name, value in net.named_parameters()}


def threat_on(reference, victim, clients=1, seed=0):
    received = stack_updates([reference], [1.0])
    return Threat(Round(seed=seed), (), tuple(range(clients)), received, "all", victim=victim)


def looked(name, net, row, victim, samples=1.0, seed=0, **parameters):
    """What an attack finds in one client's row."""
    method = attack.build(name, parameters)
    (found,) = method.reconstruct_data(stack_updates([row], [samples]), threat_on(weights_of(net), victim, seed=seed))
    return found


def errors(found, true):
    """Mean squared errors, each revealed image taken for another true one so that they are least; and for which."""
    table = ((found[:, None] - true[None]) ** 2).flatten(2).mean(dim=2).numpy()
    rows, columns = linear_sum_assignment(table)
    return table[rows, columns], columns[np.argsort(rows)]


def psnr(found, true):
    """The least PSNR in dB of images from 0 to 1."""
    return 10 * math.log10(1 / max(errors(found, true)[0].max(), 1e-15))


def victim_on(net, shape, classes=10, **known):
    return Victim(model=net, shape=shape, classes=classes, bounds=BLACK_AND_WHITE, **known)
