"""What holds for every test: it asserts something, and no case of it returns before it does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
ASSERTING = ("raises", "refused", "warns", "fail", "check")
"""Functions that assert, beside those called assert_… and check_…"""


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """What a function's own body holds, in order, without the functions and classes within it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield child
            yield from statements(child)


def asserts(node: ast.AST) -> bool:
    called = node.func if isinstance(node, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return isinstance(node, ast.Assert) or name in ASSERTING or name.startswith(("assert", "check_"))


def complaints(source: str) -> list[str]:
    """The tests in a file that assert nothing, or that may return before they do, each with its line."""
    found = []
    for test in ast.walk(ast.parse(source)):
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
            first = next((node for node in statements(test) if isinstance(node, ast.Return) or asserts(node)), None)
            if first is None:
                found.append(f"line {test.lineno}: {test.name} asserts nothing")
            elif isinstance(first, ast.Return):
                found.append(
                    f"line {first.lineno}: {test.name} returns before it asserts; "
                    "parametrise it over the cases that it says something of, and give the others a test of their own"
                )
    return found


def test_every_test_asserts_before_it_returns() -> None:
    files = sorted(FOLDER.rglob("test_*.py"))
    assert Path(__file__) in files
    found = [f"{file.relative_to(FOLDER)}, {told}" for file in files for told in complaints(file.read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_the_two_faults_are_seen() -> None:
    fine = "def test_it():\n    with refused(model, 'no'):\n        model()\n    if model.small:\n        return\n"
    returns = "def test_it(case):\n    if case.small:\n        return\n    assert case\n"
    within = "def test_it():\n    def double(x):\n        return 2 * x\n    double(1)\n"
    assert complaints(fine) == []
    assert [told.partition(";")[0] for told in complaints(returns)] == ["line 3: test_it returns before it asserts"]
    assert complaints(within) == ["line 1: test_it asserts nothing"]
