"""What shows that the files of an adapter are of one save, and that no bit of them has flipped since.

Both files carry the save's id: the tensors in their metadata, the config as a label of ``peft_version``
(``0.21.2+peanut.<id>``), which Hugging Face PEFT reads as the same version. It stays when a user edits the config, of
which the tensors' metadata have a digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import PeanutError
from ...files import read_json, staged_files
from ...protocols import PeftConfig
from ...protocols.config import CONFIG_NAME, LABEL, default_of

__all__ = [
    "CIRCUMSTANCES",
    "CONFIG",
    "SAVE",
    "TRAINS",
    "check_sum",
    "checksums",
    "config_digest",
    "file_text",
    "save_id",
    "staged_config",
    "with_sum",
    "without_label",
]

SAVE, TRAINS, CONFIG = "peanut_save", "peanut_training", "peanut_config"
"""Keys of a file's metadata: the id; in the file of the tensors, whether the save has training state, and a digest."""
CIRCUMSTANCES = frozenset(
    {
        "adapters",
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Fields of a config that say where, on what and for what an adapter was saved, not what it computes."""
_SUM = "peanut_sum"


def save_id(config: PeftConfig, *sums: str) -> str:
    """The id of a save: the same for the same config and checksums, so that the same adapter gives the same files."""
    return _digest(str(config), *sums)


def config_digest(config: PeftConfig) -> str:
    """A digest of what a config says of the adapter; a field that is at its default counts as one that is not there."""
    values = config.to_dict()
    said = {
        field.name: values[field.name]
        for field in dataclasses.fields(config)
        if field.name in values and field.name not in CIRCUMSTANCES and values[field.name] != default_of(field)
    }
    return _digest(json.dumps(said, sort_keys=True))


def file_text(config: PeftConfig, save: str) -> str:
    """What the file of a config says, with the id of its save."""
    return f"{dataclasses.replace(config, peft_version=f'{config.peft_version}{LABEL}{save}')}\n"


def without_label(config: PeftConfig) -> tuple[PeftConfig, str]:
    """A config that was read and the id of its save, which is empty if its writer gave it none."""
    version, save = config.version()
    return (dataclasses.replace(config, peft_version=version), save) if save else (config, "")


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


def with_sum(metadata: Mapping[str, str], sums: str) -> dict[str, str]:
    """The metadata of a file with a checksum of itself and of the tensors, of which ``checksums`` are given."""
    return {**metadata, _SUM: _digest(json.dumps(dict(metadata), sort_keys=True), sums)}


def check_sum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: object) -> None:
    """Checks what was read of a file, if its writer recorded a checksum.

    Raises:
        PeanutError: it is not what was written.
    """
    others = {key: value for key, value in metadata.items() if key != _SUM}
    if _SUM in metadata and with_sum(others, checksums(tensors))[_SUM] != metadata[_SUM]:
        raise PeanutError(
            f"'{path}' does not hold what was written: its checksum differs",
            "the tensors as they were saved",
            f"copy or save the adapter again (after a change on purpose, leave '{_SUM}' out of the metadata)",
        )


def checksums(tensors: Mapping[str, Tensor]) -> str:
    """The tensors' names, dtypes, shapes and CRCs."""
    return repr([(key, str(value.dtype), [*value.shape], _crc(value)) for key, value in sorted(tensors.items())])


def _crc(value: Tensor) -> int:
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy())  # type: ignore[arg-type]


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
