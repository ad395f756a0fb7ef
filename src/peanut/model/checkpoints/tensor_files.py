"""Writes tensors, and reads those that anybody may have written: they are finite, and of the kind that is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import PeanutError, shown
from .integrity import check_sum, with_sum

__all__ = ["check_kind", "open_tensors", "read_tensors", "refuse_not_finite", "write_tensors"]

_LONGEST = 1000
"""How many characters the name of a tensor may have."""


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A safetensors file, or a pickle of tensors (``.bin``), open for reading.

    Raises:
        PeanutError: it is none, or is damaged.
    """
    if str(path).endswith(".bin"):
        yield _Pickled(path)
        return
    with _reading(path):
        if not os.path.isfile(path):  # a pipe would be waited for
            raise OSError("it is no file")
        opened = safe_open(path, framework="pt")
    with opened as file:
        yield file


class _Pickled:
    """What torch.save wrote, read as a safetensors file is; nothing in it is run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            read = torch.load(path, map_location="cpu", weights_only=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # pickle has many
            raise PeanutError(
                f"cannot read '{path}': {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                "a pickle of tensors and nothing else, as it may come from anybody",
                "save the adapter as safetensors in the library that wrote it",
            ) from error
        if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
            raise PeanutError(f"'{path}' holds {shown(type(read).__name__)}", "tensors by name", "save it again")
        self.read: dict[str, Any] = dict(read)

    def metadata(self) -> dict[str, str]:
        return {}

    def keys(self) -> list[str]:
        return list(self.read)

    def get_tensor(self, name: str) -> Any:
        return self.read[name]

    def get_slice(self, name: str) -> _Pickled:
        self.shape = list(self.read[name].shape)
        return self

    def get_shape(self) -> list[int]:
        return self.shape


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around calls of safetensors only, which has many errors for a damaged file: they become one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # the file is not to blame
        raise
    except Exception as error:
        raise PeanutError(
            f"cannot read '{path}': {error}", "a whole safetensors file", "copy or save the adapter again"
        ) from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, those in one byte as float32, and its metadata.

    Raises:
        PeanutError: it cannot be read, holds values that are not finite, or others than were written.
    """
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        names = list(file.keys())
        long = next((name for name in names if len(name) > _LONGEST), None)
        if long is not None:
            raise PeanutError(f"'{path}' holds a tensor called {shown(long)}", f"at most {_LONGEST} characters")
        written: dict[str, Tensor] = {}
        for name in names:
            with _reading(path):
                written[name] = file.get_tensor(name)
    refuse_not_finite(written, f"'{path}'", "save the adapter again from a training that did not diverge")
    check_sum(metadata, written, path)
    return {name: _plain(value) for name, value in written.items()}, metadata


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], sums: str) -> None:
    """Writes a safetensors file with a checksum, from the tensors' ``checksums``; the same gives the same bytes."""
    save_file(dict(tensors), path, metadata=with_sum(metadata, sums))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def _plain(value: Tensor) -> Tensor:
    """A tensor that torch computes with: of a float in one byte it knows little more than how to convert it."""
    return value.float() if value.is_floating_point() and value.element_size() == 1 else value


def refuse_not_finite(state: Mapping[str, Any], where: str, do: str) -> None:
    """Refuses tensors with values that are not finite, or without values.

    Raises:
        PeanutError: there are some.
    """
    for key, given in state.items():
        if type(given).__name__ == "DTensor":
            raise PeanutError(
                f"{where} has a part of '{key}' in each process, as a DTensor",
                "whole tensors",
                "pass state_dict=, the full one as torch.distributed.checkpoint.state_dict gathers it",
            )
        if not isinstance(given, Tensor) or given.is_meta or given.layout != torch.strided:
            kind = f"a {given.layout} tensor on {given.device}" if isinstance(given, Tensor) else shown(given)
            raise PeanutError(f"{where} holds {kind} in '{key}'", "a tensor with its values", do)
        if not (given.is_floating_point() or given.is_complex()):
            continue
        value = _plain(given)
        # The norm is read fastest. It may be too large although no value is: then all are looked at.
        norm = torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float32))
        if not (norm.isfinite() or value.isfinite().all()):
            raise PeanutError(f"{where} holds values that are not finite in '{key}'", "finite values", do)


def check_kind(source: str, key: str, value: Tensor, own: Tensor) -> None:
    """Checks that a tensor that was read can be put where ``own`` is: whole numbers are no weights, nor the reverse.

    Raises:
        PeanutError: it is of another kind, or a value is infinite in the precision of ``own``.
    """
    if _kind(value) != _kind(own):
        raise PeanutError(
            f"'{source}' holds {key} as {_kind(value)} ({value.dtype})",
            f"{_kind(own)} ({own.dtype})",
            "save the adapter again, each tensor in its own precision",
        )
    if not own.is_floating_point() or torch.finfo(value.dtype).max <= torch.finfo(own.dtype).max:
        return
    if not value.to(own.dtype).isfinite().all():
        raise PeanutError(
            f"'{source}' holds {key} with values that are not finite in {own.dtype}",
            "values that it can hold",
            "save the adapter again from a training that did not diverge",
        )


def _kind(value: Tensor) -> str:
    if value.is_complex():
        return "complex numbers"
    if value.dtype == torch.bool:
        return "booleans"
    return "floats" if value.is_floating_point() else "whole numbers"
