"""Derive the architecture that a search has reached, for model.name=darts_network.

python scripts/derive_architecture.py runs/fednas_search-laptop/benign/global_0030 genotype.json
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedllm_sec.models.genotype import genotype_of
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import write_json

console = Console(stderr=True)


def main(
    model: Annotated[Path, typer.Argument(help="A global model of a run: RUN/ARM/global_0005.")],
    out: Annotated[Path, typer.Argument(help="The JSON file to write.")],
) -> None:
    """Write the genotype, and print it: each node's two edges, as operation and source."""
    try:
        genotype = genotype_of(model)
        write_json(out, genotype.model_dump())
    except (InputError, OSError) as error:
        console.print(f"error: {error}", highlight=False, soft_wrap=True, markup=False)
        sys.exit(2)
    for kind, cell in genotype:
        for node, edges in enumerate(cell):
            terms = " + ".join(f"{operation}({source})" for operation, source in edges)
            print(f"{kind:6} node {node + 2} = {terms}")


if __name__ == "__main__":
    typer.run(main)
