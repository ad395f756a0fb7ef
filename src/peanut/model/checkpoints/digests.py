"""Digests of a base's parameters: a change of a single entry, which samples miss, shows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Digest", "changed", "digest_of"]

Digest = tuple[torch.dtype, str]
"""The dtype of a parameter and the digest of its values in it."""

_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
"""The precisions to which a base may have been rounded on its way here."""
_FEW = 4
"""How many parameters tell to which precision all were rounded."""
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def digest_of(value: Tensor) -> str:
    """A hash of the sum of each row's bits, taken as whole numbers: exact, in any order, as fast as memory is read.

    Two rows that are swapped differ, two entries of one row do not.
    """
    rows = value.detach().reshape(len(value) if value.dim() else 1, -1).contiguous()
    rows = rows if rows.storage_offset() == 0 else rows.clone()  # else words that begin between two bytes of one
    size = rows.shape[1] * rows.element_size()
    word = next(word for word in _WORDS if size % word.itemsize == 0)
    sums = rows.view(word).sum(1, dtype=torch.int64).cpu()
    return hashlib.blake2b(sums.numpy(), digest_size=4).hexdigest()  # type: ignore[arg-type]


def changed(base: Mapping[str, Tensor], recorded: Mapping[str, Digest]) -> set[str]:
    """The parameters of ``base`` that are not what was recorded, as far as that can be told.

    It cannot where the base here is less precise, or was rounded as a whole; and the recorded one may have been.
    """
    shared = {
        path: (base[path], dtype, own)
        for path, (dtype, own) in recorded.items()
        if path in base and torch.promote_types(base[path].dtype, dtype) == base[path].dtype
    }
    found = {path for path, (value, dtype, own) in shared.items() if digest_of(value.to(dtype)) != own}
    # What was recorded may have been rounded, and to what a few of them tell.
    few = [shared[path] for path in sorted(found)[:_FEW]]
    for to in {each for value, dtype, own in few for each in _below(dtype) if _agree(value, dtype, own, each)}:
        found -= {path for path in found if _agree(*shared[path], to)}
    for precision in _PRECISIONS if found else ():
        wide = {path: value for path, (value, dtype, _) in shared.items() if precision in _below(dtype)}
        same = [value for path, value in wide.items() if path not in found]
        # Of a base that was rounded here, only what is constant is the same.
        if all(torch.equal(value, value.to(precision).to(value.dtype)) for value in wide.values()) and all(
            value.min() == value.max() for value in same
        ):
            found -= wide.keys()
    return found


def _agree(value: Tensor, dtype: torch.dtype, own: str, to: torch.dtype) -> bool:
    """Whether a digest is that of the values rounded to a precision."""
    return digest_of(value.to(to).to(dtype)) == own


def _below(dtype: torch.dtype) -> list[torch.dtype]:
    return [own for own in _PRECISIONS if own != dtype and torch.promote_types(own, dtype) == dtype]
