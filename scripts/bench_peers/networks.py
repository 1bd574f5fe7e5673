"""The models in plain torch, for the peers; their state dicts are those of `fedllm_sec.models`."""

from torch import nn


def lr() -> nn.Module:
    """Logistic regression on 28 x 28 pixels: 7,850 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max pooling on images padded to 32 x 32: 61,706 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    """The CNN of McMahan et al. 2017: 1,663,370 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip


NETWORKS = {"lr": lr, "lenet": lenet, "cnn": cnn}
