"""What is being called in this thread, read off the stack: hooks on every module would cost more than all else."""

from __future__ import annotations

import sys
from types import CodeType

import torch
from torch import nn

__all__ = ["in_a_forward", "in_a_function"]


def in_a_forward() -> bool:
    """Whether a module is being called."""
    return _running(nn.Module._call_impl.__code__)


def in_a_function() -> bool:
    """Whether a ``torch.autograd.Function`` is being applied."""
    return _running(torch.autograd.Function.apply.__code__)


def _running(code: CodeType) -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
