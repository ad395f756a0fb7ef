"""Names of tensors: inside the library, and in files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...protocols import PeftConfig
from ..adapters.surgery import SHARED, key_of

__all__ = ["PREFIX", "KeyStyle", "file_key", "flat", "plain_key"]

PREFIX = "base_model.model."
"""What every key in a file begins with."""


@dataclass(frozen=True)
class KeyStyle:
    """How files write keys.

    Args:
        inner: what comes before the path of a module.
        shared: what comes before the suffix of a tensor that belongs to no module.
    """

    inner: str
    shared: str

    @staticmethod
    def of(config: PeftConfig) -> KeyStyle:
        """The style of an adapter's file: a prompt's has no layer of the library's in its paths."""
        return KeyStyle("base_model.", "") if config.is_prompt_learning else KeyStyle(PREFIX, "base_model.")


def file_key(key: str, style: KeyStyle) -> str:
    """A key as files write it: what layers share lies beside the model's modules."""
    return f"{style.shared}{key.removeprefix(SHARED)}" if key.startswith(SHARED) else f"{style.inner}{key}"


def plain_key(key: str, style: KeyStyle, shared: Collection[str] = ()) -> str:
    """The inverse of ``file_key``; ``shared`` are the suffixes of tensors that belong to no module.

    What DistributedDataParallel puts before a key, and torch.compile into it, is left out.
    """
    key = re.sub(r"^module\.(?=base_model\.)", "", key.replace("_orig_mod.", ""))
    if key.startswith(style.inner):
        return key.removeprefix(style.inner)
    if not style.shared:
        return f"{SHARED}{key}"
    bare = key.removeprefix(style.shared)
    return f"{SHARED}{bare}" if bare != key or bare in shared else key


def flat(grouped: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by key from those by path and suffix."""
    return {key_of(path, suffix): value for path, values in grouped.items() for suffix, value in values.items()}
