"""Writes files atomically: under a temporary name, flushed to disk, then renamed.

Who writes into a folder holds its lock (``flock`` of the folder itself, which leaves no file behind and ends with the
process), so a temporary file that is there when the lock is had was left by a process that was killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .errors import PeanutError, shown

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "as_one_line",
    "check_new",
    "locked",
    "make_folder",
    "parse_json",
    "read_json",
    "staged_files",
    "write_files",
    "write_folder",
    "write_json",
]

_PATIENCE = 60.0
"""Seconds for which a writer waits for another one."""


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Creates ``folder`` if need be and checks that a file can be written into it.

    Raises:
        PeanutError: the path is a file, or cannot be made or written to.
    """
    path = Path(folder)
    with as_one_line(f"cannot write into folder '{path}'"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def write_files(
    folder: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], object]], outdated: Collection[str] = ()
) -> Path:
    """Writes several files of one folder so that all of them appear, or none.

    They get their names in the order opposite to that of ``writers``. A process that is killed meanwhile leaves the
    others under temporary names, as ``staged_files`` finds them; the next one that writes them removes what is left.

    Args:
        folder: where to; created if need be.
        writers: file name → a function that writes that content to the path it is given.
        outdated: files that are removed when the others are there.

    Raises:
        PeanutError: the folder cannot be written, or the disk is full. What was there before is untouched.
    """
    path = make_folder(folder)
    staged: dict[str, Path] = {}
    with as_one_line(f"cannot write {', '.join(writers)} into '{path}'"), locked(path) as alone:
        try:
            for name, write in writers.items():
                handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=path)
                os.close(handle)
                staged[name] = Path(temporary)
                write(staged[name])
                _flush(staged[name])
            for name in reversed(staged):
                os.replace(staged[name], path / name)
            for name in outdated:
                (path / name).unlink(missing_ok=True)
            for name in (*writers, *outdated) if alone else ():
                for left in staged_files(path, name):
                    left.unlink(missing_ok=True)
        finally:
            for temporary_path in staged.values():
                temporary_path.unlink(missing_ok=True)
    return path


def staged_files(folder: Path, name: str) -> list[Path]:
    """What ``write_files`` has of file ``name`` under temporary names: of a writer at work, or one that was killed."""
    pattern = re.compile(re.escape(f".{name}.") + r"[a-z0-9_]{8}")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


@contextmanager
def locked(folder: Path, patience: float | None = None) -> Iterator[bool]:
    """Within the context no other process or thread has the lock of ``folder``, if the answer is true.

    It is false where there are no such locks (Windows, some network drives), or if another has it for too long.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    alone = _lock(handle, _PATIENCE if patience is None else patience)
    try:
        yield alone
    finally:
        if alone:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has the handle too
        os.close(handle)


def _lock(handle: int, patience: float) -> bool:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:  # noqa: PERF203 - it waits
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
        except OSError:
            return False


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
    parent = make_folder(target.parent)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    whole = staged / target.name
    with as_one_line(f"cannot write '{target}'"), ExitStack() as writing:
        with locked(parent) as alone:
            if alone:
                _remove_left_folders(target)
            staged.mkdir()
            writing.callback(shutil.rmtree, staged, ignore_errors=True)
            writing.enter_context(locked(staged))  # says that its writer lives
        whole.mkdir()
        write(whole)
        if target.is_dir():
            target.rmdir()
        whole.rename(target)


def _remove_left_folders(target: Path) -> None:
    """Removes the folders in which killed processes were making ``target``: those that nobody holds a lock of."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"\d+")
    for folder in target.parent.iterdir():
        if pattern.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with locked(folder, patience=0) as dead:
                if dead:
                    shutil.rmtree(folder, ignore_errors=True)


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
def as_one_line(what: str) -> Iterator[None]:
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
