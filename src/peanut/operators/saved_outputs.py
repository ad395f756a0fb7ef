"""Saves a function's output for its own backward, if the output has not been changed in place since."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SavedOutput", "pulled_gain", "tells_gain", "weight_is_less"]

SPAN = 128
"""How many tokens' products are summed at a time, so that they stay in a CPU's cache."""


class SavedOutput:
    """Tells whether a function's output was changed in place after it was returned.

    The next layer usually saves its input, so saving the output here costs no extra memory. If that layer changes it in
    place instead (``nn.ReLU(inplace=True)``), it can no longer be used, and autograd would raise an error. So the
    function saves ``y.data``, which autograd does not track, and this object, which holds no memory.
    """

    def __init__(self, y: Tensor) -> None:
        self.version, self.counter = y._version, y.detach()
        self.counter.data = y.new_empty(0)  # the version counter is still that of y

    def untouched(self) -> bool:
        """Whether it has not been changed in place."""
        return self.counter._version == self.version

    def tells(self) -> bool:
        """Whether a backward may use it: not if that is itself differentiated, where y would count as a constant."""
        return self.untouched() and not torch.is_grad_enabled()

    @staticmethod
    def cheap(shape: Sequence[int]) -> bool:
        """Whether to save the output of a layer of this shape, (out, in).

        A layer that widens is usually followed by an activation, which saves its input anyway; and an output at most
        half as wide as the input is small beside it. Other layers may be followed by a sum, which saves nothing.
        """
        out, inputs = shape
        return out > inputs or 2 * out <= inputs


def weight_is_less(tokens: Tensor) -> bool:
    """Whether scaling W takes fewer operations than scaling the output, in a dtype that can hold a small change."""
    return tokens.shape[0] >= tokens.shape[1] and torch.finfo(tokens.dtype).bits >= 32


def tells_gain(y: Tensor, gain: Tensor) -> bool:
    """Whether y = g ⊙ z + b gives the gain's gradient: z = (y − b) / g needs gains that are not near zero.

    Not in 16 bits, which round z off together with b; not on a GPU, where reading the least gain would cost more
    than it saves; and not in compiled graphs, which decide themselves what they save.
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
