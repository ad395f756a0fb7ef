"""Writes files atomically: under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import PeanutError, shown

__all__ = ["check_new", "make_folder", "parse_json", "read_json", "told", "write_files", "write_folder", "write_json"]


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Creates ``folder`` if need be and checks that a file can be written into it.

    Raises:
        PeanutError: the path is a file, or cannot be made or written to.
    """
    path = Path(folder)
    with told(f"cannot write into folder '{path}'"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def write_files(folder: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], object]]) -> Path:
    """Writes several files of one folder so that all of them appear, or none.

    Args:
        folder: where to; created if need be.
        writers: file name → a function that writes that content to the path it is given.

    Raises:
        PeanutError: the folder cannot be written, or the disk is full. What was there before is untouched.
    """
    path = make_folder(folder)
    staged: dict[str, Path] = {}
    try:
        with told(f"cannot write {', '.join(writers)} into '{path}'"):
            for name, write in writers.items():
                handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=path)
                os.close(handle)
                staged[name] = Path(temporary)
                write(staged[name])
                _flush(staged[name])
            for name, temporary_path in staged.items():
                os.replace(temporary_path, path / name)
    finally:
        for temporary_path in staged.values():
            temporary_path.unlink(missing_ok=True)
    return path


def check_new(target: Path) -> None:
    """Checks that ``target`` is not there yet, or is an empty folder: nothing of a user's is ever replaced.

    Raises:
        PeanutError: it holds something.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise PeanutError(f"'{target}' is there already", "a new or empty folder", "choose another name or remove it")


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Makes the new folder ``target`` with what ``write`` puts into the folder it is given, whole or not at all.

    Raises:
        PeanutError: ``target`` holds something, the disk is full, or the folder cannot be written.
    """
    check_new(target)
    make_folder(target.parent)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with told(f"cannot write '{target}'"):
            staged.mkdir()
            write(staged)
            if target.is_dir():
                target.rmdir()
            staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as sorted, indented JSON; the file is whole or not there."""
    target = Path(path)
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_files(target.parent, {target.name: lambda where: where.write_text(text, encoding="utf-8")})


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        PeanutError: the file is missing, unreadable or not JSON.
    """
    target = Path(path)
    if not os.path.isfile(target):
        raise PeanutError(f"no file '{target}'", "a JSON file there", "check the path")
    try:
        return parse_json(target.read_text(encoding="utf-8-sig"), f"'{target}'")
    except (OSError, UnicodeDecodeError) as error:
        raise PeanutError(f"cannot read '{target}': {error}", "a whole JSON file", "save it again") from error


def parse_json(text: str, source: str) -> Any:
    """What a JSON text says; a name that is there twice, or a value too deep or too long, is refused.

    Raises:
        PeanutError: it is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise PeanutError(f"cannot read {source}: {error}", "a whole JSON file", "save it again") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _flush(path: Path) -> None:
    """Writes the file to disk, so that a full disk is an error now; and gives it a new file's usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns an error of the system into one line that says what to do.

    safetensors reports a failed write with an exception of its own, tokenizers with a bare ``Exception``.
    """
    try:
        yield
    except PeanutError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or type(error) is Exception or type(error).__name__ == "SafetensorError":
            raise PeanutError(f"{what}: {error}", do="free some space or choose another folder") from error
        raise
