"""The page of what an update revealed: all of it is there, nothing else is loaded, and no text can become markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fedllm_sec.attacks.reconstruction.judge import judge_images, judge_text
from fedllm_sec.attacks.reconstruction.revealed import FoundToken, RevealedImages, RevealedLabels, RevealedText
from fedllm_sec.reports.reconstructed_images import draw_images
from fedllm_sec.reports.reconstruction import reconstruction_page

WORDS = ["the", " patient", " <script>alert('x')</script>", " & co", "\n", " of", "", " banana"]
BLACK_AND_WHITE = (torch.tensor(0.0), torch.tensor(1.0))


def decode(ids):
    return "".join(WORDS[token] for token in ids)


def text(tokens=(), sentences=(), **changes):
    given = {"client": "client_<3>", "method": "lora_tokens", "certificate": 0.875, "certain": True} | changes
    return RevealedText(
        **{"why": "a <b> & c", "seconds": 2.5, **given}, tokens=tuple(tokens), sentences=sentences, rank=5
    )


class Parts(HTMLParser):
    """The texts of a page by the class of their element, and what its elements would load."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.loads = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loads += [value for key, value in given.items() if key in ("src", "href")]
        assert tag != "script"
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, given.get("class", "").strip()))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for name in {kind for _, kind in self.open} | {tag for tag, _ in self.open}:
            self.texts.setdefault(name, []).append(data)

    def of(self, name):
        return self.texts.get(name, [])


TOKENS = [FoundToken(0, 1.0, 1.0), FoundToken(2, 0.9, 0.5), FoundToken(6, 0.8, 0.2), FoundToken(7, 0.25, 0.1)]
TRUTH = [(0, 1, 2), (0, 3, 4, 5)]


def test_the_truth_is_marked_token_by_token():
    parts = Parts(reconstruction_page(text(TOKENS), decode, TRUTH, judge_text(text(TOKENS), TRUTH)))
    assert parts.of("hit")[1:] == ["the", WORDS[2], "the"]
    assert parts.of("missed")[1:] == [" patient", " & co\n of"]
    assert parts.of("hit")[0] == "2 found"
    assert parts.of("missed")[0] == "4 missed"
    assert "".join(parts.of("text")) == decode(TRUTH[0]) + decode(TRUTH[1])
    false = "".join(parts.of("chip false"))
    assert "banana" in false
    assert "6" in false  # written as nothing: its number stands for it
    right = "".join(parts.of("chip"))
    assert "the" in right
    assert "banana" not in right


def test_the_summary_says_who_how_and_how_sure():
    page = reconstruction_page(text(TOKENS, ((0, 1),)), decode)
    told = "".join(Parts(page).of("dl"))
    counted = "4 distinct tokens and 1 sentence"
    for said in ("client_<3>", "lora_tokens", counted, "rank 5", "0.8750", "certain", "a <b> & c", "2.5 s"):
        assert said in told
    assert "not certain" not in told
    assert "not certain" in "".join(Parts(reconstruction_page(text(certain=False), decode)).of("dl"))
    assert "Took" not in reconstruction_page(text(seconds=0.0), decode)


def contrast(one, other):
    """WCAG 2's, between two colours of channels in 0..1."""
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour] for colour in (one, other)]
    low, high = sorted(float(np.dot([0.2126, 0.7152, 0.0722], colour)) for colour in linear)
    return (high + 0.05) / (low + 0.05)


def test_chips_are_shaded_by_their_scores_and_can_be_read_on_every_ground():
    scores = np.linspace(0, 1, 41).round(3).tolist()
    page = reconstruction_page(text([FoundToken(0, score, 1.0) for score in scores]), decode)
    chips = re.findall(r"rgba\(0, 94, 148, ([0-9.]+)\); color: (black|white)", page)
    assert [float(shade) for shade, _ in chips] == scores
    for score, ink in zip(scores, [ink for _, ink in chips], strict=True):
        ground = [1 - score + score * channel / 255 for channel in (0, 94, 148)]
        assert contrast(ground, [float(ink == "white")] * 3) >= 4.5, score  # enough for small letters (AA)


def test_nothing_is_loaded_from_elsewhere_and_no_text_is_markup():
    page = reconstruction_page(text(TOKENS, ((2, 3),)), decode, TRUTH, judge_text(text(TOKENS), TRUTH))
    assert Parts(page).loads == []
    assert "<script" not in page
    assert "http" not in page
    assert "client_<3>" not in page


def test_without_a_truth_nothing_is_said_of_it():
    page = reconstruction_page(text(TOKENS), decode)
    for absent in ("Compared with the truth", "What was trained on", "Found, but not there"):
        assert absent not in page
    assert "not their order" in page
    assert "banana" in page


def test_without_a_tokenizer_there_are_numbers():
    page = reconstruction_page(text([FoundToken(4711, 1.0, 1.0)], ((4711, 4712),)))
    assert "4711 4712" in page


def test_blanks_that_a_tokenizer_writes_between_tokens_are_kept():
    """SentencePiece and WordPiece write a token alone without the blank before it."""
    words = {1: "the", 2: "patient", 3: "sleeps", 4: "well"}
    page = reconstruction_page(
        text([FoundToken(2, 1.0, 1.0)]), lambda ids: " ".join(words[token] for token in ids), [(1, 2, 3, 4)]
    )
    parts = Parts(page)
    assert "".join(parts.of("text")) == "the patient sleeps well"
    assert parts.of("missed")[1:] == ["the", " sleeps well"]


def test_a_character_of_several_tokens_comes_out_whole_where_all_of_them_are_of_one_kind():
    pieces = "naïve café".encode()
    page = reconstruction_page(text(), lambda ids: bytes(ids).decode("utf-8", "replace"), [tuple(pieces)])
    assert "naïve café" in page


def test_what_is_too_much_for_a_page_is_counted():
    tokens = [FoundToken(token, 1.0, 1.0) for token in range(1500)]
    page = reconstruction_page(text(tokens), str, [(token,) for token in range(100)])
    assert "76 more texts are not shown" in page
    found = reconstruction_page(text(tokens), str)
    assert "and 500 more" in found
    assert found.count("class='chip '") == 1000


@pytest.mark.parametrize("counts", [None, (4, 2), (0, 4, 0, 2)])
def test_labels_have_a_page_too(counts):
    found = RevealedLabels("client_00", "label_counts", 1.0, True, "", 0.0, (1, 3), counts)
    page = reconstruction_page(found, metrics={"label_recall": 0.5, "label_count_l1": 3.0})
    assert "50.0%" in page
    cells = "".join(Parts(page).of("td")) if counts else page
    assert all(str(count) in cells for count in counts or (1, 3))


def images(n, shape=(1, 9, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand((n, *shape), generator=generator)
    return RevealedImages("client_00", "dlg", 0.5, False, "", 0.0, x, torch.arange(n), 0.25)


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 8, 12), (10, 10)])
@pytest.mark.parametrize("count", [1, 9])
def test_a_picture_shows_every_pair_and_the_same_images_are_the_same_bytes(tmp_path, shape, count):
    found = images(count, shape)
    true, labels = images(count, shape, seed=1).images, torch.arange(count)
    path = draw_images(found, true, labels, BLACK_AND_WHITE, tmp_path, "client_00")
    assert path == tmp_path / "client_00.png"
    first = path.read_bytes()
    assert draw_images(found, true, labels, BLACK_AND_WHITE, tmp_path, "client_00").read_bytes() == first
    with Image.open(path) as picture:
        assert picture.width > picture.height / 3
    page = reconstruction_page(found, metrics=judge_images(found, true, labels, BLACK_AND_WHITE), drawing=path)
    assert "data:image/png;base64," in page
    assert "PSNR" in page


def test_the_true_image_stands_above_the_one_that_was_found(tmp_path):
    """A white one above a black one."""
    black = replace(images(1), images=torch.zeros(1, 1, 9, 9))
    path = draw_images(black, torch.ones(1, 1, 9, 9), torch.zeros(1, dtype=torch.int64), BLACK_AND_WHITE, tmp_path, "x")
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L"), dtype=float)
    height, width = grey.shape
    middle = grey[:, width // 2]
    assert middle[height // 4] == 255
    assert middle[height * 2 // 3] == 0


def test_a_picture_without_a_truth_and_of_nothing(tmp_path):
    draw_images(images(5), None, None, BLACK_AND_WHITE, tmp_path, "alone")
    draw_images(images(0), None, None, BLACK_AND_WHITE, tmp_path, "nothing")
    draw_images(images(0), torch.ones(1, 1, 9, 9), None, BLACK_AND_WHITE, tmp_path, "none_of_one")
    assert len(list(tmp_path.glob("*.png"))) == 3
