"""Measurements of the benchmark: times in interleaved rounds, memory saved for the backward, peak memory."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = [
    "Spread",
    "geometric_mean",
    "interleaved",
    "now",
    "peak_bytes",
    "processor",
    "ratio",
    "repeated",
    "saved_bytes",
    "within_memory",
]


@dataclass(frozen=True)
class Spread:
    """What the rounds of a measurement gave: the median, the quartiles around it, and the least value."""

    median: float
    low: float
    high: float
    least: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one or more values."""
        twice = [*values, *values] if len(values) == 1 else values
        low, median, high = statistics.quantiles(twice, n=4, method="inclusive")
        return cls(median, low, high, min(values))


def ratio(values: Sequence[float], to: Sequence[float]) -> Spread:
    """The spread of the ratios of two measurements, taken round by round, and in ``least`` that of their least values.

    Where one took part in fewer rounds, those are the first.

    What slows the whole machine for a while slows both sides of a round and leaves their ratio; the least values are
    those that other work on the machine disturbed least.
    """
    spread = Spread.of([value / other for value, other in zip(values, to, strict=False)])
    return replace(spread, least=min(values) / min(to))


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of the logarithms: two ratios that undo each other have the mean 1."""
    return statistics.geometric_mean(values)


def now(device: torch.device) -> float:
    """Seconds on a clock, read when all work given to ``device`` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def repeated(call: Callable[[], object], device: torch.device, seconds: float = 0.005) -> Callable[[], float]:
    """A probe of a short call: seconds a call, over as many calls as last about ``seconds`` now."""
    count = 1
    while (took := _lasts(call, device, count)) < seconds:
        count = max(2 * count, int(count * seconds / took))
    return lambda: _lasts(call, device, count) / count


def _lasts(call: Callable[[], object], device: torch.device, count: int) -> float:
    start = now(device)
    for _ in range(count):
        call()
    return now(device) - start


def interleaved(
    probes: Sequence[Callable[[], Mapping[str, float]]], rounds: Iterable[int]
) -> list[dict[str, list[float]]]:
    """Runs every probe once a round, in an order that changes, and collects garbage only between rounds.

    Args:
        probes: each measures once and returns what it found, by quantity.
        rounds: one entry a round.

    Returns:
        For each probe: quantity → one value a round.
    """
    order = random.Random(0)  # noqa: S311 - the same in every run, and nothing secret
    found: list[dict[str, list[float]]] = [{} for _ in probes]
    collecting = gc.isenabled()
    try:
        for _ in rounds:
            gc.collect()
            gc.disable()
            for index in order.sample(range(len(probes)), len(probes)):
                for quantity, value in probes[index]().items():
                    found[index].setdefault(quantity, []).append(value)
    finally:
        if collecting:
            gc.enable()
    return found


def saved_bytes(call: Callable[[], Tensor], layers: Iterable[nn.Module], kept: Iterable[Tensor]) -> int:
    """Bytes that ``call`` keeps for the backward beyond the parameters and each layer's input activations.

    Counted are the tensors that autograd saves, those that an ``autograd.Function`` saves with ``save_for_backward``
    among them, each storage once and whole, since a view keeps all of it alive. (What a function hides on its context
    is not seen.) Not counted are the storages of ``kept`` and of the tensors that are given to ``layers``; everything
    else is, what a method computes from a parameter too.

    Args:
        call: a forward; its output is not run backward.
        layers: the modules whose inputs are not counted; a wrapped layer is represented by its wrapper.
        kept: the model's parameters and buffers.
    """
    free = {_storage(part) for tensor in kept for part in _parts(tensor)}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed tensor's address could be reused

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor.detach())  # detached: the graph holds this function, and a cycle would not be freed
        for part in _parts(tensor):
            saved[_storage(part)] = part.untyped_storage().nbytes()
        return alive[-1]

    def enter(_: nn.Module, inputs: tuple[object, ...]) -> None:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                alive.append(tensor.detach())
                free.add(_storage(tensor))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        output = call()
    found = sum(size for storage, size in saved.items() if storage not in free)
    del output  # until here it kept what was counted
    return found


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with a storage that a tensor consists of: a sparse one has two."""
    if tensor.layout is not torch.sparse_coo:
        return [tensor]
    return [tensor._indices(), tensor._values()]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``call`` holds at one moment beyond what was held before it.

    On the CPU it is summed up from the allocations that torch's profiler records, and does not depend on what else
    the process does; scratch memory that a library takes past torch's allocator is not in it. On CUDA it is
    ``max_memory_allocated``.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells its stages on standard error
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextmanager
def within_memory(share: float = 0.8) -> Iterator[None]:
    """Within it, what would take more than a share of the machine's free memory is refused by an error of torch's.

    Otherwise Linux ends the process. Elsewhere nothing is limited.
    """
    if not Path("/proc/meminfo").is_file():
        yield
        return
    import resource

    def kibibytes(file: str, name: str) -> int:
        found = re.search(rf"^{name}:\s*(\d+) kB$", Path(file).read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    most = 1024 * (kibibytes("/proc/self/status", "VmData") + int(share * kibibytes("/proc/meminfo", "MemAvailable")))
    resource.setrlimit(resource.RLIMIT_DATA, (most if limits[1] < 0 else min(most, limits[1]), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def processor(device: torch.device) -> str:
    """The model of the processor that ``device`` names, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    listed = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(), re.MULTILINE) if listed.is_file() else None
    return model[1] if model else platform.processor() or platform.machine()
