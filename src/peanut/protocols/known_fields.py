"""Which fields of a config's file are known, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ..errors import PeanutError, nearest, shown, warn
from .values import takes_none

__all__ = ["known_fields"]

_NEUTRAL = {"megatron_core": "megatron.core", "qalora_group_size": 16}
"""Fields of Hugging Face PEFT with the value that has no effect."""


def known_fields(config_class: Any, values: Mapping[str, Any], source: str, version: str) -> set[str]:
    """The fields of a config class that ``values`` sets: ``None`` is the default of a field that cannot be so.

    Args:
        version: that of Hugging Face PEFT whose files are known; of a later one's, unknown fields are told and ignored.

    Raises:
        PeanutError: another field asks for something.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    strange = [name for name, value in values.items() if name not in known and not _asks_for_nothing(name, value)]
    if strange and _is_later(values.get("peft_version"), version):
        warn(
            f"{source} was written by Hugging Face PEFT {shown(values['peft_version'])}, and what it sets is not "
            f"known here and ignored: {', '.join(f'{name}={shown(values[name])}' for name in strange)}",
        )
    elif strange:
        raise PeanutError(
            f"{source} sets {strange[0]}={shown(values[strange[0]])}",
            f"the fields of {config_class.__name__}",
            f"remove it (nearest: {nearest(strange[0], known)})",
        )
    return known & ({name for name, value in values.items() if value is not None} | takes_none(config_class))


def _asks_for_nothing(name: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_asks_for_nothing(inner, each) for inner, each in value.items())
    return value is None or value is False or value == [] or _NEUTRAL.get(name) == value


def _is_later(written: object, version: str) -> bool:
    found = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", str(written))
    return found is not None and [int(part or 0) for part in found.groups()] > [*map(int, version.split("."))]
