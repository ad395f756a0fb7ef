"""``nn.Conv2d``: its kernel (out, in/groups, h, w) as a matrix (out, in/groups·h·w)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import Delta
from ..operators.delta import recomputed
from .kind import LayerKind

__all__ = ["Conv2dKind"]


class Conv2dKind(LayerKind):
    """Each output pixel is the matrix times a patch; a low-rank change is an r-channel convolution, then a 1×1 one."""

    name = "conv2d"
    dims = 4

    def matches(self, module: object) -> bool:
        return isinstance(module, nn.Conv2d)

    def shape(self, module: nn.Conv2d) -> tuple[int, int]:
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)

    def usual(self, module: nn.Conv2d) -> bool:
        return type(module).forward is nn.Conv2d.forward

    def trial(self, module: nn.Conv2d, generator: torch.Generator) -> Tensor:
        sizes = (2 * d * (k - 1) + 3 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return torch.randn(1, module.in_channels, *sizes, generator=generator)

    def matrix(self, module: nn.Conv2d, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def layout(self, module: nn.Conv2d, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, *module.weight.shape[1:])

    def respond(self, module: nn.Conv2d, x: Tensor, delta: Delta) -> Tensor:
        factors = delta.factors()
        if factors is None:
            # The kernel is recomputed in the backward.
            return recomputed(lambda x: self._convolve(module, x, delta.dense()), x)
        up, down = factors
        # Every group sees the same r patterns on its own channels, so r·groups responses go to the 1×1 product.
        hidden = self._convolve(module, x, down.repeat(module.groups, 1))
        return F.conv2d(hidden, up[:, :, None, None], groups=module.groups)

    def down_shape(self, module: nn.Conv2d, r: int) -> tuple[int, ...]:
        return (r, *module.weight.shape[1:])

    def up_shape(self, module: nn.Conv2d, r: int) -> tuple[int, ...]:
        return (module.weight.shape[0], r, 1, 1)

    def mixes(self, module: nn.Conv2d) -> bool:
        return module.groups == 1

    def on_output(self, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(y.movedim(-3, -1)).movedim(-1, -3)

    def _convolve(self, module: nn.Conv2d, x: Tensor, matrix: Tensor) -> Tensor:
        """``x`` convolved as the layer does (stride, padding and its mode, dilation, groups), with another kernel."""
        y: Tensor = module._conv_forward(x, self.layout(module, matrix), None)
        return y
