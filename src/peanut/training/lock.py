"""One run at a time in a folder: a lock of the operating system's, which ends with the process that holds it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import PeanutError
from ..files import as_one_line

__all__ = ["alone"]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other runs out of ``folder`` until the context ends; the file ``.lock`` in it is then gone.

    Raises:
        PeanutError: another process, or another thread, is in such a context; or the folder cannot be written.
    """
    path = folder / ".lock"
    lock = FileLock(path)
    with as_one_line(f"cannot write into folder '{folder}'"):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise PeanutError(
                f"a run is going on in '{folder}' ({_holder(path)})",
                "one run a folder at a time",
                "wait for it, end it, or choose another output",
            ) from None
    try:
        with suppress(OSError):  # it only names the holder; on Windows nobody may write to a locked file
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: who has it open already finds it gone, and looks again
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")[:200] or "of another process"
    except (OSError, UnicodeDecodeError):
        return "of another process"
