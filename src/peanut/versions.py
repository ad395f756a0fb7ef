"""Whether a tensor is still what it was when something was computed from it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["counted", "version"]


def counted(tensor: Tensor) -> bool:
    """Whether torch counts its versions and it has memory of its own: not made in inference mode, and not fake."""
    own = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return own and not tensor.is_inference()


def version(tensor: Tensor) -> tuple[object, ...]:
    """A value that changes whenever a ``counted`` tensor does, or another takes its place.

    It tells one tensor from another only while the first is held: memory that is let go is given out again. Writing
    through ``data`` is not seen.
    """
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.stride()
