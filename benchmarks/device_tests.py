"""Runs the tests that need a GPU in a separate process with a time limit, and collects their results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

import peanut

from .budget import Outcome, told

__all__ = ["TESTS", "device_tests"]

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/test_devices.py"
# a process of a shell's background ignores interrupts, and so do its children: pytest is to hear of them all the same
PYTEST = (
    "import signal, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); raise SystemExit(pytest.main())"
)


def device_tests(selected: str, seconds: float) -> Outcome:
    """Runs the tests; when their time is up, what has run by then is told.

    Args:
        selected: which, as pytest's ``-k``.
        seconds: how long they may take.
    """
    places = (str(Path(peanut.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    with tempfile.TemporaryDirectory() as folder:
        log, found = Path(folder, "log"), Path(folder, "found.xml")
        # without the project's settings of pytest: they name a plugin, and make an error of any library's warning
        command = [
            *(sys.executable, "-c", PYTEST, TESTS, "-q", "-k", selected, f"--junitxml={found}", "--tb=short"),
            *("-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib"),
        ]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            cut = _awaited(process, seconds)
        suite = ET.parse(found).getroot().find("testsuite") if found.is_file() else None  # noqa: S314 - our own
        if suite is None:
            return Outcome({"selected": selected}, cut, "" if cut else log.read_text(errors="replace")[-4000:])
    tests, failed, errors, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    counts = {"passed": tests - failed - errors - skipped, "failed": failed, "errors": errors, "skipped": skipped}
    told(f"  {', '.join(f'{number} {name}' for name, number in counts.items())}")
    failures = {
        f"{case.attrib['classname']}::{case.attrib['name']}": (each.text or each.attrib.get("message", ""))[-1500:]
        for case in suite.iter("testcase")
        for each in case
        if each.tag in ("failure", "error")
    }
    error = f"failed: {len(failures)}" if failures else "" if cut or counts["passed"] else "no test passed"
    return Outcome({"selected": selected, "failures": failures, **counts}, cut, error)


def _awaited(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Waits for pytest; when its time is up it is interrupted, so that it writes what it found. What was cut."""
    try:
        process.wait(seconds)
        return ""
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return f"stopped after {seconds:.0f} s"
