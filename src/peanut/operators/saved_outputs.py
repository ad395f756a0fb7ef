"""Saves a function's output for its own backward, if the output has not been changed in place since."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SavedOutput", "pulled_gain", "tells_gain", "weight_is_less"]

SPAN = 128
"""So many tokens' products are summed up at a time: they never leave a CPU's cache."""


class SavedOutput:
    """Whether the output of a function is still what it was when it was returned.

    A layer mostly keeps its input, so that an output costs its own function nothing to keep. The next layer may also
    change it in place, as an activation does that saves memory; then it cannot be used any more, where autograd
    would raise an error. So the function keeps ``y.data``, which autograd does not watch, and this, which holds no
    memory.
    """

    def __init__(self, y: Tensor) -> None:
        self.version, self.counter = y._version, y.detach()
        self.counter.data = y.new_empty(0)  # the counter of changes is still that of y

    def untouched(self) -> bool:
        """Whether nobody has changed it in place."""
        return self.counter._version == self.version

    def tells(self) -> bool:
        """Whether a backward may read it: where that is itself differentiated, y must not pass for a constant."""
        return self.untouched() and not torch.is_grad_enabled()

    @staticmethod
    def cheap(shape: Sequence[int]) -> bool:
        """Whether to keep the output of a layer of this shape, (out, in).

        Behind a layer that widens there mostly is an activation, which keeps its input; and an output half as wide as
        the input is little beside it, which is kept anyway. Behind others there may be a sum, which keeps nothing.
        """
        out, inputs = shape
        return out > inputs or 2 * out <= inputs


def weight_is_less(tokens: Tensor) -> bool:
    """Whether W has fewer numbers to change than the output of (tokens, in), in a dtype that holds a small change."""
    return tokens.shape[0] >= tokens.shape[1] and torch.finfo(tokens.dtype).bits >= 32


def tells_gain(y: Tensor, gain: Tensor) -> bool:
    """Whether y = g ⊙ z + b gives the gain's gradient: no gain is near zero, and so each can be divided away.

    Not in 16 bits, which round z off together with b; not on a GPU, where asking for the least gain would cost more
    than it saves; and not in compiled graphs, which decide themselves what they keep.
    """
    if torch.compiler.is_compiling() or y.device.type != "cpu" or torch.finfo(y.dtype).bits < 32:
        return False
    return bool(gain.abs().min() > 0.1)


def pulled_gain(y: Tensor, bias: Tensor | None, gain: Tensor, grads: Tensor) -> Tensor:
    """The gradient of g, (out), in y = g ⊙ z + b, from y and its gradient, (tokens, out): Σ (y − b) ⊙ grad / g."""
    total = torch.zeros_like(gain)
    for part, grad in zip(y.reshape(grads.shape).split(SPAN), grads.split(SPAN), strict=True):
        total += ((part if bias is None else part - bias) * grad).sum(0, dtype=gain.dtype)
    return total / gain
