"""The picture of images that an update revealed, each below the one that was trained on."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fedllm_sec.attacks.reconstruction.judge import Bounds, Pair, match_images, pixels
from fedllm_sec.attacks.reconstruction.revealed import RevealedImages
from fedllm_sec.reports.figure import COLOURS
from fedllm_sec.updates.files import atomic_file

SHOWN_IMAGES, COLUMNS = 32, 8  # at most, and in a line


def draw_images(
    revealed: RevealedImages, truth: Tensor | None, labels: Tensor | None, bounds: Bounds, folder: Path, name: str
) -> Path:
    """Draw what was found below the true images that it is taken for, the best first, as `<name>.png`.

    Args:
        revealed: (n, C, H, W) or (n, H, W).
        truth: (m, ...) likewise, as the model takes them; None: it is not known, and what was found stands alone.
        labels: (m,) int64 of the truth.
        bounds: see `judge.pixels`.
        folder: an existing one.
        name: of the file.

    Returns:
        The path; of the same images, a file of the same bytes.
    """
    from matplotlib.figure import Figure

    found, said = pixels(revealed.images, bounds), revealed.labels.tolist()
    pairs = [] if truth is None else sorted(match_images(revealed, truth, bounds), key=lambda pair: pair.mse)
    places = [pair.revealed for pair in pairs] if truth is not None else list(range(len(found)))
    places = places[:SHOWN_IMAGES]
    columns, deep = min(max(len(places), 1), COLUMNS), 1 if truth is None else 2
    lines = -(-len(places) // columns) or 1
    figure = Figure(figsize=(1.25 * columns + 0.5, (1.5 * deep + 0.35) * lines), layout="constrained")
    panels = [part.subplots(deep, columns, squeeze=False) for part in figure.subfigures(lines, 1, squeeze=False).flat]
    for panel in (panel for line in panels for panel in line.flat):
        panel.set_axis_off()
    for i, place in enumerate(places):
        line, column = divmod(i, columns)
        below = panels[line][-1, column]
        if truth is not None:
            pair, above = pairs[i], panels[line][0, column]
            true = None if labels is None else int(labels[pair.true])
            show(above, pixels(truth[pair.true], bounds), true)
            under(below, pair)
            if column == 0:
                beside(above, "trained on")
                beside(below, "found")
        show(below, found[place], said[place], wrong=truth is not None and true not in (None, said[place]))
    path = folder / f"{name}.png"
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return path


def show(panel: Any, image: Tensor, label: int | None, *, wrong: bool = False) -> None:
    """One image in 0..1, (C, H, W) or (H, W), with its class above it; of channels that are no colours the first."""
    if image.dim() == 3:
        image = image.movedim(0, -1) if image.shape[0] == 3 else image[0]
    panel.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if label is not None:
        panel.set_title(f"class {label}", fontsize=8, pad=2, color=COLOURS[1] if wrong else "black")


def under(panel: Any, pair: Pair) -> None:
    """How good it is."""
    panel.text(0.5, -0.04, f"{pair.psnr:.1f} dB", ha="center", va="top", fontsize=9, transform=panel.transAxes)


def beside(panel: Any, text: str) -> None:
    """What a line of images shows."""
    panel.text(-0.06, 0.5, text, ha="right", va="center", rotation=90, fontsize=8, transform=panel.transAxes)
