"""What holds for every test: it asserts something, whatever it is given, and no case of it returns before it does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
ASSERTING = ("raises", "refused", "warns", "fail")
"""Functions that assert, beside those called assert_… and check_…: of these the same is asked as of tests."""
SEVERAL = ("enumerate", "zip", "sorted", "reversed", "list", "tuple", "permutations", "product", "pairwise")
"""Functions that give as many as they are given."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def name_of(call: ast.expr) -> str:
    """The last part of what a call calls."""
    return call.attr if isinstance(call, ast.Attribute) else call.id if isinstance(call, ast.Name) else ""


def asserts(node: ast.AST) -> bool:
    """Whether a statement or a call asserts: ``x.check(…)`` does not, ``pytest.raises(…)`` and ``assert_…(…)`` do."""
    if isinstance(node, ast.Assert):
        return True
    name = name_of(node.func) if isinstance(node, ast.Call) else ""
    return name in ASSERTING or name.startswith(("assert_", "check_"))


class Certain:
    """Which statements of a function run in every call of it.

    Args:
        constants: the names in its file that hold something that is not empty.
    """

    def __init__(self, constants: set[str]) -> None:
        self.constants = constants

    def several(self, node: ast.expr) -> bool:
        """Whether an iterable is surely not empty: one that is written out, a range, a constant of a file."""
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(not isinstance(each, ast.Starred) or self.several(each.value) for each in node.elts)
        if isinstance(node, ast.Dict):
            return len(node.keys) > 0
        if isinstance(node, ast.Constant):
            return bool(node.value)
        if isinstance(node, ast.Name):
            return node.id in self.constants
        if isinstance(node, ast.BinOp):
            return self.several(node.left) or self.several(node.right)
        if isinstance(node, COMPREHENSIONS):
            return all(self.several(each.iter) and not each.ifs for each in node.generators)
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            if name == "range":
                return all(isinstance(each, ast.Constant) or name_of(each).isupper() for each in node.args)
            if name in ("items", "values", "keys") and isinstance(node.func, ast.Attribute):
                return self.several(node.func.value)
            if name == "zip" and any(each.arg == "strict" for each in node.keywords):
                return any(self.several(each) for each in node.args)
            if name == "grad" and len(node.args) > 1:  # of torch.autograd: one for each input
                return self.several(node.args[1])
            return name in SEVERAL and bool(node.args) and all(self.several(each) for each in node.args)
        return False

    def runs(self, node: ast.AST) -> Iterator[ast.AST]:
        """What surely runs, in order, without the functions and classes within, and every ``return``."""
        if isinstance(node, ast.If):
            yield from self.each(node.test)
            branches = [list(self.all_of(body)) for body in (node.body, node.orelse)]
            sure = all(any(asserts(each) for each in branch) for branch in branches)
            for branch in branches:
                yield from (each for each in branch if sure or isinstance(each, ast.Return))
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            yield from self.each(node.iter)
            yield from self.only_if(self.several(node.iter), node.body)
            yield from self.all_of(node.orelse)
        elif isinstance(node, ast.While):
            yield from self.each(node.test)
            yield from self.only_if(isinstance(node.test, ast.Constant) and bool(node.test.value), node.body)
        elif isinstance(node, ast.Try):
            yield from self.all_of(node.body)
            yield from (each for handler in node.handlers for each in self.only_if(False, handler.body))
            yield from self.all_of([*node.orelse, *node.finalbody])
        elif isinstance(node, COMPREHENSIONS):
            yield from ()  # of nothing, it is nothing
        elif isinstance(node, ast.Assert):
            if not self.empty_all(node.test):
                yield node
        else:
            yield from self.each(node)

    def empty_all(self, test: ast.expr) -> bool:
        """Whether ``test`` is ``all(…)`` of what may be nothing."""
        if not isinstance(test, ast.Call) or name_of(test.func) != "all" or not test.args:
            return False
        return isinstance(test.args[0], ast.GeneratorExp) and not self.several(test.args[0])

    def each(self, node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, FUNCTIONS):
                yield child
                yield from self.runs(child)

    def all_of(self, body: list[ast.stmt]) -> Iterator[ast.AST]:
        for statement in body:
            if not isinstance(statement, FUNCTIONS):
                if not isinstance(statement, ast.Assert):
                    yield statement
                yield from self.runs(statement)

    def only_if(self, sure: bool, body: list[ast.stmt]) -> Iterator[ast.AST]:
        return (each for each in self.all_of(body) if sure or isinstance(each, ast.Return))


def constants_of(tree: ast.Module) -> set[str]:
    """The names written in capitals that a file imports, or gives something that may not be empty."""
    found = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name).isupper()
    }
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()}
    return found


def given_in(function: Function, constants: set[str]) -> set[str]:
    """The names to which a function gives, once, something that is surely not empty."""
    given = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and len(node.targets) == 1]
    names = [target.id for node in given if isinstance(target := node.targets[0], ast.Name)]
    found: set[str] = set()
    for node in given:
        target = node.targets[0]
        if isinstance(target, ast.Name) and names.count(target.id) == 1:
            found |= {target.id} if Certain(constants | found).several(node.value) else set()
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=False)
            found |= {
                one.id
                for one, value in pairs
                if isinstance(one, ast.Name) and Certain(constants | found).several(value)
            }
    return found


def complaints(source: str) -> list[str]:
    """The tests, and the helpers that assert, that may come to their end without an assertion, each with its line."""
    tree, found = ast.parse(source), []
    constants = constants_of(tree)
    for test in ast.walk(tree):
        if not isinstance(test, Function) or not test.name.startswith(("test_", "assert_", "check_")):
            continue
        ran = Certain(constants | given_in(test, constants)).all_of(test.body)
        first = next((node for node in ran if isinstance(node, ast.Return) or asserts(node)), None)
        if first is None:
            found.append(f"line {test.lineno}: {test.name} may assert nothing")
        elif isinstance(first, ast.Return):
            found.append(
                f"line {first.lineno}: {test.name} returns before it asserts; "
                "parametrise it over the cases that it says something of, and give the others a test of their own"
            )
    return found


def test_every_test_asserts_before_it_returns() -> None:
    files = sorted(FOLDER.rglob("*.py"))
    assert Path(__file__) in files
    found = [f"{file.relative_to(FOLDER)}, {told}" for file in files for told in complaints(file.read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_the_faults_are_seen() -> None:
    def told(body: str, before: str = "", kind: str = "def") -> list[str]:
        lines = "".join(f"    {line}\n" for line in body.split("\n"))
        return [each.partition(";")[0] for each in complaints(f"{before}\n{kind} test_it(case, found):\n{lines}")]

    nothing = ["line 2: test_it may assert nothing"]
    fine = [
        "with refused(model, 'no'):\n    model()\nif model.small:\n    return",
        "for each in (1, 2):\n    assert each",
        "names = ['a', 'b']\nfor row, name in enumerate(names):\n    assert found[row] == name",
        "for one, other in zip(found, (1, 2), strict=True):\n    assert one == other",
        "for each in range(3):\n    if each:\n        assert_same(each)\n    else:\n        assert each == 0",
        "try:\n    case()\nfinally:\n    assert case.ended",
        "while True:\n    assert case",
        "assert all(each for each in [1, 2])",
    ]
    assert [told(body) for body in fine] == [[]] * len(fine)
    assert told("for each in KINDS:\n    assert each", "KINDS = [1]") == []
    empty = [
        "for each in found:\n    assert each",
        "for each in [each for each in (1, 2) if each > found]:\n    assert each",
        "for one, other in zip(found, (1, 2)):\n    assert one == other",
        "if case.small:\n    assert case",
        "while case():\n    assert case",
        "assert all(each for each in found)",
        "try:\n    case()\nexcept ValueError:\n    assert found",
        "case.check(found)",
        "def inner():\n    assert case\ninner",
        "[check_it(each) for each in found]",
        "names = ['a']\nnames = found\nfor name in names:\n    assert name",
    ]
    assert [told(body) for body in empty] == [nothing] * len(empty)
    assert told("await case()", kind="async def") == nothing
    early = ["line 4: test_it returns before it asserts"]
    assert told("if case.small:\n    return\nassert case") == early
    assert told("for each in found:\n    return\nassert case") == early
    assert complaints("def assert_right(found):\n    found()\n") == ["line 1: assert_right may assert nothing"]
