"""Runs of several seeds: which belong together, and the curve, band and table that they become."""

import numpy as np
import pytest
from PIL import Image

from fedllm_sec.reports.figure import draw, picture
from fedllm_sec.reports.page import report
from fedllm_sec.reports.read import grouped, read_run
from fedllm_sec.reports.table import rows
from tests.reports.planted import plant, row

ENDS = ((0.2, 0.4), (0.3, 0.7), (0.7, 0.4))  # of three seeds, after rounds 1 and 2


@pytest.fixture
def seeds(tmp_path):
    """Three runs of one experiment."""
    return [
        plant(tmp_path / f"s{i}", {"benign": [0.1, *ends], "random": [0.1, 0.05 * i, 0.1]}, seed=i)
        for i, ends in enumerate(ENDS)
    ]


def groups_of(*folders):
    return grouped([read_run(folder) for folder in folders])


def lines_and_bands(figure):
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.lines}, list(axes.collections)


def test_runs_that_differ_by_seed_and_folder_alone_belong_together(tmp_path, seeds):
    other = plant(tmp_path / "longer", {"benign": [0.1, 0.2, 0.3, 0.4]}, seed=7)
    again = plant(tmp_path / "again", {"benign": [0.1, 0.2, 0.2], "random": [0.1, 0.2, 0.2]}, seed=1)
    groups = groups_of(seeds[0], other, *seeds[1:], again)
    assert [[run.folder.name for run in group.runs] for group in groups] == [["s0", "s1", "s2"], ["longer"], ["again"]]
    assert [group.name for group in groups] == ["s0 (3 seeds)", "longer", "again"]


def test_a_curve_is_the_mean_of_its_seeds_in_a_band_of_all(seeds):
    lines, bands = lines_and_bands(picture(groups_of(*seeds), "accuracy"))
    assert set(lines) == {"benign", "random", "commonest label (10.0%)"}
    np.testing.assert_allclose(lines["benign"].get_ydata(), [0.1, 0.4, 0.5])
    corners = bands[0].get_paths()[0].vertices
    for round_, low, high in ((0, 0.1, 0.1), (1, 0.2, 0.7), (2, 0.4, 0.7)):
        here = corners[corners[:, 0] == round_, 1]
        np.testing.assert_allclose([here.min(), here.max()], [low, high])
    assert "mean of 3 seeds" in picture(groups_of(*seeds), "accuracy").axes[0].get_title()


def test_a_run_alone_has_neither_band_nor_note(seeds):
    figure = picture(groups_of(seeds[0]), "accuracy")
    lines, bands = lines_and_bands(figure)
    assert not bands
    assert figure.axes[0].get_title() == ""
    np.testing.assert_array_equal(lines["benign"].get_ydata(), [0.1, 0.2, 0.4])


def test_the_same_data_is_the_same_bytes(tmp_path, seeds):
    for name in "ab":
        (tmp_path / name).mkdir()
    first, again = (draw(groups_of(*seeds), "accuracy", tmp_path / name) for name in "ab")
    assert [path.name for path in first] == ["accuracy.png", "accuracy.svg"]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    fewer = draw(groups_of(*seeds[:2]), "accuracy", tmp_path / "b")
    assert first[0].read_bytes() != fewer[0].read_bytes()
    with Image.open(first[0]) as image:
        assert image.size == (960, 600)


def test_no_line_is_under_the_legend_and_shares_are_on_a_plain_scale(tmp_path):
    arms = {f"arm_{i}": [row(0.001, loss=0.01), row(0.9, loss=9.0)] for i in range(6)}
    group = groups_of(plant(tmp_path / "run", arms))
    figure = picture(group, "accuracy")
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x0 >= figure.axes[0].get_window_extent().x1
    assert figure.axes[0].get_yscale() == "linear"
    assert picture(group, "test_loss").axes[0].get_yscale() == "log"


def test_the_table_has_mean_and_range(seeds):
    head, body = rows(groups_of(*seeds))
    assert head == ["arm", "round", "test loss", "accuracy"]
    assert body[0] == ["before training", "0", "1.000 (1.000 to 1.000)", "10.0% (10.0% to 10.0%)"]
    assert body[1] == ["benign", "2", "1.000 (1.000 to 1.000)", "50.0% (40.0% to 70.0%)"]
    assert rows(groups_of(seeds[1]))[1][1] == ["benign", "2", "1.000", "70.0%"]


def test_a_seed_that_diverged_or_has_not_come_so_far_is_told(tmp_path):
    whole = [row(0.1), row(0.4), row(0.6)]
    plant(tmp_path / "s0", {"benign": whole, "random": [row(0.1), row(0.1), row(0.1, loss=None)]})
    plant(tmp_path / "s1", {"benign": whole, "random": []}, seed=1)
    plant(tmp_path / "s2", {"benign": whole, "random": whole[:2]}, seed=2)
    groups = groups_of(*(tmp_path / f"s{i}" for i in range(3)))
    _, body = rows(groups)
    assert body[2] == ["random (2 of 3 seeds)", "1 to 2", "diverged in 1 of 2", "25.0% (10.0% to 40.0%)"]
    lines, _ = lines_and_bands(picture(groups, "test_loss"))
    assert lines["random (2 of 3 seeds)"].get_xdata().tolist() == [0, 1]
    lines, _ = lines_and_bands(picture(groups, "accuracy"))  # after round 2 one of the two alone is no mean of both
    assert lines["random (2 of 3 seeds)"].get_xdata().tolist() == [0, 1]
    assert lines["benign"].get_xdata().tolist() == [0, 1, 2]


def test_a_generators_metrics_are_drawn_and_tabled(tmp_path):
    seen = {"discriminator_loss": 1.2, "generator_loss": 0.7, "frechet_pca": 345.678}
    page = report([plant(tmp_path / "run", {"benign": [seen, seen]})])
    assert {path.stem for path in page.parent.glob("*.svg")} == set(seen)
    assert "<td>345.7</td><td>1.200</td><td>0.700</td>" in page.read_text()


def test_the_page_says_how_many_seeds_and_shows_one_configuration(tmp_path, seeds):
    page = report(seeds).read_text()
    assert "<h1>s0 (3 seeds)</h1>" in page
    assert page.count("<h2>Configuration of") == 1
    assert "That of s1, s2 differs in seed and folder alone." in page
    other = plant(tmp_path / "longer", {"benign": [0.1, 0.2, 0.3, 0.4]})
    both = report([*seeds, other], tmp_path / "both").read_text()
    assert both.count("<h2>Configuration of") == 2
    assert "<td>s0 (3 seeds): random</td>" in both
    assert "<td>longer: benign</td>" in both
