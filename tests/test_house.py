"""The house keeps its shape: imports point down, files stay readable, nothing is unpickled, documented code runs."""

import ast
import re

import pytest

from tests.launch import ROOT

PACKAGE = ROOT / "fedllm_sec"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "updates": 0, "terminal": 0, "victim": 0, "randomness": 1, "core": 1, "registry": 2, "settings": 2, "config": 2,
    "attacks": 3, "defenses": 3, "tasks": 3, "models": 3, "training": 4,
    "reports": 5, "audit": 5, "federation": 5, "callbacks": 6, "fedml": 6, "cli": 6,
}  # fmt: skip


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedllm_sec."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "fedllm_sec":
            yield "cli"  # the package's face stands on everything
        elif isinstance(node, ast.Import) and any(name.name.startswith("fedllm_sec") for name in node.names):
            yield "cli"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts != ("__init__",):
        floor = FLOORS[parts[0]]
        assert all(FLOORS[room] <= floor for room in imported(path)), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_read_in_one_sitting_and_unpickle_nothing(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    assert not re.search(r"torch\.load\(|\bpickle\b\.|allow_pickle", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_architectures_example_is_a_defense_that_works():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    from fedllm_sec import Round, aggregate, defense
    from tests.conftest import dense, stacked

    exec(compile(example.replace("@defense", "@registry"), "example", "exec"), {"registry": defense})
    try:
        result = aggregate(stacked([[3.0, 4.0], [0.3, 0.4]]), Round(), [defense.build("clip", {"norm": 1.0})])
    finally:
        del defense._entries["clip"]
    assert dense(result)[0] == pytest.approx([0.45, 0.6])
