"""What is being called in this thread, read off the stack: hooks on every module would cost more than all else."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

__all__ = ["called_by", "caller", "in_a_forward", "in_a_function"]


def in_a_forward() -> bool:
    """Whether a module is being called, by ``forward`` itself too, or a checkpointed part of one is run again."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is nn.Module._call_impl.__code__ or code.co_filename == checkpoint.__file__:
            return True
        if code.co_name == "forward" and isinstance(frame.f_locals.get((*code.co_varnames, "")[0]), nn.Module):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def caller(function: Any) -> FrameType | None:
    """The innermost frame of ``function`` that this is called from, ``None`` if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame


def called_by(function: Any) -> bool:
    """Whether whoever calls this was called by ``function``."""
    return sys._getframe(2).f_code is function.__code__


def in_a_function() -> bool:
    """Whether a ``torch.autograd.Function`` is being applied."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.autograd.Function.apply.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
