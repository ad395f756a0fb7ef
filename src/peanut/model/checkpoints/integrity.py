"""What shows that the files of an adapter are of one save, and that no bit of its tensors has flipped since.

Both files carry the save's id: the tensors in their metadata, the config as a label of ``peft_version``
(``0.21.2+peanut.<id>``), which Hugging Face PEFT reads as the same version. It stays when a user edits the config.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import PeanutError
from ...files import read_json, staged_files
from ...protocols import PeftConfig
from ...protocols.config import CONFIG_NAME, LABEL

__all__ = [
    "SAVE",
    "TRAINS",
    "check_sum",
    "labelled",
    "save_id",
    "staged_config",
    "with_sum",
    "without_label",
    "write_tensors",
]

SAVE, TRAINS = "peanut_save", "peanut_training"
"""Keys of a file's metadata: the id, and in the file of the tensors, whether the save has training state."""
_SUM = "peanut_sum"


def save_id(config: PeftConfig, *parts: Mapping[str, Tensor]) -> str:
    """The id of a save: the same for the same config and tensors, so that the same adapter gives the same files."""
    return _digest(str(config), *map(_summed, parts))


def labelled(config: PeftConfig, save: str) -> PeftConfig:
    """The config with the id of its save."""
    return replace(config, peft_version=f"{config.peft_version}{LABEL}{save}")


def without_label(config: PeftConfig) -> tuple[PeftConfig, str]:
    """A config that was read and the id of its save, which is empty if its writer gave it none."""
    version, _, save = str(config.peft_version).partition(LABEL)
    return (replace(config, peft_version=version), save) if save else (config, "")


def staged_config(folder: Path, save: str) -> PeftConfig | None:
    """The config of a save whose writer is at work or was killed when only the tensors had their name."""
    for path in staged_files(folder, CONFIG_NAME):
        try:
            config, own = without_label(PeftConfig.from_dict(read_json(path), source=f"'{path}'"))
        except PeanutError:  # it has just got its name, or was never written to its end
            continue
        if own == save:
            return config
    return None


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file with a checksum; its metadata are in order, so that the same gives the same bytes."""
    save_file(dict(tensors), path, metadata=with_sum(metadata, tensors))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def with_sum(metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a file with a checksum of itself and of the tensors."""
    return {**metadata, _SUM: _digest(json.dumps(metadata, sort_keys=True), _summed(tensors))}


def check_sum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: object) -> None:
    """Checks what was read of a file, if its writer recorded a checksum.

    Raises:
        PeanutError: it is not what was written.
    """
    others = {key: value for key, value in metadata.items() if key != _SUM}
    if _SUM in metadata and with_sum(others, tensors)[_SUM] != metadata[_SUM]:
        raise PeanutError(
            f"'{path}' does not hold what was written: its checksum differs",
            "the tensors as they were saved",
            f"copy or save the adapter again (after a change on purpose, leave '{_SUM}' out of the metadata)",
        )


def _summed(tensors: Mapping[str, Tensor]) -> str:
    """The tensors' names, dtypes, shapes and CRCs."""
    return repr([(key, str(value.dtype), [*value.shape], _crc(value)) for key, value in sorted(tensors.items())])


def _crc(value: Tensor) -> int:
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy())  # type: ignore[arg-type]


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
