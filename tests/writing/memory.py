"""Ways to write to memory in which a tensor lies, and that others hold too."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
from torch import Tensor

from .target import Target, Values, Way, Write, assign, on, own_memory, through

__all__ = ["MEMORY"]


def ctypes_written(tensor: Tensor, value: Tensor) -> None:
    value = value.contiguous()
    ctypes.memmove(tensor.data_ptr(), value.data_ptr(), value.numel() * value.element_size())


def as_bytes(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()


def of_bytes(tensor: Tensor) -> memoryview:
    """Memory of Python's own, in which the tensor lies from now on."""
    memory = bytearray(as_bytes(tensor.detach()))
    tensor.data = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    return memoryview(memory)


def bytes_written(memory: memoryview, value: Tensor) -> None:
    memory[:] = as_bytes(value)


def from_array(tensor: Tensor) -> np.ndarray:
    array = tensor.detach().numpy().copy()
    tensor.data = torch.from_numpy(array)
    return array


def mapped(tensor: Tensor) -> str:
    """A file that the tensor is mapped to."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(as_bytes(tensor.detach()))
    found = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    tensor.data = found.view(tensor.shape)
    return file.name


def file_written(name: str, value: Tensor) -> None:
    with open(name, "r+b") as file:
        file.write(as_bytes(value))


CHILD = """
import os, sys
for file, size in zip(sys.argv[1::2], sys.argv[2::2]):
    os.pwrite(int(file), sys.stdin.buffer.read(int(size)), 0)
"""


def shared_with_a_child(target: Target) -> Write:
    """``share_memory_``, and another process that writes."""
    files = []
    for tensor in target.tensors():
        own_memory(tensor).data.share_memory_()
        files.append(tensor.untyped_storage()._share_fd_cpu_()[0])

    def write(values: Values) -> None:
        given = [as_bytes(value) for value in values]
        told = [str(part) for file, data in zip(files, given, strict=True) for part in (file, len(data))]
        command = [sys.executable, "-I", "-S", "-c", CHILD, *told]
        subprocess.run(command, input=b"".join(given), pass_fds=files, check=True)

    return write


def another_handle(tensor: Tensor) -> Tensor:
    """A tensor of its own over the same shared memory, as another process would have it."""
    own_memory(tensor).data.share_memory_()
    file, size = tensor.untyped_storage()._share_fd_cpu_()
    storage = torch.UntypedStorage._new_shared_fd_cpu(os.dup(file), size)
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)


def array_written(array: np.ndarray, value: Tensor) -> None:
    """An array that is said to be read-only is memory like any other."""
    data = as_bytes(value)
    ctypes.memmove(array.ctypes.data, data, len(data))


MEMORY: dict[str, Way] = {
    "view taken earlier": through(lambda p: p.detach().view(-1), lambda view, v: view.copy_(v.reshape(-1))),
    "view of data taken earlier": through(lambda p: p.data.view(-1), lambda view, v: view.copy_(v.reshape(-1))),
    "strided view taken earlier": through(
        lambda p: p.data.as_strided(p.shape, p.stride()), lambda view, v: view.copy_(v)
    ),
    "numpy of detach()": on(lambda p, v: assign(p.detach().numpy(), v.numpy())),  # type: ignore[arg-type]
    "numpy array taken earlier": through(lambda p: p.detach().numpy(), lambda array, v: np.copyto(array, v.numpy())),
    "from_numpy, array reused": through(from_array, lambda array, v: np.add(v.numpy(), 0, out=array)),
    "frombuffer, bytes reused": through(of_bytes, bytes_written),
    "dlpack": through(lambda p: torch.from_dlpack(p.detach()), lambda other, v: other.copy_(v)),
    "numpy by dlpack": through(lambda p: np.from_dlpack(p.detach()), array_written),
    "ctypes": on(ctypes_written),
    "file mapped to memory": through(mapped, file_written),
    "shared memory, other handle": through(another_handle, lambda other, v: other.copy_(v)),
    "shared memory, child process": shared_with_a_child,
}
