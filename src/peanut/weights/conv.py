"""``nn.Conv1d``, ``Conv2d``, ``Conv3d``: their kernel (out, in/groups, k…) as a matrix (out, in/groups·∏k)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import Delta
from ..operators.delta import recomputed
from .emptied import shape_of
from .kind import LayerKind

__all__ = ["ConvKind"]

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class ConvKind(LayerKind):
    """Each output place is the matrix times a patch; a low-rank change is an r-channel convolution, then a 1×1 one."""

    name = "conv"
    dims = None

    def matches(self, module: object) -> bool:
        return isinstance(module, tuple(_CONVOLUTIONS))

    def shape(self, module: Conv) -> tuple[int, int]:
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)

    def fits(self, module: Conv, weight: Tensor) -> bool:
        return weight.dim() == 2 + len(module.kernel_size) and super().fits(module, weight)

    def usual(self, module: Conv) -> bool:
        return type(module).forward in [made.forward for made in _CONVOLUTIONS]

    def trial(self, module: Conv, generator: torch.Generator) -> Tensor:
        sizes = (2 * d * (k - 1) + 3 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return torch.randn(1, module.in_channels, *sizes, generator=generator)

    def matrix(self, module: Conv, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def layout(self, module: Conv, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, *module.weight.shape[1:])

    def respond(self, module: Conv, x: Tensor, delta: Delta) -> Tensor:
        factors = delta.factors()
        if factors is None:
            # The kernel is recomputed in the backward.
            return recomputed(lambda x: self._convolve(module, x, delta.dense()), x)
        up, down = factors
        # Every group sees the same r patterns on its own channels, so r·groups responses go to the 1×1 product.
        hidden = self._convolve(module, x, down.repeat(module.groups, 1))
        pointwise = next(function for made, function in _CONVOLUTIONS.items() if isinstance(module, made))
        return pointwise(hidden, up.reshape(*up.shape, *_ones(module)), groups=module.groups)

    def down_shape(self, module: Conv, r: int) -> tuple[int, ...]:
        return (r, *shape_of(module.weight)[1:])

    def up_shape(self, module: Conv, r: int) -> tuple[int, ...]:
        return (module.weight.shape[0], r, *_ones(module))

    def mixes(self, module: Conv) -> bool:
        return module.groups == 1

    def on_output(self, module: Conv, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        channels = -1 - len(module.kernel_size)
        return function(y.movedim(channels, -1)).movedim(-1, channels)

    def _convolve(self, module: Conv, x: Tensor, matrix: Tensor) -> Tensor:
        """``x`` convolved as the layer does (stride, padding and its mode, dilation, groups), with another kernel."""
        y: Tensor = module._conv_forward(x, self.layout(module, matrix), None)
        return y


def _ones(module: Conv) -> tuple[int, ...]:
    return (1,) * len(module.kernel_size)
