"""Parameters that DeepSpeed's third stage has emptied: their shape is (0,), and ``ds_shape`` says what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import PeanutError

__all__ = ["gathered", "is_emptied", "shape_of", "whole"]


def is_emptied(value: Any) -> bool:
    """Whether a tensor is such a parameter, and its parts are not gathered now."""
    return hasattr(value, "ds_shape") and value.shape != value.ds_shape


def shape_of(value: Any) -> torch.Size:
    """The shape of a tensor, also while it is emptied."""
    return torch.Size(value.ds_shape if is_emptied(value) else value.shape)


@contextmanager
def whole(values: Sequence[Tensor]) -> Iterator[None]:
    """Within the context tensors have their values in every process; all processes have to enter it.

    Raises:
        PeanutError: DeepSpeed, which gathers them, is not there.
    """
    emptied = [value for value in values if is_emptied(value)]
    if not emptied:
        yield
        return
    try:
        import deepspeed
    except ImportError:
        raise PeanutError(
            "a weight that is to be read, and that DeepSpeed's third stage has emptied",
            "DeepSpeed, which gathers its parts",
            "install it, or use a method that does not read weights (LoRA)",
        ) from None
    with deepspeed.zero.GatheredParameters(emptied):
        yield


def gathered(value: Tensor) -> Tensor:
    """A tensor, or a copy of the whole of one that is emptied."""
    if not is_emptied(value):
        return value
    with whole([value]):
        return value.detach().clone()
