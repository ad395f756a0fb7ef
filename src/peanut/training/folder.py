"""The output folder of a run: its files, and whether the run can be resumed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import PeanutError, warn
from ..files import staged_files, write_files
from .checkpoints import STATE_NAME, is_whole, whole_checkpoints
from .config import RunConfig, differing_keys, load_config, to_yaml

__all__ = ["RunFolder"]


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

    def check(self, config: RunConfig) -> None:
        """Checks that the folder is new or holds a run of the same config.

        Raises:
            PeanutError: it is neither.
        """
        if self.config.is_file():
            self._check_same(config)
        elif self._checkpoints():
            raise PeanutError(
                f"'{self.path}' holds checkpoints and no {self.config.name}",
                "an empty folder, or that of a run",
                "choose another output, or pass --overwrite to delete them",
            )

    def begin(self, config: RunConfig, overwrite: bool) -> Path | None:
        """Makes the folder ready for a run of ``config`` or the rest of it, and gives the checkpoint to go on from.

        It is called by the one process that has the folder, and removes what killed runs left half written.
        """
        if overwrite:
            self._clear()
        for left in self._half_written():
            if left.name.startswith("checkpoint-"):
                why = f"is damaged ({STATE_NAME})" if (left / STATE_NAME).is_file() else f"lacks {STATE_NAME}"
                warn(f"'{left}' {why} and is removed: training goes on from the one before it, if there is one")
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        if not self.config.is_file():
            write_files(self.path, {self.config.name: lambda path: path.write_text(to_yaml(config), encoding="utf-8")})
        return self.latest()

    def latest(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        whole = whole_checkpoints(self.path)
        return whole[-1] if whole else None

    def _half_written(self) -> list[Path]:
        """Checkpoints without an end, and the temporary files and folders in which ``files`` and others write."""
        files = [own.name for own in (self.config, self.log, self.curve, self.metrics)]
        temporary = [left for name in files if self.path.is_dir() for left in staged_files(self.path, name)]
        temporary += [left for left in self.path.glob(".adapter.*") if left.suffix[1:].isdigit() and left.is_dir()]
        temporary += self.path.glob("tmp-checkpoint-*")
        return [folder for folder in self._checkpoints() if not is_whole(folder)] + temporary

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
