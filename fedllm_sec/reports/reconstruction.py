"""What an update revealed, as one self-contained HTML page, beside the truth where that is known.

The page is for people who have to decide whether such updates may be sent: what was found, how far to trust it, and
what is right of it. No tokenizer is needed here: whoever asks brings a function that writes tokens as text.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

from fedllm_sec.attacks.reconstruction.revealed import (
    FoundToken,
    Revealed,
    RevealedImages,
    RevealedLabels,
    RevealedText,
)
from fedllm_sec.reports.figure import TITLES
from fedllm_sec.reports.heat_map import ink
from fedllm_sec.reports.page import STYLE, html_table, image
from fedllm_sec.reports.read import LEAKAGE, SHARES

Decode = Callable[[Sequence[int]], str]
SHOWN_TOKENS = 1000  # the surest
SHOWN_TEXTS = 24  # texts of the truth; a round may have gone over thousands
BLUE = (0, 94, 148)  # red, green and blue of a chip of score 1
MARKS = {"\n": "↵", "\t": "⇥", " ": "·"}  # what blanks look like at the edge of a token
LOOK = """
h1 small { display: block; font-size: 1rem; font-weight: 400; color: #555; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 1rem 0; }
dt { color: #555; } dd { margin: 0; }
.bar { display: inline-block; width: 9rem; height: .55rem; background: #e4e4e4; border-radius: .3rem; }
.bar span { display: block; height: 100%; border-radius: .3rem; background: #0072B2; }
.verdict { display: inline-block; border-radius: 1rem; padding: 0 .7rem; font-weight: 600; font-size: 14px; }
.certain { background: #0072B2; color: #fff; } .uncertain { background: #fdeec8; }
.chips { line-height: 2.1; }
.chip { border-radius: .3rem; padding: .15rem .4rem; margin: 0 .1rem; border: 1px solid #0072B255; white-space: nowrap;
  font: 14px ui-monospace, monospace; }
.chip i { font-style: normal; opacity: .45; } .chip sub { font: 10px system-ui, sans-serif; }
.false { border-color: #D55E00; color: #a04600; background: #fff; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #ddd; margin: .7rem 0;
  padding: .2rem 1rem; line-height: 1.75; }
.hit { background: #cfe4f2; border-radius: .2rem; } .missed { color: #a04600; border-bottom: 2px dashed #D55E00; }
.note { color: #555; font-size: 14px; }
.picture img { max-width: 100%; height: auto; } .picture figure { margin: 1rem 0; }
"""


def reconstruction_page(
    revealed: Revealed,
    decode: Decode | None = None,
    truth: Sequence[Sequence[int]] = (),
    metrics: Mapping[str, float] | None = None,
    drawing: Path | None = None,
) -> str:
    """The page's text.

    Args:
        revealed: what was found.
        decode: writes tokens as text; None: their numbers are shown.
        truth: token ids of the texts that were trained on, as far as they can be seen; none: it is not known.
        metrics: how the findings compare with the truth (`attacks.reconstruction.judge`).
        drawing: of images: what `reconstructed_images.draw_images` drew.
    """
    title = f"What the update of {revealed.client} reveals"
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{STYLE}{LOOK}</style>",
        f"<h1>{escape(title)}<small>{escape(KINDS.get(type(revealed), ''))}</small></h1>",
        summary(revealed),
        metrics_table(metrics or {}),
    ]
    if drawing is not None:
        caption = "Above what was trained on, below what was found" if metrics else "What was found"
        parts.append(f"<div class='picture'>{image(caption, drawing)}</div>")
    if isinstance(revealed, RevealedText):
        parts += text_parts(revealed, decode or numbers, truth)
    if isinstance(revealed, RevealedLabels):
        parts.append(labels_table(revealed))
    return "\n".join(part for part in parts if part) + "</html>\n"


KINDS: dict[type[Revealed], str] = {
    RevealedText: "Tokens of the texts that a language model's adapter was trained on, found in the adapter alone.",
    RevealedImages: "Images that a model was trained on, found in its update alone.",
    RevealedLabels: "Classes that a model was trained on, found in its update alone.",
}


def numbers(ids: Sequence[int]) -> str:
    """Tokens without a tokenizer."""
    return " ".join(map(str, ids))


def summary(revealed: Revealed) -> str:
    """Who, how, how sure and why."""
    verdict = "certain" if revealed.certain else "uncertain"
    shown = "certain" if revealed.certain else "not certain"
    share = min(max(revealed.certificate, 0.0), 1.0)
    lines = {
        "Client": escape(revealed.client),
        "Method": escape(revealed.method),
        "Found": escape(found(revealed)),
        "Certificate": f"<span class='bar'><span style='width: {share:.2%}'></span></span> {revealed.certificate:.4f} "
        "(how well what was found explains the update; 1: wholly)",
        "Verdict": f"<span class='verdict {verdict}'>{shown}</span> {escape(revealed.why)}",
    }
    if revealed.seconds:
        lines["Took"] = f"{revealed.seconds:,.1f} s"
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{told}</dd>' for name, told in lines.items())}</dl>"


def found(revealed: Revealed) -> str:
    """How much was found, in a line."""
    if isinstance(revealed, RevealedText):
        return (
            f"{counted(len(revealed.tokens), 'distinct token')} and {counted(len(revealed.sentences), 'sentence')}, "
            f"in an update of rank {revealed.rank}"
        )
    if isinstance(revealed, RevealedImages):
        return f"{counted(len(revealed.images), 'image')}, at a loss of {revealed.loss:.3g}"
    return f"{len(revealed.present)} classes" if isinstance(revealed, RevealedLabels) else ""


def counted(count: int, name: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def metrics_table(metrics: Mapping[str, float]) -> str:
    """How it compares with the truth; '' where that is not known."""
    if not metrics:
        return ""
    body = [[TITLES.get(f"{LEAKAGE}{name}", name), number(name, value)] for name, value in metrics.items()]
    return f"<h2>Compared with the truth</h2>{html_table(['measure', 'value'], body)}"


def number(name: str, value: float) -> str:
    """A share in per cent, anything else in four digits."""
    return f"{value:.1%}" if f"{LEAKAGE}{name}" in SHARES else f"{value:.4g}"


def text_parts(revealed: RevealedText, decode: Decode, truth: Sequence[Sequence[int]]) -> list[str]:
    """Tokens and sentences, and the true texts with what was found of them."""
    known, true = {token.id for token in revealed.tokens}, {token for text in truth for token in text}
    right = [token for token in revealed.tokens if token.id in true or not truth]
    wrong = [token for token in revealed.tokens if truth and token.id not in true]
    return [
        "<h2>Tokens</h2><p class='note'>The surest first; the darker, the more of a token's vector the update accounts "
        f"for (the small number; 1 is all).{' Those that were not there are listed below.' if wrong else ''}</p>",
        chips(right, decode),
        sentences(revealed, decode),
        *([true_texts(truth, known, decode), false_tokens(wrong, decode)] if truth else []),
    ]


def chips(tokens: Sequence[FoundToken], decode: Decode, kind: str = "") -> str:
    """Tokens, each in a box shaded by its score."""
    shown = " ".join(chip(token, decode, kind) for token in tokens[:SHOWN_TOKENS])
    rest = len(tokens) - SHOWN_TOKENS
    return f"<p class='chips'>{shown or 'None.'}{f' and {rest:,} more' if rest > 0 else ''}</p>"


def chip(token: FoundToken, decode: Decode, kind: str) -> str:
    """One token's box; blanks at its edges are made visible."""
    shade = min(max(token.score, 0.0), 1.0)
    ground = [1 - shade * (1 - part / 255) for part in BLUE]
    colours = "" if kind else f" style='background: rgba{(*BLUE, round(shade, 3))}; color: {ink(ground)}'"
    about = f"token {token.id}: score {token.score:.4f}, weight {token.weight:.4f}"
    return (
        f"<span class='chip {kind}'{colours} title='{about}'>{marked(decode([token.id]), token.id)} "
        f"<sub>{token.score:.2f}</sub></span>"
    )


def marked(text: str, token: int) -> str:
    """A token's text with marks for the blanks at its edges; its number where it is written as nothing."""
    inner = text.strip()
    if not inner and not text:
        return f"<i>{token}</i>"
    left = text[: len(text) - len(text.lstrip())] if inner else text
    right = text[len(text.rstrip()) :] if inner else ""
    edges = ["".join(f"<i>{MARKS.get(blank, '·')}</i>" for blank in side) for side in (left, right)]
    return edges[0] + escape(inner) + edges[1]


def sentences(revealed: RevealedText, decode: Decode) -> str:
    """Whole texts that were found."""
    if not revealed.sentences:
        return "<h2>Sentences</h2><p>None: only which tokens there were can be told, not their order.</p>"
    shown = "".join(f"<div class='text'>{escape(decode(ids).strip(' '))}</div>" for ids in revealed.sentences)
    return f"<h2>Sentences</h2>{shown}"


def true_texts(truth: Sequence[Sequence[int]], known: Collection[int], decode: Decode) -> str:
    """The truth: what was found of it on a blue ground, what was missed underlined."""
    distinct = {token for text in truth for token in text}
    hits = len(distinct & set(known))
    marks = f"<span class='hit'>{hits:,} found</span>, <span class='missed'>{len(distinct) - hits:,} missed</span>"
    texts = "".join(f"<div class='text'>{highlighted(text, known, decode)}</div>" for text in truth[:SHOWN_TEXTS])
    rest = len(truth) - SHOWN_TEXTS
    return (
        f"<h2>What was trained on</h2><p class='note'>{counted(len(truth), 'text')} of {len(distinct):,} distinct "
        f"tokens: {marks}.</p>{texts}" + (f"<p class='note'>{rest:,} more texts are not shown.</p>" if rest > 0 else "")
    )


def highlighted(text: Sequence[int], known: Collection[int], decode: Decode) -> str:
    """A text whose tokens are marked as found or missed, written as it is written as a whole.

    Neighbours of one kind are written together, so that a character that takes several tokens comes out right, and each
    behind the token before it, because many a tokenizer writes a blank only between tokens.
    """
    parts = []
    cuts = [i for i in range(1, len(text)) if (text[i] in known) != (text[i - 1] in known)]
    for start, stop in pairwise([0, *cuts, len(text)]):
        before, run = list(text[max(start - 1, 0) : start]), list(text[start:stop])
        said, whole = decode(before) if before else "", decode([*before, *run])
        written = whole.removeprefix(said) if whole.startswith(said) else decode(run)
        kind = "hit" if run and run[0] in known else "missed"
        parts.append(f"<span class='{kind}'>{escape(written if before else written.lstrip(' '))}</span>")
    return "".join(parts)


def false_tokens(wrong: Sequence[FoundToken], decode: Decode) -> str:
    """Tokens that are in no text that was trained on."""
    return f"<h2>Found, but not there</h2>{chips(wrong, decode, 'false')}"


def labels_table(revealed: RevealedLabels) -> str:
    """Classes, and how many examples of each where that is told."""
    if revealed.counts is None:
        return f"<h2>Classes</h2><p>{escape(', '.join(map(str, revealed.present)))}</p>"
    named = revealed.present if len(revealed.counts) == len(revealed.present) else range(len(revealed.counts))
    body = [[str(label), str(count)] for label, count in zip(named, revealed.counts, strict=True)]
    return f"<h2>Classes</h2>{html_table(['class', 'examples'], body)}"
