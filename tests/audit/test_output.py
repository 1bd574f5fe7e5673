"""What strangers write into adapters does no harm in any format, and all formats say the same."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from fedllm_sec.audit.findings import Audit, Finding, Severity, Statistics, Subject, gravest_first, suppressed
from fedllm_sec.audit.output.as_json import audit_json
from fedllm_sec.audit.output.clients_map import plane
from fedllm_sec.audit.output.html import audit_page, svg
from fedllm_sec.audit.output.markdown import audit_markdown, card_section
from fedllm_sec.audit.output.pictures import deviation, pictures, short_module
from fedllm_sec.audit.output.sarif import audit_sarif
from fedllm_sec.audit.output.text import audit_tables
from fedllm_sec.audit.output.words import jsonable, number, plain
from fedllm_sec.audit.policy import Policy
from fedllm_sec.audit.rules import RULES

HOSTILE = (
    "<script>alert(1)</script>",
    "[link](http://evil.example) https://evil.example www.evil.example @somebody #12",
    "a|b `c`\n| injected | row |\n\n# heading",
    "\x1b]8;;http://evil.example\x07\x1b[2J\x9b31m\u202egnp.exe",
    "[bold red]markup[/bold red] [/] :warning:",
    "lone \udcff surrogate ${'a'}$ {0} \\",
    "<!-- --> ]]> </pre></td>'\" onerror=alert(1) javascript:alert(1)",
    "x" * 100_000,
)
LEVELS = {Severity.CRITICAL: "error", Severity.HIGH: "error", Severity.MEDIUM: "warning", Severity.LOW: "note"}


def planted(n=10, layers=4, hostile=True, seed=0) -> Audit:
    """An audit with findings of all severities; adapter 1 is scaled, 2 and 3 are copies, 4 is zero, 5 holds NaN."""
    draws = np.random.default_rng(seed)
    names = [f"client_{i:02d}" for i in range(n)]
    if hostile:
        names[1 : 1 + len(HOSTILE)] = list(HOSTILE)[: max(n - 1, 0)]
    parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    modules = [f"base_model.model.gpt_neox.layers.{i}.{part}" for i in range(layers) for part in parts]
    norm, top1 = draws.lognormal(0, 0.4, (n, len(modules))), draws.uniform(0.3, 0.9, (n, len(modules)))
    rows = draws.standard_normal((n, 30)) + draws.standard_normal(30)
    z = np.abs(draws.standard_normal((2, n)))
    if n > 5:
        rows[1] *= 6
        norm[1] *= 6
        rows[3], rows[4] = rows[2], 0
        norm[4], norm[5, 0] = 0, np.nan
        z[:, 1], z[0, 5] = (40, 7), np.nan
    gram = rows @ rows.T
    if n > 5:
        gram[5] = gram[:, 5] = np.nan
    measures = {"norm": norm, "top1": top1}
    statistics = Statistics(
        tuple(names), tuple(modules), measures, gram, {"krum": z[0]}, {"krum": z[0], "cosine": z[1]}
    )
    subjects = tuple(
        Subject(name, Path(f"sent/c {i}"), {"adapter_model.safetensors": f"{i:064x}"}, 2**20, 8, compared=True)
        for i, name in enumerate(names)
    )
    return Audit(
        subjects,
        gravest_first(findings(names, hostile)),
        Severity.MEDIUM,
        Policy().as_json(),
        statistics,
        ("No base was given: W005 was not looked at.", *(HOSTILE if hostile else ())),
        {"bytes_read": 2.0**24, "passes": 2.0, "peak_memory": 2.0**28, "seconds": 1.25},
    )


def findings(names, hostile) -> list[Finding]:
    def finding(rule, i, message, **more):
        return Finding(RULES[rule], names[min(i, len(names) - 1)], message, RULES[rule].severity, **more)

    weights = "adapter_model.safetensors"
    found = [
        finding("KY001", 1, "lm_head.weight is no part of LoRA", file=weights, tensor="lm_head.weight", places=3),
        finding("W001", 1, "12.5 is past 6", measured=12.5, threshold=6.0),
        finding("P003", 1, "far longer", measured=np.float64(np.inf), threshold=6.0),
        finding("FS006", 0, "notes.txt", file="notes.txt", measured=[1, 2, 3, 4, 5, float("nan")]),
        finding("CF006", 0, "field a", file="adapter_config.json"),
        finding("CF006", 0, "field b", file="adapter_config.json"),
        suppressed(finding("FS014", 2, "a tokenizer", file="tokenizer.json"), HOSTILE[0] if hostile else "agreed"),
    ]
    if hostile:
        found += [finding("KY007", 2, f"there is {bad}", file=bad, tensor=bad, measured=bad) for bad in HOSTILE]
        found += [finding("FS012", 0, "leads out", file="../../../../../../etc/passwd")]
    return found


def printed(audit: Audit, width=140) -> str:
    console = Console(file=StringIO(), force_terminal=True, width=width, color_system="truecolor", legacy_windows=False)
    for part in audit_tables(audit):
        console.print(part)
    return console.file.getvalue()


def test_what_cannot_be_seen_is_shown_and_what_is_long_is_cut():
    assert plain("a\x1b[2J\u202e\udcff\nb") == r"a\x1b[2J\u202e\udcff\nb"
    assert plain("Größe 名") == "Größe 名"
    assert all(len(plain(char * 100_000)) < 300 for char in "x\x1b")
    assert number([4, 8.5, float("nan"), 1, 2]) == "4, 8.5, nan, 1 and 1 more"
    deep = []
    for _ in range(5000):
        deep = [deep]
    json.dumps(jsonable({"deep": deep, "\udc80": 10**4000, "array": np.array([1, np.nan])}), allow_nan=False)


def test_a_terminal_obeys_nothing_that_an_adapter_says():
    text = printed(planted())
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert not {"\x9b", "\x07", "\u202e", "\udcff"} & set(text)
    assert "[bold" in text  # shown, not obeyed
    assert len(text) < 200_000
    assert text.index("base-weight-smuggled") < text.index("long-update") < text.index("foreign-file")
    assert "suppressed" in text


def test_a_pass_is_said_not_to_be_a_proof():
    audit = replace(planted(hostile=False), findings=(), notes=(), cost={})
    assert "10 adapters are clean. A pass is not a proof" in printed(audit, 300)
    assert "nothing to audit" in printed(replace(audit, subjects=()))
    assert "✅" in audit_markdown(audit)
    assert "left out." in card_section(audit)


def test_json_holds_all_and_no_nan():
    audit = planted()
    found = json.loads(json.dumps(audit_json(audit), allow_nan=False).encode())
    json.dumps(found, ensure_ascii=False).encode()  # valid Unicode
    assert [each["rule"] for each in found["findings"]] == [each.rule.id for each in audit.findings]
    assert found["exit_code"] == 1
    assert found["adapters"][0]["verdict"] == "unfit"  # FS012 is critical
    assert found["adapters"][3]["verdict"] == "fit"
    assert np.shape(found["statistics"]["measures"]["norm"]) == (10, 16)
    assert found["statistics"]["measures"]["norm"][5][0] is None
    assert found["findings"][0]["why"] == audit.findings[0].rule.why
    assert len(found["policy_sha256"]) == 64


def results(audit: Audit) -> list[dict]:
    return audit_sarif(audit)["runs"][0]["results"]


def test_sarif_keeps_to_the_standards_schema(tmp_path):
    model = pytest.importorskip("pydantic_sarif.model")  # made from the standard's schema, and as strict
    loader = pytest.importorskip("sarif.loader")
    audit = planted()
    text = json.dumps(audit_sarif(audit), allow_nan=False)
    json.dumps(json.loads(text), ensure_ascii=False).encode()
    model.StaticAnalysisResultsFormatSarifVersion210JsonSchema.model_validate_json(text)
    (tmp_path / "audit.sarif").write_text(text)
    loaded = loader.load_sarif_file(str(tmp_path / "audit.sarif"))
    assert loaded.get_result_count() == len(audit.findings)
    broken = json.loads(text)
    broken["runs"][0]["results"][0]["surprise"] = 1
    with pytest.raises(ValueError, match="surprise"):
        model.StaticAnalysisResultsFormatSarifVersion210JsonSchema.model_validate(broken)


def test_sarif_says_what_github_shows():
    audit = planted()
    run = audit_sarif(audit)["runs"][0]
    rules = run["tool"]["driver"]["rules"]
    for found, finding in zip(run["results"], audit.findings, strict=True):
        assert rules[found["ruleIndex"]]["id"] == found["ruleId"] == finding.rule.id
        assert found["level"] == LEVELS[finding.severity]
        assert ("suppressions" in found) == (finding.suppressed is not None)
        place = found["locations"][0]["physicalLocation"]
        assert place["region"] == {"startLine": 1}
        assert place["artifactLocation"]["uri"].isascii()
        assert len(place["artifactLocation"]["uri"]) < 5000  # a longer one makes Microsoft's reader refuse the log
        assert not set(place["artifactLocation"]["uri"]) & set(" <>[]|`\\\n\"'")
        assert "](" not in found["message"]["text"]
    hashes = {file["location"]["uri"]: file["hashes"]["sha-256"] for file in run["artifacts"]}
    assert hashes["sent/c%200/adapter_model.safetensors"] == "0" * 64
    assert run["invocations"][0]["exitCode"] == 1
    assert len(run["invocations"][0]["toolExecutionNotifications"]) == len(audit.notes)


def test_sarif_paths_that_lead_out_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subject = Subject("one", tmp_path / "x:y" / "a#b%.safetensors", {"a#b%.safetensors": "0" * 64})
    finding = Finding(RULES["W001"], "one", "long", Severity.HIGH)
    audit = Audit((subject,), (finding, replace(finding, file="../../far.bin")), Severity.HIGH, {})
    inner, outer = (each["locations"][0]["physicalLocation"]["artifactLocation"] for each in results(audit))
    assert inner == {"uri": "x%3Ay/a%23b%25.safetensors", "uriBaseId": "%SRCROOT%", "index": 0}
    assert outer["uri"] == (tmp_path.parent / "far.bin").as_uri()
    assert "uriBaseId" not in outer


def test_fingerprints_are_of_the_place_and_not_of_the_value():
    audit = planted()
    marks = [each["partialFingerprints"]["primaryLocationLineHash"] for each in results(audit)]
    assert len(set(marks)) == len(marks)
    other = tuple(replace(each, message="otherwise", measured=99.0) for each in audit.findings)
    again = results(replace(audit, findings=other))
    assert [each["partialFingerprints"]["primaryLocationLineHash"] for each in again] == marks


@pytest.mark.parametrize("written", [audit_markdown, card_section])
def test_markdown_has_no_markup_but_ours(written):
    text = written(planted())
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    inner = [child for token in tokens for child in token.children or ()]
    assert not {token.type for token in inner} & {"link_open", "image", "code_inline"}
    ours = {"<code>", "</code>", "<br>", "<sub>", "</sub>"}
    assert {token.content for token in inner if token.type == "html_inline"} <= ours
    assert {token.tag for token in tokens if token.type == "heading_open"} == {"h2"}
    assert all(sign not in text for sign in ("@", "http:", "https:", "www.", "\x1b", "\udcff", "<script"))
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (4, 6)  # no cell breaks out
    assert len(text) < 60_000


def test_markdown_counts_what_it_leaves_out():
    audit = planted(hostile=False)
    many = replace(audit, findings=audit.findings * 20)
    assert f"And {len(many.findings) - 50} more findings." in audit_markdown(many)
    card = card_section(audit)
    assert card.startswith("## Audit\n")
    assert f"| <code>client&#95;01</code> | <code>{1:064x}</code> | left out |" in card
    assert "KY001" in card
    assert "FS014" not in card  # let pass


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.outer = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.outer += [(key, value) for key, value in attrs if key in ("src", "href") or key.startswith("on")]


def test_a_page_needs_nothing_else_and_runs_nothing():
    text = audit_page(planted())
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object", "a", "base", "form"}
    assert page.outer
    assert all(key == "src" and value.startswith("data:image/svg+xml;base64,") for key, value in page.outer)
    assert text.index("Content-Security-Policy") < text.index("<style>")
    text.encode()
    assert not {"\x1b", "\u202e", "\x07"} & set(text)
    assert "&lt;script&gt;" in text
    assert text == audit_page(planted())  # the same audit, the same bytes


@pytest.mark.parametrize(("n", "layers", "figures"), [(1, 1, 3), (2, 1, 4), (10, 4, 5), (70, 50, 5)])
def test_pages_of_all_sizes(n, layers, figures):
    audit = planted(n, layers, hostile=False)
    assert len(pictures(audit)) == figures
    assert audit_page(audit).count("<img") == figures


def test_pages_without_numbers():
    audit = planted()
    assert "<img" not in audit_page(replace(audit, statistics=None))
    nothing, hole = np.zeros((6, 2)), np.full((6, 2), np.nan)
    for values, gram in ((nothing, np.zeros((6, 6))), (hole, np.full((6, 6), np.nan))):
        names = tuple("abcdef")
        known = Statistics(names, ("x", "y"), {"norm": values, "top1": values}, gram, z={"krum": values[:, 0]})
        for picture in pictures(replace(audit, statistics=known)):
            assert svg(picture.figure)


def test_the_map_keeps_distances():
    points = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
    turned = points @ np.array([[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0]]) + 1
    found = plane(turned @ turned.T)
    apart = lambda rows: np.linalg.norm(rows[:, None] - rows[None], axis=2)  # noqa: E731
    assert apart(found.points) == pytest.approx(apart(points))
    assert sum(found.shares) == pytest.approx(1)
    assert not plane(np.ones((3, 3))).points.any()  # all the same
    holed = turned @ turned.T
    holed[1] = holed[:, 1] = np.nan
    assert plane(holed).rows == (0, 2, 3)


def test_deviations_are_by_column_and_names_short():
    scores = deviation(np.array([[1.0, 5], [2, 5], [3, 5], [100, 6], [np.nan, 5]]))
    assert scores[3, 0] == pytest.approx((100 - 2.5) / (1.4826 * 1.0))
    assert list(scores[:, 1]) == [0, 0, 0, np.inf, 0]
    assert short_module("base_model.model.h.3.attention.query_key_value") == "3.attention.query_key_value"
    assert short_module("model.lm_head") == "model.lm_head"
