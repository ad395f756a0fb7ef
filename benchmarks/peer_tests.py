"""``python -m benchmarks.peer_tests``: Hugging Face PEFT's own tests, run on it and on this library in its place.

Fetches its source distribution with pip into a temporary folder, runs the test files named on both with small local
models, and writes JSON and a table by file and by cause: how many of the tests that it passes we pass too. Tests of
methods that we have not are counted apart. Nothing of it is kept; a test's own folder is the only thing it writes to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peanut import __version__
from peanut.files import write_json

__all__ = ["compared", "main", "table"]

VERSION = "0.21.2"
LEFT_OUT = (
    "adamss_asa arrow bdlora bufferdict cartridge common_gpu deft frod gptqmodel gpu_examples incremental_pca lora_ga "
    "lora_intruders lora_megatron multitask_prompt_tuning osf pvera quantization shadow supertuning target_parameters "
    "unilora velora"
)
"""Files of tests that are of nothing that we have, or need a GPU, quantised models or experts."""
INI = """[pytest]
filterwarnings =
    ignore::DeprecationWarning
markers =
    single_gpu_tests: on one GPU
    multi_gpu_tests: on several
    regression: of earlier versions
    bitsandbytes: with quantised models
"""
ASIDE = {
    "methods and variants that we have not": (
        r": no method |PeanutError: (alora_\w+|use_qalora|use_bdlora|ensure_weight_tying|init_lora_weights)="
    ),
    "the words of an error or a warning of the class asked for": ": other words ",
    "the class of an error: ours are ValueErrors": "another class of an error",
    "private attributes": r": no (attribute|name) (_|trainable_tokens_delta)",
    "parameters that no layer holds (experts)": "target_parameters",
    "refused there and done here": ("Failed: DID NOT RAISE|^test_prompt_learning_with_gradient_checkpointing: Conn"),
    "otherwise on purpose: a config that is given is not changed": (
        "^test_from_pretrained_config_construction: Assert|^test_lora_conversion: TypeError"
    ),
    "otherwise on purpose: within disable_adapter parameters stay trainable": r"Expected \(\) to require gradients",
    "otherwise on purpose: starts in the weight are saved as LoRAs": "^test_(load_|lora_)?(config_)?(pissa|olora)_",
    "otherwise on purpose: a layer switched off alone stays so after disable_adapter": "^test_disable_adapters_exit",
    "the version that a library says it is, patched inside it": "^test_peft_version_",
    "refused on purpose: a pattern that names no layer": "names …, which none of the N adapted layers",
    "refused on purpose: fields that neither library has": r"sets \w+=…; expected the fields of",
    "refused on purpose: another method's name as peft_type": "peft_type=… in a",
    "refused on purpose: a prefix that nothing would read": "never given keys and values of earlier",
    "refused on purpose: another base": "the adapter was trained on",
}
"""Causes of failures that are not counted, each with what they look like; see docs/decisions/008."""
Outcomes = dict[str, dict[str, Any]]
"""What came of each test, by its name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, writes JSON and markdown; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_tests", description=__doc__)
    parser.add_argument("files", nargs="*", help="test files of the suite; all but those left out")
    parser.add_argument("-k", default="", help="only tests whose names match, as pytest selects them")
    parser.add_argument("--every", type=int, default=1, help="of so many tests one, for a sample")
    parser.add_argument("--workers", default="auto", help="processes, as pytest-xdist counts them")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a test")
    parser.add_argument("--minutes", type=float, default=120, help="for one run of all the files on one library")
    parser.add_argument("--suite", type=Path, help="the unpacked source distribution, if it is there already")
    parser.add_argument("--outcomes", type=Path, help="a file for what came of every test (30 MB for all)")
    parser.add_argument("--peer", type=Path, help="the peer's outcomes, from such a file of an earlier run")
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
            found["peft"] = json.loads(options.peer.read_text())["peft"]
        for library in ("peft", "ours"):
            if library not in found:
                found[library] = _run(library, suite, home, options)
    result = compared(found["peft"], found["ours"])
    name = f"peer-tests-{__version__}"
    options.output.mkdir(parents=True, exist_ok=True)
    versions = {"peanut": __version__, "peft": VERSION, "python": platform.python_version()}
    versions |= {library: version(library) for library in ("torch", "transformers")}
    write_json(options.output / f"{name}.json", {"versions": versions, **result})
    if options.outcomes is not None:
        write_json(options.outcomes, found)
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
    left_out = {f"test_{name}.py" for name in LEFT_OUT.split()}
    names = options.files or sorted({path.name for path in (suite / "tests").glob("test_*.py")} - left_out)
    files = [str(Path("tests") / name) for name in names]
    try:
        subprocess.run([*command, *files], cwd=suite, env=environment, check=False, timeout=options.minutes * 60)
    except subprocess.TimeoutExpired:
        print(f"{library}: stopped after {options.minutes:g} minutes; what had run by then is counted")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return {line["test"]: line for line in lines}


def compared(peer: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Of the tests that the peer passes: how many we pass, by file, and which we fail and why, with counts."""
    files: dict[str, Counter[str]] = {}
    failures: dict[str, str] = {}
    plain = {_plain(test): line for test, line in ours.items()}
    for test, line in peer.items():
        if line["outcome"] != "passed":
            continue
        counts = files.setdefault(Path(test.partition("::")[0]).name, Counter())
        counts["peer passes"] += 1
        own = ours.get(test) or plain.get(_plain(test))
        cause = "not collected" if own is None else own["cause"] or own["outcome"]
        if own is not None and own["outcome"] == "passed":
            counts["we pass"] += 1
        else:
            if (reason := _aside(test, cause)) is not None:
                counts[reason] += 1
            else:
                failures[test] = cause
    causes = Counter(failures.values()).most_common()
    return {
        "files": {name: dict(counts) for name, counts in files.items()},
        "causes": dict(causes),
        "failures": failures,
    }


def _plain(test: str) -> str:
    """A test's name without the numbers that pytest gives to options: those of lists that are made by what there is."""
    return re.sub(r"(kwargs)\d+", r"\1", test)


def _aside(test: str, cause: str) -> str | None:
    """Why a test that fails of this is not counted, ``None`` if it is."""
    said = f"{test.rpartition('::')[2].partition('[')[0]}: {cause}"
    return next((reason for reason, pattern in ASIDE.items() if re.search(pattern, said)), None)


def table(result: Mapping[str, Any], most: int = 60) -> str:
    """Markdown: a row for each file and one for all, what is left aside, and the most frequent causes of the rest."""
    lines = ["| tests | peer passes | aside | we pass | share of the rest |", "|---|---|---|---|---|"]
    total: Counter[str] = sum(map(Counter, result["files"].values()), Counter())
    for name, counts in (*sorted(result["files"].items()), ("all", total)):
        both, passed = counts["peer passes"], counts.get("we pass", 0)
        aside = sum(counts.get(reason, 0) for reason in ASIDE)
        lines.append(f"| {name} | {both:,} | {aside:,} | {passed:,} | {passed / max(both - aside, 1):.1%} |")
    lines += ["", "| aside | tests |", "|---|---|"]
    lines += [f"| {reason} | {total.get(reason, 0):,} |" for reason in ASIDE]
    lines += ["", "| cause | tests |", "|---|---|"]
    lines += [f"| {cause.replace('|', '/')} | {count:,} |" for cause, count in list(result["causes"].items())[:most]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
