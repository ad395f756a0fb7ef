"""Profiles one training step: kernels and their times, gaps between them, memory traffic and FLOPs."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peanut.errors import PeanutError
from peanut.lab.variants import Variant

__all__ = ["ESTIMATE", "Traffic", "kernels_of", "step_profile"]

ESTIMATE = (
    "traffic: an estimate. Each ATen operator reads its inputs whole and writes its outputs once, from the shapes and "
    "dtypes that a dispatch mode sees in forward, backward and optimizer; views and empty tensors cost nothing, and "
    "caches are left out. products: matrix products and attention; others: elementwise, reductions, copies. flops: by "
    "torch.utils.flop_counter, of products and attention alone, two for a multiplication with its addition. kernels: "
    "by torch.profiler; on the CPU its operators by their own time, without those that they call. launches: how many "
    "ran, copies and fills of memory apart. device_us: the sum of their times. step_us: the median without profiler. "
    "gap_us: step_us minus device_us."
)
STEPS, MOST = 10, 25
"""How many steps are timed without the profiler, and how many kernels and operators are listed."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
UNREAD = ("copy_", "fill_", "zero_")
"""Operators that write to a tensor without reading it."""


@dataclass
class Operator:
    """Calls of one operator on tensors of the same shapes: how many, and the bytes of all of them."""

    name: str
    shapes: str
    count: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    @property
    def product(self) -> bool:
        """Whether it is a matrix product or attention."""
        return self.name.rstrip("_") in PRODUCTS or self.name.startswith("_scaled_dot_product")


class Traffic(TorchDispatchMode):
    """Counts what the operators called within it read and write, by name and shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: dict[tuple[str, str], Operator] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        self._count(func, args, given, result)
        return result

    def _count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: object) -> None:
        name = func.overloadpacket.__name__
        read, written, inputs = [], [], []
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            tensors = list(_tensors(value))
            inputs += tensors
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes:
                written += tensors
            if not (writes and (argument.is_out or name in UNREAD)):
                read += tensors
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        fresh = [tensor for tensor in _tensors(result) if tensor.untyped_storage().data_ptr() not in known]
        if not (written or fresh) or name.removeprefix("new_").startswith("empty"):
            return  # a view, a number, or memory that nobody has written yet
        shapes = ", ".join("×".join(map(str, tensor.shape)) for tensor in inputs[:4])
        own = self.operators.setdefault((name, shapes), Operator(name, shapes))
        own.count += 1
        own.read_bytes += sum(map(_bytes, read))
        own.written_bytes += sum(map(_bytes, written + fresh))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _bytes(tensor: Tensor) -> int:
    """Of the entries that have a place of their own: an expanded dimension counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size()


def step_profile(variant: Variant, x: Tensor, target: Tensor) -> dict[str, Any]:
    """What one training step of a variant does, as ``ESTIMATE`` tells it."""
    steps = [variant.step(x, target)["step"] for _ in range(STEPS + 2)][2:]
    kernels = kernels_of(_events(variant, x, target), x.device.type == "cuda")
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        variant.step(x, target)
    operators = sorted(traffic.operators.values(), key=lambda each: -each.bytes)
    step, device = 1e6 * statistics.median(steps), sum(each["us"] for each in kernels)
    return {
        "step_us": step,
        "device_us": device,
        "gap_us": step - device,
        "launches": sum(each["count"] for each in kernels if not each["name"].startswith(("Memcpy", "Memset"))),
        "kernels": kernels[:MOST],
        "flops": flops.get_total_flops(),
        "traffic": {
            "bytes": sum(each.bytes for each in operators),
            "read_bytes": sum(each.read_bytes for each in operators),
            "written_bytes": sum(each.written_bytes for each in operators),
            "products_bytes": sum(each.bytes for each in operators if each.product),
            "others_bytes": sum(each.bytes for each in operators if not each.product),
            "operators": [asdict(each) for each in operators[:MOST]],
        },
    }


def _events(variant: Variant, x: Tensor, target: Tensor) -> Iterable[Any]:
    """What torch's profiler records of a step, by name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells its stages on standard error
    on_gpu = x.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for _ in range(2):  # the first time the profiler gets ready
        with profile(activities=activities) as profiler:
            variant.step(x, target)
    averages: Iterable[Any] = profiler.key_averages()
    return averages


def kernels_of(events: Iterable[Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Name, count and microseconds of a step's kernels, the longest first; on the CPU of its operators.

    Raises:
        PeanutError: the profiler saw none.
    """
    found = []
    for each in events:
        if on_gpu and each.device_type.name == "CUDA" and not each.is_user_annotation:
            found.append({"name": each.key, "count": each.count, "us": each.self_device_time_total})
        elif not on_gpu and each.key.startswith("aten::"):
            found.append({"name": each.key, "count": each.count, "us": each.self_cpu_time_total})
    if not found:
        raise PeanutError(
            "torch.profiler recorded no kernel of this device", "some", "let it read the device's counters (CUPTI)"
        )
    return sorted(found, key=lambda each: -each["us"])
