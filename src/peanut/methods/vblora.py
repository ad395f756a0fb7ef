"""VB-LoRA: low-rank factors composed from one shared bank of short vectors (Li et al. 2024, arXiv 2405.15179)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators import LowRank
from ..protocols import Change, PeftConfig, Trial, Values, WeightMethod, register
from ..protocols.values import Count, NonNegative, Probability
from ..weights import FrozenLayer
from .variational_lora import VariationalLoraConfig

__all__ = ["VBLoRA", "VBLoRAConfig"]

VARIATIONAL = frozenset({"vb_r", "vb_pi", "vb_beta"})
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


@dataclass(kw_only=True)
class VBLoRAConfig(PeftConfig):
    """Config of VB-LoRA.

    The name is also used for variational LoRA: with ``vb_r``, ``vb_pi`` or ``vb_beta`` among its keywords, a call
    returns a ``VariationalLoraConfig``.

    Args:
        r: rank.
        num_vectors: number of vectors in the bank.
        vector_length: their length; it must divide both widths of every adapted layer.
        topk: number of vectors that are mixed into one piece of a factor. (Of one alone the weight is 1 whatever its
            logit: the logits then stay as they started, and the bank alone is trained.)
        save_only_topk_weights: write only the chosen vectors' indices and weights to files. An adapter loaded from
            such a file keeps its choice of vectors for good.
        vblora_dropout: dropout of the change's input.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        bias: ``"none"``, or the biases trained beside it: ``"vblora_only"`` of the adapted layers, ``"all"``.
        init_vector_bank_bound: the bank starts uniform between minus and plus this.
        init_logits_std: the logits start normal with this deviation.
    """

    method = "VBLORA"

    r: Count = 4
    num_vectors: Count = 256
    vector_length: Count = 256
    topk: Count = 2
    save_only_topk_weights: bool = False
    vblora_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: NonNegative = 0.02
    init_logits_std: NonNegative = 0.1

    def __new__(cls, **options: Any) -> Any:
        # What is returned here is no VBLoRAConfig, so Python does not call this class's __init__ on it.
        return VariationalLoraConfig(**options) if VARIATIONAL & options.keys() else super().__new__(cls, **options)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise PeanutError(
                f"topk={self.topk} of num_vectors={self.num_vectors}", "at most all of them", "lower topk"
            )


@register
class VBLoRA(WeightMethod[VBLoRAConfig]):
    """ΔW = B · A, cut into pieces of length v, each Σ softmax(its k largest logits) · their vectors of the bank.

    Shared: the bank (num_vectors, v). In a layer: logits of A (r, in/v, num_vectors), of B (out/v, r, num_vectors).
    """

    config_class = VBLoRAConfig
    kinds = ("linear", "conv1d", "conv")  # pieces of a vocabulary's width would have no meaning
    size = "r * (d_in + d_out) // vector_length * num_vectors"

    def tried(self, on: Trial) -> dict[str, Any]:
        return {"vector_length": on.divisor(256)}

    def shared(
        self, config: VBLoRAConfig, layers: Sequence[FrozenLayer], generator: torch.Generator
    ) -> dict[str, Tensor]:
        bound, bank = config.init_vector_bank_bound, torch.empty(config.num_vectors, config.vector_length)
        return {"vblora_vector_bank": nn.init.uniform_(bank, -bound, bound, generator=generator)}

    def start(self, config: VBLoRAConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        r, number, length = config.r, config.num_vectors, config.vector_length
        shapes = {
            "vblora_logits_A": (r, layer.in_features // length, number),
            "vblora_logits_B": (layer.out_features // length, r, number),
        }
        return {
            suffix: nn.init.normal_(torch.empty(shape), std=config.init_logits_std, generator=generator)
            for suffix, shape in shapes.items()
        }

    def change(self, config: VBLoRAConfig, parameters: Values, layer: FrozenLayer) -> Change:
        bank = parameters["vblora_vector_bank"]
        A = mixed(parameters["vblora_logits_A"], bank, config.topk).flatten(1)  # (r, in/v, v)
        B = mixed(parameters["vblora_logits_B"], bank, config.topk).transpose(1, 2).flatten(0, 1)  # (out/v, r, v)
        return Change(delta=LowRank(B, A), dropout=config.vblora_dropout)

    def stored(
        self, config: VBLoRAConfig, layers: Mapping[str, Values]
    ) -> tuple[VBLoRAConfig, dict[str, dict[str, Tensor]]]:
        config, tensors = super().stored(config, layers)
        if not config.save_only_topk_weights:
            return config, tensors
        limits = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}
        dtype = next((dtype for dtype, limit in limits.items() if config.num_vectors < limit), torch.int64)
        for values in tensors.values():
            for suffix in [suffix for suffix in values if suffix.startswith("vblora_logits_")]:
                logits, indices = values.pop(suffix).topk(config.topk)
                values[suffix + INDICES] = indices.to(dtype)
                # The weights add up to 1, so the last and least is left out.
                values[suffix + WEIGHTS] = torch.softmax(logits, dim=-1)[..., :-1].contiguous()
        return config, tensors

    def restored(self, config: VBLoRAConfig, layers: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
        restored = super().restored(config, layers)
        for values in restored.values():
            for suffix in [suffix.removesuffix(INDICES) for suffix in values if suffix.endswith(INDICES)]:
                indices, weights = values.pop(suffix + INDICES), values.pop(suffix + WEIGHTS)
                if (
                    indices.is_floating_point()
                    or not 0 <= int(indices.min()) <= int(indices.max()) < config.num_vectors
                ):
                    raise PeanutError(
                        f"the file's {suffix}{INDICES} names vectors that are not there",
                        f"whole numbers below num_vectors={config.num_vectors}",
                        "save the adapter again",
                    )
                if bool((weights < 0).any()):
                    raise PeanutError(f"the file's {suffix}{WEIGHTS} is negative", "shares", "save the adapter again")
                last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
                logits = weights.new_full((*weights.shape[:-1], config.num_vectors), -torch.inf)
                values[suffix] = logits.scatter(-1, indices.long(), torch.cat([weights, last], dim=-1).log())
        return restored

    def check(self, config: VBLoRAConfig, layer: FrozenLayer, path: str) -> None:
        if layer.in_features % config.vector_length or layer.out_features % config.vector_length:
            raise PeanutError(
                f"vector_length={config.vector_length} for '{path}' of shape "
                f"({layer.out_features}, {layer.in_features})",
                "a length that divides both",
                "change vector_length, or leave the layer out of target_modules",
            )


def mixed(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """(…, num_vectors) → (…, v): the k vectors with the largest logits, weighted by those logits' softmax."""
    largest, chosen = logits.topk(k, dim=-1)
    return torch.einsum("...k,...kv->...v", torch.softmax(largest, dim=-1), F.embedding(chosen, bank))
