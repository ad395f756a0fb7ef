"""Where a tensor lies in memory, which tells whether it is a part of another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["span", "storage_of"]


def storage_of(tensor: Any) -> int | None:
    """What a tensor has in common with its views; ``None`` for what has no storage of that kind."""
    strided = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if strided else None


def span(tensor: Any) -> tuple[str, int, int] | None:
    """The device, the first byte of a plain tensor there, and the one after its last; ``None`` for all others.

    Those are tensors of other classes, offloaded ones, and ones without elements.
    """
    plain = type(tensor) in (nn.Parameter, Tensor) and tensor.layout is torch.strided
    if not plain or not tensor.data_ptr():
        return None
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
