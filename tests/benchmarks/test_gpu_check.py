"""The check for a machine with a GPU, run small on the CPU: what it finds, what fails, what there is no time for."""

from __future__ import annotations

import gc
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.budget import LEAST, Check, Outcome
from benchmarks.device_tests import device_tests
from benchmarks.step_profile import Traffic, kernels_of
from torch import Tensor

import peanut
from benchmarks import budget, gpu_check
from benchmarks import device_tests as device_tests_module
from peanut.errors import PeanutError
from peanut.lab import bench
from peanut.lab.settings import Settings, settings_of

SMALLEST = {"device": "cpu", "dims": (48, 64), "tokens": 8, "threads": 1}
METHODS = gpu_check.METHODS
"""All of them: a run of the check here makes do with two."""


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "METHODS", ("LORA", "PEANUT"))
    monkeypatch.setattr(gpu_check, "SMALL", SMALLEST)


def test_there_are_ten_methods_and_those_profiled_are_among_them() -> None:
    assert len(set(METHODS)) == len(METHODS) == 10
    assert set(gpu_check.PROFILED) < set(METHODS)


@pytest.mark.filterwarnings("ignore")  # of Hugging Face PEFT
@pytest.mark.parametrize("method", METHODS)
def test_the_benchmark_builds_and_steps_each_of_the_ten_methods(method: str, tmp_path: Path) -> None:
    settings = settings_of(gpu_check.STACK, methods=[method], repeats=1, dtype="float32", **SMALLEST)
    variants, x, target = bench.built(settings, tmp_path)
    own = [each for each in variants if each.method.startswith(method)]
    assert {each.by for each in own} == {"peanut", "peft"}
    for each in own:
        assert each.trained_parameters > 0
        each.step(x, target)
        assert each.difference is None or each.difference < 1e-3


def run(output: Path, *more: str, status: int = 0) -> dict[str, Any]:
    assert gpu_check.main(["--device", "cpu", "--output", str(output), *more]) == status
    assert gc.get_freeze_count() == 0
    [file] = output.glob(f"gpu-check-{peanut.__version__}-*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_all_three_parts_are_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found = run(tmp_path)
    assert torch.get_num_threads() == threads
    assert (found["device"], found["small"], found["finished"], found["cut"]) == ("cpu", True, True, [])
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["peft"] == "0.21.2"
    assert found["missing"] == []
    parts = found["parts"]
    assert list(parts) == ["bench", "profile", "tests"]
    assert all(part["errors"] == {} and part["seconds"] > 0 for part in parts.values())

    [tests] = parts["tests"]["results"].values()
    assert (tests["passed"] > 0, tests["failed"], tests["errors"], tests["failures"]) == (True, 0, 0, {})

    rows = {
        method: {(row["method"], row["by"]): row for row in own["variants"]}
        for method, own in parts["bench"]["results"].items()
    }
    assert list(rows) == ["LORA", "PEANUT"]
    for by in ("peanut", "peft"):
        assert {("", "frozen"), ("LORA", by), ("PEANUT depth 0", by), ("PEANUT depth 2", by)} <= set(rows["PEANUT"])
    ours = rows["PEANUT"]["PEANUT depth 0", "peanut"]
    assert set(ours["ratios"]) == {"frozen", "peer", "peer_lora"}
    assert ours["peak_bytes"] > 0 < ours["seconds"]["generate"]["median"]
    assert parts["bench"]["settings"]["dtype"] == "bfloat16"
    assert parts["bench"]["summary"]["compared"] == 3

    lora, nonlinear = (parts["profile"]["results"][method] for method in ("LORA", "PEANUT"))
    assert set(lora) == {"frozen", "LORA peanut", "LORA peft"}
    assert set(nonlinear) == {"PEANUT depth 0 peanut", "PEANUT depth 0 peft"}
    for step in (lora | nonlinear).values():
        assert step["gap_us"] == pytest.approx(step["step_us"] - step["device_us"])
        assert step["launches"] >= sum(kernel["count"] for kernel in step["kernels"]) > 0
        assert 0 < len(step["kernels"]) <= 25
        traffic = step["traffic"]
        assert traffic["bytes"] == traffic["read_bytes"] + traffic["written_bytes"]
        assert traffic["bytes"] == traffic["products_bytes"] + traffic["others_bytes"]
    for quantity in ("flops", "launches"):
        assert lora["LORA peanut"][quantity] > lora["frozen"][quantity] > 0
    told = capsys.readouterr().out
    assert "PEANUT depth 0 peft: step" in told
    assert told.endswith(".json\n")


def test_what_fails_leaves_its_error_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, find_spec = bench.measure, importlib.util.find_spec

    def failing(settings: Settings) -> Any:
        if settings.methods == ("LORA", "PEANUT"):
            raise RuntimeError("CUDA error: out of luck")
        return measure(settings)

    monkeypatch.setattr(bench, "measure", failing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else find_spec(name))
    monkeypatch.setitem(sys.modules, "peft", None)
    found = run(tmp_path, status=1)
    parts = found["parts"]
    assert list(parts["bench"]["errors"]) == ["PEANUT"]
    assert parts["bench"]["errors"]["PEANUT"].endswith("RuntimeError: CUDA error: out of luck\n")
    assert [row["by"] for row in parts["bench"]["results"]["LORA"]["variants"]] == ["frozen", "peanut"]
    assert set(parts["profile"]["results"]["PEANUT"]) == {"PEANUT depth 0 peanut"}
    assert (found["finished"], found["versions"]["peft"]) == (True, None)
    assert found["missing"] == [
        "Hugging Face PEFT is not there: its rows are missing",
        "pytest is not there: the device tests were not run",
    ]
    assert parts["tests"]["results"] == {}
    assert "CUDA error: out of luck" in capsys.readouterr().out


def test_without_time_everything_is_cut_and_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    assert gpu_check.main(["--device", "cpu", "--minutes", "0.001"]) == 0
    [file] = tmp_path.rglob("*.json")
    assert file.parent == tmp_path / "build" / "gpu-check"  # figures of a CPU have no place among the results
    found = json.loads(file.read_text())
    assert found["cut"] == [
        "tests: tests/test_devices.py", "bench: LORA", "bench: PEANUT", "profile: LORA", "profile: PEANUT",
    ]  # fmt: skip
    assert all(part["results"] == part["errors"] == {} for part in found["parts"].values())


def test_a_peer_that_cannot_be_imported_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str | None:
        if sys.modules["peft"] is not None:
            raise ImportError("no accelerate")
        return None

    monkeypatch.setitem(sys.modules, "peft", sys)  # put back afterwards
    monkeypatch.setattr(gpu_check, "peer_version", broken)
    assert gpu_check._missing() == [
        "Hugging Face PEFT cannot be imported: ImportError: no accelerate",
        "Hugging Face PEFT is not there: its rows are missing",
    ]


# The clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    return now


def test_a_task_begins_only_if_the_shortest_before_it_would_fit(tmp_path: Path, clock: list[float]) -> None:
    asked: list[float] = []

    def lasting(seconds: float) -> Callable[[float], Outcome]:
        def task(fair: float) -> Outcome:
            asked.append(fair)
            clock[0] += seconds
            return Outcome({"seconds": seconds}, "a little" if seconds == 10 else "")

        return task

    check = Check(tmp_path / "found.json", {}, 200)
    check.run("first", {"a": lasting(40), "b": lasting(10), "c": lasting(45), "d": lasting(1)}, 0.5)
    assert asked == [100 / 4, 60 / 3, 50 / 2]
    assert check.cut == ["first: b a little", "first: d"]
    check.run("second", {"e": lasting(104), "f": lasting(1)}, 1.0)
    assert check.cut[2:] == ["second: f"]
    assert json.loads((tmp_path / "found.json").read_text())["parts"]["second"]["results"] == {"e": {"seconds": 104}}
    assert check.spent() == 199 > 200 - LEAST


def test_fewer_rounds_where_time_is_short(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    asked: list[int] = []

    def measure(settings: Settings) -> list[Any]:
        asked.append(settings.repeats)
        clock[0] += 2 * settings.repeats
        return []

    monkeypatch.setattr(bench, "measure", measure)
    benched = gpu_check.Bench(settings_of(gpu_check.STACK, repeats=10, **SMALLEST))
    cuts = [benched.measured("LORA", seconds).cut for seconds in (1, 100, 11, 1)]
    assert asked == [10, 10, 5, 3]
    assert cuts == ["", "", "in 5 of 10 rounds", "in 3 of 10 rounds"]


# The device tests


def test_a_failing_test_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('device', ['cpu', 'cuda'])\n"
        "def test_it(device):\n    assert device == 'cuda'\n"
        "def test_else():\n    pytest.skip()\n"
        "def test_cpu(nothing):\n    pass\n"
    )
    monkeypatch.setattr(device_tests_module, "TESTS", str(file))
    outcome = device_tests("not cpu]", 60)
    counts = {name: outcome.results[name] for name in ("passed", "failed", "errors", "skipped")}
    assert counts == {"passed": 1, "failed": 0, "errors": 1, "skipped": 1}
    outcome = device_tests("test_it", 60)
    [(name, message)] = outcome.results["failures"].items()
    assert name.endswith("::test_it[cpu]")
    assert "AssertionError" in message
    assert (outcome.error, outcome.cut) == ("failed: 1", "")
    assert device_tests("nothing", 60).error == "no test passed"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler], ids=["background", "foreground"])
def test_when_time_is_up_what_has_run_is_told(
    handler: Callable[..., object] | signal.Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pathlib, time\n"
        "def test_one():\n    pass\n"
        f"def test_two():\n    pathlib.Path({str(started)!r}).touch()\n    time.sleep(600)\n"
    )

    class Impatient(subprocess.Popen[bytes]):
        """Its time is up when the second test has begun."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout == 15:
                while self.poll() is None and not started.exists():
                    time.sleep(0.05)
                raise subprocess.TimeoutExpired("pytest", timeout)
            return super().wait(timeout)

    monkeypatch.setattr(device_tests_module, "TESTS", str(file))
    monkeypatch.setattr(subprocess, "Popen", Impatient)
    before = signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    try:
        outcome = device_tests("test", 15)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started.exists()
    assert outcome.results["passed"] == 1
    assert (outcome.cut, outcome.error) == ("stopped after 15 s", "")


# The profile


def traffic(call: Callable[[], object]) -> dict[str, tuple[int, int, bool]]:
    with Traffic() as found:
        call()
    return {each.name: (each.read_bytes, each.written_bytes, each.product) for each in found.operators.values()}


def test_traffic_is_what_operators_read_and_write() -> None:
    x, w = torch.randn(4, 5), torch.randn(6, 5)

    def filled() -> Tensor:
        y = torch.empty(7)
        return y.fill_(1)

    assert traffic(lambda: x @ w.T) == {"mm": ((20 + 30) * 4, 24 * 4, True)}  # w.T alone moves nothing
    assert traffic(lambda: x.add_(torch.tensor(1.0).expand(4, 5))) == {"add_": ((20 + 1) * 4, 20 * 4, False)}
    assert traffic(filled) == {"fill_": (0, 7 * 4, False)}
    assert traffic(x.bfloat16) == {"_to_copy": (20 * 4, 20 * 2, False)}
    assert traffic(lambda: torch._foreach_add_([x, w], 1)) == {"_foreach_add_": (50 * 4, 50 * 4, False)}
    assert traffic(lambda: torch.mm(x, w.T, out=torch.empty(4, 6))) == {"mm": ((20 + 30) * 4, 24 * 4, True)}


def test_traffic_of_a_backward_counts_too() -> None:
    x, w = torch.randn(4, 5), torch.randn(5, 6, requires_grad=True)
    found = Traffic()
    with found:
        (x @ w).sum().backward()
    calls = {(each.name, each.shapes): each.count for each in found.operators.values()}
    assert calls["mm", "4×5, 5×6"] == calls["mm", "5×4, 4×6"] == 1


def test_kernels_are_those_of_the_device() -> None:
    def event(key: str, device: str, annotation: bool = False, us: float = 1.0) -> SimpleNamespace:
        kind = getattr(torch._C._autograd.DeviceType, device)
        return SimpleNamespace(
            key=key, count=2, device_type=kind, is_user_annotation=annotation, self_device_time_total=us,
            self_cpu_time_total=10 * us,
        )  # fmt: skip

    events = [
        event("aten::mm", "CPU"),
        event("cudaLaunchKernel", "CPU"),
        event("short", "CUDA"),
        event("gemm", "CUDA", us=5),
        event("Optimizer.step#AdamW.step", "CUDA", annotation=True),
    ]
    assert kernels_of(events, on_gpu=True) == [
        {"name": "gemm", "count": 2, "us": 5},
        {"name": "short", "count": 2, "us": 1.0},
    ]
    assert kernels_of(events, on_gpu=False) == [{"name": "aten::mm", "count": 2, "us": 10.0}]
    with pytest.raises(PeanutError, match=r"recorded no kernel of this device; expected some"):
        kernels_of(events[:2], on_gpu=True)
