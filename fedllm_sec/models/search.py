"""The search space of DARTS and the network that holds all of it at once (Liu et al. 2019, arXiv:1806.09055).

A network is a chain of cells; a cell has two inputs, which are the outputs of the two cells before it, and nodes, each
of which sums what comes to it over edges from the inputs and from the nodes before it. Two cells, a third and two
thirds of the way, halve the image and double the channels (`reduce`); the others keep both (`normal`). While the search
goes on, each edge is a mix of all operations, by the softmax of one row of alpha, which all cells of a kind share.

Shapes: images are (n, C, H, W); an alpha is (edges, operations), `edges` = `nodes` * (`nodes` + 3) / 2.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from fedllm_sec.models.model import Builder, Shape, image_shape, model
from fedllm_sec.models.residual import GlobalAverage
from fedllm_sec.updates.errors import InputError

PAPER = "Liu et al. 2019, arXiv:1806.09055; He et al. 2020 (FedNAS), arXiv:2004.08546"
Operation = Literal[
    "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
COLUMNS = ("none", *OPERATIONS)  # of an alpha; `none` is zero, and no operation of a derived network
STEM = 3  # times `channels` come out of the first convolution, as in the authors' code
FIRST_SPREAD = 1e-3  # standard deviation of the first alphas, as there
Count = Annotated[int, Field(ge=1)]
Cells = Annotated[int, Field(ge=3)]  # fewer would all halve


class Place(NamedTuple):
    """Where a cell stands.

    Attributes:
        before: channels of its first input, the output of the cell before the last.
        last: channels of its second input.
        channels: of each of its nodes.
        reduces: whether it halves the image.
        after_reduction: whether the last cell did, so that the first input is twice as large as the second.
    """

    before: int
    last: int
    channels: int
    reduces: bool
    after_reduction: bool


def places(cells: int, channels: int, nodes: int) -> Iterator[Place]:
    """The cells of a network, from the image to the head."""
    before = last = STEM * channels
    after_reduction = False
    for index in range(cells):
        reduces = index in (cells // 3, 2 * cells // 3)
        channels *= 2 if reduces else 1
        yield Place(before, last, channels, reduces, after_reduction)
        before, last, after_reduction = last, nodes * channels, reduces


def all_edges(nodes: int) -> list[list[int]]:
    """The sources of each node's edges while all are there: 0 and 1 are the cell's inputs, 2 + j is node j."""
    return [list(range(2 + node)) for node in range(nodes)]


def convolved(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU, a convolution of each channel alone, one of all channels at each pixel, batch normalisation."""
    padding = dilation * (kernel // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


class Halved(nn.Module):
    """Half the size without pooling: two convolutions of stride 2, the second one shifted by a pixel.

    Args:
        before: channels of the input, whose sides are even.
        channels: of the output, even.
        affine: whether the normalisation has weights.
    """

    def __init__(self, before: int, channels: int, affine: bool):
        super().__init__()
        self.even = nn.Conv2d(before, channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(before, channels // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """(n, before, H, W) -> (n, channels, H / 2, W / 2)."""
        x = x.relu()
        both: Tensor = self.norm(torch.cat([self.even(x), self.odd(x[..., 1:, 1:])], dim=-3))
        return both


def operation(name: Operation, channels: int, stride: int, *, affine: bool) -> nn.Module:
    """One operation: (n, channels, H, W) -> (n, channels, H / stride, W / stride).

    Those of section 3.1 of the paper: a separable convolution is done twice, a dilated one (by 2) once.
    """
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else Halved(channels, channels, affine)
    kernel = int(name[-1])
    if name.startswith("dil"):
        return nn.Sequential(*convolved(channels, kernel, stride, 2, affine))
    return nn.Sequential(*convolved(channels, kernel, stride, 1, affine), *convolved(channels, kernel, 1, 1, affine))


def added(terms: Sequence[Tensor]) -> Tensor:
    """Their sum; a copy of all of them side by side would cost as much as some operations do."""
    return sum(terms[1:], start=terms[0])


class Mixed(nn.Module):
    """All operations of an edge at once, each times its share; what pools is normalised, or its scale would decide."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.operations = nn.ModuleList()
        for name in OPERATIONS:
            made = operation(name, channels, stride, affine=False)
            norm = [nn.BatchNorm2d(channels, affine=False)] if "pool" in name else []
            self.operations.append(nn.Sequential(made, *norm))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        """Equation 2 of the paper; `shares` (operations,) sum to one, and `none`, the first, adds nothing."""
        return added([share * made(x) for share, made in zip(shares[1:], self.operations, strict=True)])


class Cell(nn.Module):
    """A cell: both inputs brought to one size and number of channels, nodes, and their concatenation.

    Args:
        place: where it stands.
        sources: of each node's edges, as in `all_edges`.
        edges: one module for each of them, in that order.
        affine: whether the normalisation has weights.
    """

    def __init__(self, place: Place, sources: Sequence[Sequence[int]], edges: Sequence[nn.Module], affine: bool):
        super().__init__()
        numbers = itertools.count()
        self.wiring = [[(next(numbers), source) for source in node] for node in sources]
        self.reduces, self.channels = place.reduces, len(sources) * place.channels
        self.first = (
            Halved(place.before, place.channels, affine)
            if place.after_reduction
            else pointwise(place.before, place.channels, affine)
        )
        self.second = pointwise(place.last, place.channels, affine)
        self.edges = nn.ModuleList(edges)

    def forward(self, before: Tensor, last: Tensor, shares: Tensor | None) -> Tensor:
        """The nodes' outputs, (n, nodes * channels, H, W) or half that size.

        Args:
            before: the output of the cell before the last.
            last: that of the last cell.
            shares: (edges, operations) where edges are mixed, else None.
        """
        states = [self.first(before), self.second(last)]
        for node in self.wiring:
            states.append(added([self.edges[k](states[source], *row_of(shares, k)) for k, source in node]))
        return torch.cat(states[2:], dim=-3)


def row_of(shares: Tensor | None, edge: int) -> tuple[Tensor, ...]:
    """What an edge takes besides its input: its shares if it is mixed."""
    return () if shares is None else (shares[edge],)


def pointwise(before: int, channels: int, affine: bool) -> nn.Module:
    """ReLU, a convolution of all channels at each pixel, batch normalisation."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(before, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=affine))


def channels_inside(x: Tensor) -> Tensor:
    """The same images with a pixel's channels side by side in memory, as all that is made of them then has.

    A CPU does convolutions of each channel alone so much faster that a step of the search takes a third less.
    (`torch.channels_last` says the same, but not under `vmap`.)
    """
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


class CellNetwork(nn.Module):
    """A first convolution, cells, the mean over all pixels, and a linear head."""

    def __init__(self, images: int, classes: int, channels: int, cells: Sequence[Cell]):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(images, STEM * channels, 3, padding=1, bias=False), nn.BatchNorm2d(STEM * channels)
        )
        self.cells = nn.ModuleList(cells)
        self.head = nn.Sequential(GlobalAverage(), nn.Linear(cells[-1].channels, classes))
        self.architecture = ""  # as text, where it is fixed: a run of another one is another run

    def forward(self, x: Tensor, normal: Tensor | None = None, reduce: Tensor | None = None) -> Tensor:
        """Logits (n, classes) of images; with mixed edges also the shares of both kinds of cells."""
        before = last = self.stem(channels_inside(x))
        for cell in self.cells:
            before, last = last, cell(before, last, reduce if cell.reduces else normal)
        logits: Tensor = self.head(last)
        return logits


@runtime_checkable
class Searched(Protocol):
    """A model with an architecture to be searched."""

    procedure: str

    def alphas(self) -> list[nn.Parameter]:
        """The parameters that say what the architecture is."""


class Supernet(nn.Module):
    """The network of all operations, and how much each counts.

    Attributes:
        alpha_normal: (edges, operations) logits of the cells that keep the size.
        alpha_reduce: those of the cells that halve it.
        procedure: how it is trained.
    """

    procedure = "milenas"

    def __init__(self, network: CellNetwork, nodes: int):
        super().__init__()
        self.network = network
        shape = (sum(map(len, all_edges(nodes))), len(COLUMNS))
        self.alpha_normal = nn.Parameter(FIRST_SPREAD * torch.randn(shape))
        self.alpha_reduce = nn.Parameter(FIRST_SPREAD * torch.randn(shape))

    def alphas(self) -> list[nn.Parameter]:
        """Of both kinds of cells."""
        return [self.alpha_normal, self.alpha_reduce]

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, classes) logits."""
        logits: Tensor = self.network(x, self.alpha_normal.softmax(dim=-1), self.alpha_reduce.softmax(dim=-1))
        return logits


def checked_images(shape: Shape, name: str) -> int:
    """The channels of the images; their sides must be halved twice.

    Raises:
        InputError: for tokens, and for sides that are less than 8 or no multiples of 4.
    """
    channels, height, width = image_shape(shape, name, least=8)
    if height % 4 or width % 4:
        raise InputError(f"model {name} takes images whose sides are multiples of 4, not {height} x {width}")
    return channels


@model("darts", paper=PAPER)
def darts(*, channels: Count = 8, cells: Cells = 3, nodes: Count = 2) -> Builder:
    """A network to search an architecture with, by training.procedure.name=milenas: every edge a mix of operations.

    The defaults are for a laptop; the paper's are 16 channels, 8 cells and 4 nodes: 1,930,618 weights for CIFAR-10 and
    224 alphas, of which a step of 64 images takes a CPU core minutes. Normalisation has no weights, as in the paper,
    because they would undo the shares.
    """

    def build(shape: Shape) -> nn.Module:
        images, sources = checked_images(shape, "darts"), all_edges(nodes)
        made = []
        for place in places(cells, channels, nodes):
            strides = [2 if place.reduces and source < 2 else 1 for node in sources for source in node]
            made.append(Cell(place, sources, [Mixed(place.channels, stride) for stride in strides], affine=False))
        return Supernet(CellNetwork(images, shape.classes, channels, made), nodes)

    return build
