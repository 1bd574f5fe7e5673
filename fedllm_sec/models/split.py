"""A residual network in two: a small network for each client, and the rest for the server (FedGKT).

Shapes: images are (n, C, H, W), features what the stem makes of them, (n, 16, H, W).
"""

from torch import Tensor, nn

from fedllm_sec.models.model import Builder, Shape
from fedllm_sec.models.residual import WIDTHS, Block, GlobalAverage
from fedllm_sec.updates.errors import InputError

CLIENT_BLOCKS = 3  # of two layers each: with the stem and the head 8 layers, the paper's ResNet-8


class Edge(nn.Module):
    """A client's network: an extractor of features, and a small classifier on them."""

    def __init__(self, extractor: nn.Module, classifier: nn.Module):
        super().__init__()
        self.extractor, self.classifier = extractor, classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C, H, W) -> the features, and (n, classes) logits."""
        features = self.extractor(x)
        return features, self.classifier(features)


class Halves(nn.Module):
    """The client's network, and the server's, which goes on from the client's features."""

    def __init__(self, edge: Edge, server: nn.Module):
        super().__init__()
        self.edge, self.server = edge, server

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, classes) logits of the server's network on the client's features."""
        logits: Tensor = self.server(self.edge.extractor(x))
        return logits


def cut(builder: Builder, shape: Shape, name: str) -> Halves:
    """Cut a residual network behind its stem, as He et al. 2020 do (arXiv:2007.14513, figure 1b).

    A network of L layers becomes a server's of L - 1 (resnet56: their ResNet-55) and a client's of 8: the stem, three
    blocks of its first stage and a head. The client's weights are drawn apart from the server's. For CIFAR-10 a
    client has 14,650 parameters, and the server that goes with resnet56 has 852,554.

    Args:
        builder: of the whole network.
        shape: what it is built for.
        name: of the model, for messages.

    Raises:
        InputError: for a model that is no residual network.
    """
    whole, small = builder(shape), builder(shape)
    if not (isinstance(whole, nn.Sequential) and isinstance(small, nn.Sequential)):
        raise no_blocks(name)
    stem = next((place for place, layer in enumerate(whole) if isinstance(layer, Block)), None)
    if stem is None:
        raise no_blocks(name)
    head = nn.Linear(WIDTHS[0], shape.classes)
    layers = list(small)
    classifier = nn.Sequential(*layers[stem : stem + CLIENT_BLOCKS], GlobalAverage(), head)
    return Halves(Edge(nn.Sequential(*layers[:stem]), classifier), nn.Sequential(*list(whole)[stem:]))


def no_blocks(name: str) -> InputError:
    """What to say of another model."""
    return InputError(f"fedgkt cuts a residual network in two: set model.name=resnet20 or resnet56, not {name}")
