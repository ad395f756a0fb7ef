"""Quantised linear layers of bitsandbytes (4-bit NF4 and FP4, 8-bit), dequantised when read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .linear import LinearKind

__all__ = ["Linear4bitKind", "Linear8bitKind"]


class Linear4bitKind(LinearKind):
    """y = x Wᵀ + b, W stored as 4-bit codes with a scale per block (the scales quantised again, if double)."""

    quantised = True

    def matches(self, module: object) -> bool:
        return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")

    def matrix(self, module: Any, weight: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        matrix: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return matrix.reshape(self.shape(module))

    def fix_storage(self, module: Any) -> None:
        # On a CPU with AVX512-BF16 bitsandbytes packs the codes anew at the first evaluation, in place: then they stand
        # for other numbers, and the product with them has no gradient.
        module.support_avx512bf16_for_cpu = False
        weight = module.weight
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            scales = state.absmax
            state.original_nested = False  # else it would quantise the scales again
            weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
            state.absmax, state.nested = scales.T.reshape(-1).float(), False
            weight.quant_state = state

    def quantise(self, module: Any, matrix: Tensor) -> nn.Parameter:
        from bitsandbytes.nn.modules import Params4bit

        state = module.weight.quant_state
        codes: Any = Params4bit(
            matrix.to(state.dtype),
            requires_grad=False,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            blocksize=state.blocksize,
        )
        made: nn.Parameter = codes.to(module.weight.device)  # which is when it is quantised
        return made


class Linear8bitKind(LinearKind):
    """y = x Wᵀ + b, W stored as 8-bit codes with a scale per row (LLM.int8)."""

    quantised = True

    def matches(self, module: object) -> bool:
        return type(module).__name__ == "Linear8bitLt" and type(module).__module__.startswith("bitsandbytes")

    def matrix(self, module: Any, weight: Any) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        matrix: Tensor = int8_vectorwise_dequant(weight.data, self._scales(module, weight))
        return matrix

    def quantise(self, module: Any, matrix: Tensor) -> nn.Parameter:
        from bitsandbytes.functional import int8_vectorwise_quant
        from bitsandbytes.nn.modules import Int8Params

        module.weight.SCB = self._scales(module, module.weight)  # else only the layer knows them, and forgets them
        codes, scales, _ = int8_vectorwise_quant(matrix.to(module.weight.device, torch.float16))
        made: nn.Parameter = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        return made

    def install(self, module: Any, weight: Any) -> None:
        scales = weight.SCB
        super().install(module, weight)
        module.state.CB, module.state.SCB = weight.data, scales

    def called_with(self, module: Any, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        weight: Any = tensors["weight"]
        twin = copy.copy(module)
        twin._parameters = {**module._parameters, **tensors}
        twin.state = copy.copy(module.state)
        twin.state.CB, twin.state.SCB = weight.data, weight.SCB
        return twin(*args, **kwargs)

    def _scales(self, module: Any, weight: Any) -> Tensor:
        scales: Tensor = module.state.SCB if weight.SCB is None else weight.SCB
        return scales
