"""What a search found: a genotype, where it comes from, and the network that it describes.

Shapes: images are (n, C, H, W); an alpha is (edges, operations) as in `fedllm_sec.models.search`.
"""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedllm_sec.models.model import Builder, Shape, model
from fedllm_sec.models.search import (
    COLUMNS,
    OPERATIONS,
    PAPER,
    Cell,
    CellNetwork,
    Cells,
    Count,
    Operation,
    Place,
    all_edges,
    checked_images,
    operation,
    places,
)
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json
from fedllm_sec.updates.sources import MODEL_FILE

KEPT = 2  # edges to each node
Edge = tuple[Operation, Annotated[int, Field(ge=0)]]
Node = tuple[Edge, Edge]
CellGenotype = Annotated[tuple[Node, ...], Field(min_length=1)]


class Genotype(BaseModel):
    """A derived architecture: for each node of a cell its two edges, each an operation and the source it is applied to.

    Sources 0 and 1 are the cell's inputs (the output of the cell before the last, and of the last), 2 + j is node j.

    Attributes:
        normal: of the cells that keep the size.
        reduce: of the cells that halve it; as many nodes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    normal: CellGenotype
    reduce: CellGenotype

    @model_validator(mode="after")
    def check(self) -> "Genotype":
        """Edges come from two sources, the inputs or nodes before; both kinds of cells have as many nodes."""
        if len(self.normal) != len(self.reduce):
            raise ValueError(f"normal has {len(self.normal)} nodes and reduce {len(self.reduce)}; they need as many")
        for kind, cell in (("normal", self.normal), ("reduce", self.reduce)):
            for node, edges in enumerate(cell):
                sources = {source for _, source in edges}
                if len(sources) < KEPT or max(sources) >= 2 + node:
                    raise ValueError(f"{kind}, node {node}: its edges need two different sources of 0 to {node + 1}")
        return self


def derive(normal: Tensor, reduce: Tensor) -> Genotype:
    """The discrete architecture of alphas, as in section 2.4 of the DARTS paper.

    An edge is as strong as its strongest operation other than `none`, by its share of the softmax over all operations.
    Each node keeps its two strongest edges, with their strongest operations; the first of equals wins.

    Args:
        normal: (edges, operations) logits.
        reduce: likewise.

    Raises:
        InputError: if they are no alphas of a search, or not finite.
    """
    return Genotype(normal=derived_cell(normal, "alpha_normal"), reduce=derived_cell(reduce, "alpha_reduce"))


def derived_cell(alpha: Tensor, name: str) -> tuple[Node, ...]:
    """One kind of cell; its edges are ordered by their sources."""
    sources = all_edges(nodes_of(alpha, name))
    strength, best = alpha.double().log_softmax(dim=1)[:, 1:].max(dim=1)
    cell, start = [], 0
    for node in sources:
        order = strength[start : start + len(node)].argsort(descending=True, stable=True)
        one, other = sorted(order[:KEPT].tolist())
        cell.append(((OPERATIONS[best[start + one]], one), (OPERATIONS[best[start + other]], other)))
        start += len(node)
    return tuple(cell)


def nodes_of(alpha: Tensor, name: str) -> int:
    """How many nodes a cell with this alpha has.

    Raises:
        InputError: if it is no alpha.
    """
    edges = len(alpha) if alpha.dim() == 2 and alpha.shape[1] == len(COLUMNS) else 0
    nodes = next((n for n in range(1, edges) if n * (n + 3) == 2 * edges), 0)
    if not nodes:
        raise InputError(
            f"{name} of shape {list(alpha.shape)} is no alpha of a search: it needs 2, 5, 9, 14 ... edges with "
            f"{len(COLUMNS)} operations"
        )
    if not torch.isfinite(alpha).all():
        raise InputError(f"{name} holds NaN or infinite values: take the alphas of an earlier round")
    return nodes


def genotype_of(folder: Path) -> Genotype:
    """The architecture that a search has reached.

    Args:
        folder: a global model of a run, such as `runs/fednas_search-laptop/benign/global_0030`.

    Raises:
        InputError: if there is no model, or none of a search.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise InputError(f"{folder}: has no {MODEL_FILE}; give a global model of a run, such as RUN/benign/global_0005")
    try:
        with safe_open(path, framework="pt") as file:
            if missing := {"alpha_normal", "alpha_reduce"} - set(file.keys()):
                raise InputError(
                    f"{path}: has no {' and no '.join(sorted(missing))}; only a run with model.name=darts searches"
                )
            normal, reduce = file.get_tensor("alpha_normal"), file.get_tensor("alpha_reduce")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is no readable safetensors file ({error})") from None
    return derive(normal, reduce)


def read_genotype(path: Path) -> Genotype:
    """A genotype from a JSON file, as `scripts/derive_architecture.py` writes it.

    Raises:
        InputError: if it cannot be read, or describes no network.
    """
    try:
        return Genotype.model_validate(read_json(path))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors()[:3])
        raise InputError(f"{path}: is no genotype ({faults}); scripts/derive_architecture.py writes one") from None


@model("darts_network", paper=PAPER)
def darts_network(*, genotype: Path, channels: Count = 16, cells: Cells = 8) -> Builder:
    """A network of the architecture that a search found; `genotype` is its JSON file (scripts/derive_architecture.py).

    The defaults are for a laptop; the paper's are 36 channels and 20 cells: 3,349,342 weights for CIFAR-10 and the
    paper's second architecture. Departs from the paper: no auxiliary head and no dropped paths, which are
    regularisation for 600 epochs.
    """
    found = read_genotype(genotype)

    def build(shape: Shape) -> nn.Module:
        images, nodes = checked_images(shape, "darts_network"), len(found.normal)
        made = [discrete_cell(place, found) for place in places(cells, channels, nodes)]
        network = CellNetwork(images, shape.classes, channels, made)
        network.architecture = found.model_dump_json()
        return network

    return build


def discrete_cell(place: Place, found: Genotype) -> Cell:
    """A cell with the two edges of each node."""
    nodes = found.reduce if place.reduces else found.normal
    edges = [
        operation(name, place.channels, 2 if place.reduces and source < 2 else 1, affine=True)
        for node in nodes
        for name, source in node
    ]
    return Cell(place, [[source for _, source in node] for node in nodes], edges, affine=True)
