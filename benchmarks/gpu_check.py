"""``python -m benchmarks.gpu_check``: tests, benchmark and profile on a machine with a CUDA GPU, in eight minutes.

Three parts: the device tests; the benchmark of ten methods in a block of Llama-3.2-3B's shape, in bfloat16 at 4,096
tokens, beside Hugging Face PEFT; a profile of one training step, frozen, with LoRA and with PEANuT. It downloads
nothing and needs only torch, transformers and this library. (``make gpu-check`` first installs requirements.lock if
.venv is missing.) A clock is read before each task, and what there is no time for is left out. Without a device the
same code runs small on the CPU.

The exit status is 1 if something failed, 2 for a wrong call. The JSON file, rewritten after each task:

- ``versions`` of ``peanut``, ``python``, ``torch``, ``cuda``, ``transformers`` and ``peft``, ``hardware`` (the device's
  name), ``device``, ``small`` (whether the sizes are those for a CPU), ``minutes`` (the budget), ``seconds`` (spent);
- ``finished``: whether the run came to its end; ``missing``: what is not installed, and what that costs; ``cut``: what
  was left out or shortened for want of time;
- ``parts``: ``tests``, ``bench`` and ``profile``, each with its ``seconds``, ``errors`` (by task) and ``results``:

  - ``tests``: ``passed``, ``failed``, ``errors``, ``skipped``, ``failures`` (test → its traceback) and ``selected``
    (pytest's ``-k``);
  - ``bench``, by method: ``rounds``, and ``variants`` as in the JSON file of ``peanut bench`` (``lab/bench.py``); a
    method's rounds are interleaved with those of the frozen block and of LoRA. The part's ``settings`` too, and its
    ``summary`` over all methods, as there;
  - ``profile``, by method (LORA's has the frozen block's too), then variant (``PEANUT depth 0 peft``): ``step_us``,
    ``device_us``, ``gap_us``, ``launches``, ``kernels`` (the 25 longest: ``name``, ``count``, ``us``), ``flops`` and
    ``traffic``: ``bytes``, those that are read and written, those of matrix products and of the others, and the 25
    ``operators`` that move most. The part's ``estimate`` tells how.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import peanut
from peanut.errors import PeanutError
from peanut.files import make_folder
from peanut.lab import bench
from peanut.lab.bench_report import report, summary
from peanut.lab.bench_rows import Row, references
from peanut.lab.measure import Spread, processor
from peanut.lab.settings import Settings, settings_of
from peanut.lab.variants import peer_version
from peanut.training.terminal import quiet

from .budget import Check, Outcome, told
from .device_tests import ROOT, TESTS, device_tests
from .step_profile import ESTIMATE, step_profile

__all__ = ["main"]

METHODS = ("LORA", "PEANUT", "DORA", "ADALORA", "OFT", "HRA", "VERA", "MISS", "IA3", "FOURIERFT")
PROFILED = ("LORA", "PEANUT")
STACK = "llama-3.2-3b"
SMALL: dict[str, Any] = {"device": "cpu", "dims": (192, 512), "tokens": 64, "threads": 1}
ROUNDS, FEWEST = 10, 3
"""How often each variant is measured, and the least when time is short."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Tests, measures, profiles, writes JSON; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="the budget; imports are not counted (default: 7.5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: the same small (default: cuda if there is one)")
    parser.add_argument(
        "--output", type=Path, help="folder for the JSON file (default: results; on a CPU build/gpu-check)"
    )
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    small, threads = device == "cpu", torch.get_num_threads()
    try:
        quiet()
        missing = _missing()
        settings = settings_of(STACK, methods=METHODS, repeats=1 if small else ROUNDS, **(SMALL if small else {}))
        hardware = processor(torch.device(device))
        name = re.sub(r"[^a-z0-9.]+", "-", f"gpu-check-{peanut.__version__}-{hardware}".lower()).strip("-")
        folder = make_folder(options.output or (ROOT / "build/gpu-check" if small else ROOT / "results"))
        versions = _versions()
        about = {"versions": versions, "hardware": hardware, "device": device, "small": small, "missing": missing}
        check = Check(folder / f"{name}.json", about, 60 * options.minutes)
        torch.set_num_threads(settings.threads)
        gc.freeze()  # each method measured collects garbage many times: what was imported is none
        for line in (f"{hardware}, {', '.join(f'{key} {value}' for key, value in versions.items())}", *missing):
            told(line)
        _all(check, settings, small)
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
        gc.unfreeze()
    told(f"{len(check.cut)} cut, {check.failed} failed")
    told(str(check.file))
    return min(check.failed, 1)


def _all(check: Check, settings: Settings, small: bool) -> None:
    """The three parts."""
    check.write()
    tests = {TESTS: functools.partial(device_tests, "PEANUT" if small else "not cpu]")}
    check.run("tests", tests if importlib.util.find_spec("pytest") else {}, 0.35)
    benched = Bench(settings)
    methods = {each: functools.partial(benched.measured, each) for each in METHODS}
    check.run("bench", methods, 0.8, {"settings": asdict(settings)})
    check.parts["bench"]["summary"] = summary(benched.rows)
    profiles = {each: functools.partial(profiled, each, settings) for each in PROFILED}
    check.run("profile", profiles, 1.0, {"estimate": ESTIMATE})
    check.write(finished=True)


def _versions() -> dict[str, str | None]:
    return {
        "peanut": peanut.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "peft": peer_version(),
    }


def _missing() -> list[str]:
    """What is not installed, and what that costs. What cannot be imported counts as not installed."""
    found = []
    try:
        peer_version()
    except Exception as error:
        found.append(f"Hugging Face PEFT cannot be imported: {type(error).__name__}: {error}")
        sys.modules["peft"] = None  # type: ignore[assignment]
    if peer_version() is None:
        found.append("Hugging Face PEFT is not there: its rows are missing")
    if importlib.util.find_spec("pytest") is None:
        found.append("pytest is not there: the device tests were not run")
    return found


class Bench:
    """The benchmark, a method at a time, so that one that fails leaves the others; fewer rounds when time is short.

    Args:
        settings: of all methods.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rows = settings, list[Row]()
        self.round = 0.0  # seconds that a round of the last method took

    def measured(self, method: str, seconds: float) -> Outcome:
        """Measures a method beside the frozen block and LoRA."""
        wanted = self.settings.repeats
        rounds = min(wanted, max(int(seconds / self.round), FEWEST)) if self.round else wanted
        start = time.perf_counter()
        settings = _with(self.settings, methods=(method,), repeats=rounds)
        rows = bench.measure(settings)
        self.round = (time.perf_counter() - start) / rounds
        self.rows += [row for row in rows if row.method.startswith(method)]
        for row in rows:
            told(f"  {_line(row, rows)}")
        cut = f"in {rounds} of {wanted} rounds" if rounds < wanted else ""
        return Outcome({"rounds": rounds, "variants": report(rows, settings)["variants"]}, cut)


def _with(settings: Settings, **values: Any) -> Settings:
    return Settings(**asdict(settings) | values)


def _line(row: Row, rows: Sequence[Row]) -> str:
    """A row in words: medians of a step and of a generated token, their ratios, and the peak."""
    called = {"frozen": "frozen", "peer": "peft", "peer_lora": "peft's LoRA"}
    others = {called[name]: row.to(other) for name, other in references(row, rows).items()}
    parts = []
    for quantity in [name for name in ("step", "generate") if name in row.seconds]:
        ratios = "".join(f", {own[quantity]['median']:.2f} × {name}" for name, own in others.items() if quantity in own)
        parts.append(f"{quantity} {1000 * Spread.of(row.seconds[quantity]).median:.3g} ms{ratios}")
    return f"{row.name}: {'; '.join(parts)}; peak {row.peak_bytes / 2**20:.1f} MiB{row.note and f' ({row.note})'}"


def profiled(method: str, settings: Settings, seconds: float) -> Outcome:
    """Profiles a step with a method by each side, and with LORA's one of the frozen block."""
    own = _with(settings, methods=(method,), depth=(0,))
    found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variants, x, target = bench.built(own, Path(folder))
        for variant in variants:
            if method == "LORA" or variant.method.startswith(method):
                name = f"{variant.method} {variant.by}".strip()
                step = found[name] = step_profile(variant, x, target)
                moved = f"{step['traffic']['bytes'] / 1e6:.1f} MB, {step['flops'] / 1e9:.2f} GFLOP"
                launches = f"{step['launches']} launches that take {step['device_us']:.0f} µs"
                told(f"  {name}: step {step['step_us']:.0f} µs, {launches}, {moved}")
    return Outcome(found)


if __name__ == "__main__":
    sys.exit(main())
