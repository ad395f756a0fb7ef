"""A pytest plugin for Hugging Face PEFT's own tests: a package named ``peft`` that hands out ours, and their causes.

``PEER_TESTS=ours`` puts the package in; otherwise the library itself is tested, with the same small models. A name that
we have not is an inert class, so that a test module can be imported and only the tests that use the name fail.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

import pytest

__all__ = ["Absent", "AbsentMeta", "cause_of", "install"]

OURS = os.environ.get("PEER_TESTS") == "ours"
OTHERS = tuple(f"peanut.{name}" for name in ("utils", "tuners", "helpers", "functional", "optimizers"))
EVERY = int(os.environ.get("PEER_TESTS_EVERY", "1"))
RECORD = os.environ.get("PEER_TESTS_RECORD", "")
_USED: set[str] = set()
"""The absent names that the test in progress has used."""


class AbsentMeta(type):
    """The class of classes that stand in for what is not there."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        _USED.add(cls.__name__)
        return super().__call__()

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name != "__dataclass_fields__":
            raise AttributeError(name)
        _USED.add(cls.__name__)
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __contains__(cls, item: object) -> bool:
        _USED.add(cls.__name__)
        return False

    def __iter__(cls) -> Iterator[Any]:
        _USED.add(cls.__name__)
        return iter(())

    def __getitem__(cls, item: object) -> Any:
        raise KeyError(f"no name {cls.__name__}")


class Absent(metaclass=AbsentMeta):
    """What a name stands for that we have not."""


class _Shim(ModuleType):
    """A module of ``peft``: what ours of the same path has, else what is public, else an inert class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        inside = self.__name__.partition(".")[2]
        for home in dict.fromkeys((f"peanut.{inside}" if inside else "peanut", "peanut", *OTHERS)):
            try:
                found = getattr(importlib.import_module(home), name)
            except (ImportError, AttributeError):
                continue
            if not isinstance(found, ModuleType):
                break
        else:
            found = AbsentMeta(name, (Absent,), {"__module__": self.__name__})
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``peft`` and all that is said to be in it."""

    def __init__(self, real: Path) -> None:
        self.real = real

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "peft":
            return None
        if name == "peft.import_utils":  # tells what is installed, and imports nothing of its package
            return importlib.util.spec_from_file_location(name, self.real / "import_utils.py")
        tail = Path(*name.split(".")[1:])
        if name != "peft" and not (self.real / tail).is_dir() and not (self.real / tail.with_suffix(".py")).is_file():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Shim(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__version__"] = version("peft")


def install() -> None:
    """Puts the package in the place of the library, which is not imported."""
    spec = importlib.util.find_spec("peft")
    assert spec is not None  # it is in the dev extra
    assert spec.origin is not None
    sys.meta_path.insert(0, _Finder(Path(spec.origin).parent))
    # Our objects are not to pass for those of a library that is us.
    from peanut import identity

    vars(identity)["_answer"] = lambda own, _: own


def _tell_other_classes() -> None:
    """Lets a test that asks for another class of error than ours say so, where we raise an error too."""
    from _pytest.raises import RaisesExc

    leave = RaisesExc.__exit__

    def left(self: Any, kind: Any, error: Any, trace: Any) -> bool:
        from peanut import PeanutError

        done = leave(self, kind, error, trace)
        if not done and isinstance(error, PeanutError):
            raise AssertionError("another class of an error") from error
        return done

    setattr(RaisesExc, "__exit__", left)  # noqa: B010 - a method of another library


if OURS:
    install()
    _tell_other_classes()


def _lacking(absent: Collection[str]) -> str:
    """The cause of a test of which names are not there: a method or a variant, if a config is among them."""
    configs = [name for name in absent if name.endswith("Config")]
    return f"no method {min(configs).removesuffix('Config')}" if configs else f"no name {min(absent)}"


def cause_of(error: BaseException, absent: Collection[str] = ()) -> str:
    """What kind of thing went wrong, in few words that are the same for tests that fail of the same."""
    text = str(error).strip().split("\n")[0]
    if absent:
        return _lacking(absent)
    if text.startswith("Regex pattern did not match"):  # the error or warning is of the class that is asked for
        return "other words of a warning" if "warnings" in text else "other words of an error"
    if found := re.search(r"no name (\w+)|no attribute '(\w+)'", text):
        return f"no name {found[1]}" if found[1] else f"no attribute {found[2]}"
    if found := re.search(r"unexpected keyword argument '(\w+)'", text):
        return f"no argument {found[1]}"
    text = re.sub(r"\b\w+Config\b", "…Config", text)
    text = re.sub(r"tensor\(.*|\[.*", "…", re.sub(r"0x\w+|'[^']*'|\"[^\"]*\"|/\S+", "…", text))
    return f"{type(error).__name__}: {re.sub(r'[-+]?[0-9][0-9.e-]*', 'N', text)[:90]}"


def _absent_in(value: Any) -> set[str]:
    if isinstance(value, type) and issubclass(value, Absent):
        return {value.__name__}
    if isinstance(value, Absent):
        return {type(value).__name__}
    if isinstance(value, dict):
        return {name for each in value.values() for name in _absent_in(each)}
    if isinstance(value, (list, tuple)):
        return {name for each in value for name in _absent_in(each)}
    return set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A sample of the tests, the same for both libraries: by the names, which both have."""
    items[:] = [item for item in items if crc32(item.nodeid.encode()) % EVERY == 0]


@pytest.fixture(autouse=True)
def _begin(request: pytest.FixtureRequest) -> None:
    _USED.clear()
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            vars(module)["_HUB_MODEL_ACCESSES"] = _All()


class _All(dict[str, int]):
    """Every model has been asked for before: nothing is to be fetched."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Adds the cause of a failure to a test's report; a test that used a name that is not there has not passed."""
    report: pytest.TestReport = yield
    values = getattr(getattr(item, "callspec", None), "params", {})
    absent = _absent_in(dict(values))
    if call.when == "call" and report.passed and (_USED or absent):
        report.outcome = "failed"
        report.user_properties.append(("cause", _lacking(absent or _USED)))
    elif report.skipped and absent:
        report.user_properties.append(("cause", _lacking(absent)))
    elif report.failed and call.excinfo is not None:
        report.user_properties.append(("cause", cause_of(call.excinfo.value, absent or _USED)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes a line of JSON for a test's outcome; in parallel runs, the process that starts the others does."""
    if not RECORD or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if report.when == "call" or report.outcome != "passed":
        cause = next((text for name, text in report.user_properties if name == "cause"), "")
        line = {"test": report.nodeid, "outcome": report.outcome, "cause": cause, "seconds": round(report.duration, 3)}
        with Path(RECORD).open("a") as file:
            file.write(json.dumps(line) + "\n")
