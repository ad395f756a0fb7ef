"""Reads an adapter's folder whole, before any model is touched, also beside writers and after a kill."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import PeanutError, warn
from ...files import staged_files
from ...hub import locate
from ...protocols import PeftConfig
from ...protocols.config import CONFIG_NAME
from .fingerprint import FINGERPRINT, OLD_FINGERPRINT
from .integrity import CONFIG, SAVE, TRAINS, config_digest, file_text, staged_config, without_label
from .keys import KeyStyle, plain_key
from .tensor_files import open_tensors, read_tensors

__all__ = ["PICKLE_NAME", "TRAINING_NAME", "WEIGHTS_NAME", "StoredAdapter", "locate_weights", "read_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
"""What Hugging Face PEFT wrote before, and writes if it is asked to."""
TRAINING_NAME = "adapter_training.safetensors"
"""Training state (statistics of schedules), saved separately for resuming; an adapter loaded for use ignores it."""
_READS = 20
"""How often files are read that are of two saves or change meanwhile, as they do beside a writer."""


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter's folder holds.

    Args:
        state: the adapter's tensors by key, without the prefix.
        base: the fingerprint of the base that it was trained on, if its writer recorded one.
        passing: training state, by key.
        fits: whether that is of the same save.
    """

    config: PeftConfig
    state: dict[str, Tensor]
    base: str | None
    source: str
    passing: Mapping[str, Tensor] = field(default_factory=dict)
    fits: bool = True


def read_adapter(
    source: str | os.PathLike[str],
    config: PeftConfig | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> StoredAdapter:
    """Reads an adapter's folder (or hub repository) whole.

    Files of two saves, or that change meanwhile, are read again: a writer may be at work. Of one that was killed, the
    tensors that have their name tell which save it is, and the other files of it are there under temporary names.
    It warns if the config is not as it was saved, or if only one of the files is of this library.

    Raises:
        PeanutError: a file is missing, truncated, damaged or not safetensors, holds values that are not finite, or the
            config and the tensors are of two saves.
    """
    folder = Path(source) / (hub.get("subfolder") or "")
    for attempt in range(_READS):
        time.sleep(0.001 * attempt)
        before = _stamps(folder)
        try:
            found = _read_once(source, config, attempt, **hub)
        except PeanutError:
            if attempt == _READS - 1 or _stamps(folder) == before:
                raise
            continue
        if found is not None:
            return replace(found, state=_renamed(found.state, key_mapping or {}))
    raise PeanutError(
        f"'{source}' holds {CONFIG_NAME} of one save and {WEIGHTS_NAME} of another",
        "files that were saved together",
        f"copy both from one folder, or, if you are sure, pass config=PeftConfig.from_pretrained('{source}')",
    )


def locate_weights(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The path of an adapter's tensors: a safetensors file, and only where there is none a pickle."""
    try:
        return locate(source, WEIGHTS_NAME, **hub)
    except PeanutError as error:
        try:
            return locate(source, PICKLE_NAME, **hub)
        except PeanutError:
            raise error from None


def _renamed(state: Mapping[str, Tensor], key_mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by the key that the first pattern found in it makes of it."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        changed = (re.subn(pattern, new, key) for pattern, new in key_mapping.items())
        renamed[next((new for new, count in changed if count), key)] = value
    if len(renamed) < len(state):
        raise PeanutError("key_mapping gives two tensors one key", "a key for each", "make its patterns narrower")
    return renamed


def _stamps(folder: Path) -> list[tuple[int, ...]]:
    """What tells whether a file was written anew, of each of an adapter's files."""
    stamps: list[tuple[int, ...]] = []
    for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, TRAINING_NAME):
        with suppress(OSError):
            stat = (folder / name).stat()
            stamps.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return stamps


def _read_once(
    source: str | os.PathLike[str], config: PeftConfig | None, attempt: int, **hub: Any
) -> StoredAdapter | None:
    """What is in an adapter's files, or ``None`` if they are of two saves."""
    read, written = without_label(PeftConfig.read(source, **hub) if config is None else config)
    weights = locate_weights(source, **hub)
    folder = weights.parent
    before = _stamps(folder)
    save = ""
    if weights.name == WEIGHTS_NAME:
        with open_tensors(weights) as file:  # its header alone: the pair may not fit
            save = (file.metadata() or {}).get(SAVE, "")
    if config is None and save and save != written:
        staged = staged_config(folder, save)
        if staged is None and (written or attempt == 0):  # one without an id may have been written by hand
            return None
        read = staged or read
    state, metadata = _read(weights, KeyStyle.of(read))
    if metadata.get(SAVE, "") != save:  # it was written anew
        return None
    if not save and attempt < _READS - 1 and _stamps(folder) != before:  # it has no checksum either
        return None
    passing, fits = _training(folder, KeyStyle.of(read), metadata)
    if config is None and config_digest(read) != metadata.get(CONFIG, config_digest(read)):
        warn(
            f"{CONFIG_NAME} in '{source}' is not as it was saved; if you have not changed it, copy or save the adapter "
            "again",
        )
    elif config is None and written and not save and _is_ours(folder, read, written):
        warn(
            f"{CONFIG_NAME} in '{source}' was saved by this library and {weights.name} by another; if they do not "
            "belong together, copy or save the adapter again",
        )
    base = metadata.get(FINGERPRINT) or metadata.get(OLD_FINGERPRINT)
    return StoredAdapter(read, state, base, str(source), passing, fits)


def _is_ours(folder: Path, config: PeftConfig, save: str) -> bool:
    """Whether a config is as this library wrote it: Hugging Face PEFT keeps the id, and ends the file otherwise."""
    with suppress(OSError, UnicodeDecodeError):
        return (folder / CONFIG_NAME).read_text(encoding="utf-8") == file_text(config, save)
    return False


def _training(folder: Path, style: KeyStyle, metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], bool]:
    """The training state in a folder, and whether it is of the save of the tensors whose metadata these are."""
    path, save = folder / TRAINING_NAME, metadata.get(SAVE)
    if save and TRAINS not in metadata:  # what is there is of a save before, which was killed at its end
        return {}, True
    read = [_read(path, style)] if path.is_file() else []
    if save:
        for staged in staged_files(folder, TRAINING_NAME) if folder.is_dir() else ():
            with suppress(PeanutError, FileNotFoundError):  # never written to its end, or has just got its name
                read.append(_read(staged, style))
    fitting = [state for state, own in read if not save or own.get(SAVE, save) == save]
    if fitting or not read:
        return (fitting[0] if fitting else {}), True
    return read[0][0], False


def _read(path: str | os.PathLike[str], style: KeyStyle) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, by key without the prefix, and its metadata."""
    state, metadata = read_tensors(path)
    return {plain_key(key, style): value for key, value in state.items()}, metadata
