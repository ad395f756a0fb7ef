"""The folder of a run: what is in it, whether it can be continued, and files that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from ..errors import PeanutError
from ..files import make_folder, write_files
from .config import RunConfig, differing_keys, load_config, to_yaml
from .trainer import is_whole, whole_checkpoints

__all__ = ["RunFolder", "write_folder"]


class RunFolder:
    """A run's folder: ``run.yaml``, ``log.jsonl``, checkpoints, then ``curve.png``, ``adapter/``, ``metrics.json``.

    ``metrics.json`` is written last: its presence says that the run is finished.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config, self.log, self.curve = (self.path / name for name in ("run.yaml", "log.jsonl", "curve.png"))
        self.adapter, self.metrics = self.path / "adapter", self.path / "metrics.json"

    @property
    def finished(self) -> bool:
        """Whether the run that the folder holds came to its end."""
        return self.metrics.is_file()

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        whole = whole_checkpoints(self.path)
        return whole[-1] if whole else None

    def open(self, config: RunConfig, overwrite: bool = False) -> None:
        """Makes the folder ready for a run of ``config``, or for the rest of it.

        Raises:
            PeanutError: the folder cannot be written, or holds a run with another config.
        """
        make_folder(self.path)
        if overwrite:
            self._clear()
        if self.config.is_file():
            self._check_same(config)
            for folder in self._checkpoints():
                if not is_whole(folder):
                    shutil.rmtree(folder)
        elif self._checkpoints():
            raise PeanutError(
                f"'{self.path}' holds checkpoints and no {self.config.name}",
                "an empty folder, or that of a run",
                "choose another output, or pass --overwrite to delete them",
            )
        else:
            write_files(self.path, {self.config.name: lambda path: path.write_text(to_yaml(config), encoding="utf-8")})

    def _check_same(self, config: RunConfig) -> None:
        keys = [key for key in differing_keys(load_config(self.config), config) if key != "output"]
        if keys:
            raise PeanutError(
                f"'{self.path}' holds a run with another {', '.join(keys)}",
                "the same config, to continue it",
                "choose another output, or pass --overwrite to begin anew",
            )

    def _checkpoints(self) -> list[Path]:
        return [folder for folder in self.path.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit()]

    def _clear(self) -> None:
        """Removes what runs write here, and nothing else; first what says that there is a run."""
        for file in (self.metrics, self.config, self.log, self.curve):
            file.unlink(missing_ok=True)
        for folder in (self.adapter, *self._checkpoints()):
            shutil.rmtree(folder, ignore_errors=True)


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Makes ``target`` anew with what ``write`` puts into the folder it is given; ``target`` is whole or as it was.

    Raises:
        PeanutError: the disk is full or the folder cannot be written.
    """
    make_folder(target.parent)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staged.mkdir()
        write(staged)
        if target.is_dir():
            shutil.rmtree(target)
        staged.rename(target)
    except (OSError, SafetensorError) as error:
        raise PeanutError(f"cannot write '{target}': {error}", do="free some space or choose another folder") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
