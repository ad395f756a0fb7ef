"""``python -m benchmarks.peer_tests``: Hugging Face PEFT's own tests, run on it and on this library in its place.

Fetches its source distribution with pip into a temporary folder, runs the test files named on both with small local
models, and writes JSON and a table by file and by cause: how many of the tests that it passes we pass too. Tests of
methods that we have not are counted apart. Nothing of it is kept; a test's own folder is the only thing it writes to.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peanut import __version__
from peanut.files import write_json

__all__ = ["compared", "main", "table"]

VERSION = "0.21.2"
FILES = ("test_custom_models.py", "test_config.py", "test_initialization.py")
INI = """[pytest]
filterwarnings =
    ignore::DeprecationWarning
markers =
    single_gpu_tests: on one GPU
    multi_gpu_tests: on several
    regression: of earlier versions
    bitsandbytes: with quantised models
"""
Outcomes = dict[str, dict[str, Any]]
"""What came of each test, by its name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, writes JSON and markdown; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_tests", description=__doc__)
    parser.add_argument("files", nargs="*", default=FILES, help="test files of the suite")
    parser.add_argument("-k", default="", help="only tests whose names match, as pytest selects them")
    parser.add_argument("--every", type=int, default=1, help="of so many tests one, for a sample")
    parser.add_argument("--workers", default="auto", help="processes, as pytest-xdist counts them")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a test")
    parser.add_argument("--minutes", type=float, default=120, help="for one run of all the files on one library")
    parser.add_argument("--suite", type=Path, help="the unpacked source distribution, if it is there already")
    parser.add_argument("--peer", type=Path, help="the peer's outcomes, from the JSON of an earlier run")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for JSON and table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        suite = options.suite or _fetched(home)
        (home / "pytest.ini").write_text(INI)
        fill = "import pathlib, sys; from benchmarks.peer_hub import fill; fill(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", fill, home / "hub"], check=True)  # there the hub's settings are of no use
        found: dict[str, Outcomes] = {}
        if options.peer is not None:
            found["peft"] = json.loads(options.peer.read_text())["outcomes"]["peft"]
        for library in ("peft", "ours"):
            if library not in found:
                found[library] = _run(library, suite, home, options)
    result = compared(found["peft"], found["ours"])
    name = f"peer-tests-{__version__}"
    options.output.mkdir(parents=True, exist_ok=True)
    versions = {"peanut": __version__, "peft": VERSION}
    write_json(options.output / f"{name}.json", {"versions": versions, **result, "outcomes": found})
    text = table(result)
    (options.output / f"{name}.md").write_text(text)
    print(text)
    return 0


def _fetched(home: Path) -> Path:
    """The unpacked source distribution, whose tests are made a package, as their imports of each other ask."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--dest", str(home), f"peft=={VERSION}"]
    subprocess.run(command, check=True)
    with tarfile.open(home / f"peft-{VERSION}.tar.gz") as archive:
        archive.extractall(home, filter="data")
    suite = home / f"peft-{VERSION}"
    (suite / "tests" / "__init__.py").touch()
    return suite


def _run(library: str, suite: Path, home: Path, options: argparse.Namespace) -> Outcomes:
    """Runs the files on one library; what came of each test."""
    record = home / f"{library}.jsonl"
    record.touch()
    here = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "PEER_TESTS": library,
        "PEER_TESTS_EVERY": str(options.every),
        "PEER_TESTS_RECORD": str(record),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(home / "hub"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here / "src"), str(here)]),
    }
    command = [sys.executable, "-m", "pytest", "-c", str(home / "pytest.ini"), "--rootdir", str(suite), "--quiet"]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.peer_shim",
        "--tb=no",
        "-rN",
        "--continue-on-collection-errors",
    ]
    command += ["--numprocesses", options.workers, f"--timeout={options.timeout}", "-k", options.k]
    files = [str(Path("tests") / name) for name in options.files]
    try:
        subprocess.run([*command, *files], cwd=suite, env=environment, check=False, timeout=options.minutes * 60)
    except subprocess.TimeoutExpired:
        print(f"{library}: stopped after {options.minutes:g} minutes; what had run by then is counted")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return {line["test"]: line for line in lines}


def compared(peer: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Of the tests that the peer passes: how many we pass, by file, and why we fail the others, with counts."""
    files: dict[str, Counter[str]] = {}
    causes: Counter[str] = Counter()
    for test, line in peer.items():
        if line["outcome"] != "passed":
            continue
        counts = files.setdefault(Path(test.partition("::")[0]).name, Counter())
        counts["peer passes"] += 1
        own = ours.get(test)
        cause = "not collected" if own is None else own["cause"] or own["outcome"]
        if own is not None and own["outcome"] == "passed":
            counts["we pass"] += 1
        elif cause.startswith("no method"):
            counts["methods that we have not"] += 1
            causes[cause] += 1
        else:
            causes[cause] += 1
    return {"files": {name: dict(counts) for name, counts in files.items()}, "causes": dict(causes.most_common())}


def table(result: Mapping[str, Any], most: int = 40) -> str:
    """Markdown: a row for each file, then one for each of the most frequent causes."""
    lines = ["| tests | peer passes | of methods that we have | we pass | share |", "|---|---|---|---|---|"]
    for name, counts in result["files"].items():
        both = counts["peer passes"]
        had, passed = both - counts.get("methods that we have not", 0), counts.get("we pass", 0)
        lines.append(f"| {name} | {both:,} | {had:,} | {passed:,} | {passed / max(had, 1):.1%} |")
    lines += ["", "| cause | tests |", "|---|---|"]
    lines += [f"| {cause.replace('|', '/')} | {count:,} |" for cause, count in list(result["causes"].items())[:most]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
