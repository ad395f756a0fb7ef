"""``Operator``: what Δ, rotations and changes have in common: parts, which are cast together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Operator"]


class Operator:
    """A frozen dataclass of tensors, other operators and plain values; two of them are equal if they are one."""

    def to(self, dtype: torch.dtype) -> Self:
        """The same with its floating-point tensors in ``dtype``; gradients flow back through the cast."""
        return type(self)(**{name: _cast(value, dtype, "to") for name, value in vars(self).items()})

    def for_inference(self, dtype: torch.dtype) -> Any:
        """The same for evaluation in ``dtype``, with all computed beforehand that few tokens can use."""
        if type(self).to is not Operator.to:  # what does not cast all of its parts does not here either
            return self.to(dtype)
        return type(self)(**{name: _cast(value, dtype, "for_inference") for name, value in vars(self).items()})


def _cast(value: Any, dtype: torch.dtype, how: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(each, dtype, how) for each in value)
    return getattr(value, how)(dtype) if isinstance(value, Operator) else value
