"""Diff pruning: a sparse update, whose sparsity is learned by gates (Guo, Rush & Kim 2020, arXiv 2012.07463)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..operators.delta import applied, captured, transformed
from ..operators.hard_concrete import HardConcrete
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import NonNegative
from ..weights import FrozenLayer

__all__ = ["DiffPruning", "DiffPruningConfig"]

LOW, HIGH = -1.5, 1.5
"""l and r of the paper, the range of a gate before it is cut to [0, 1]. As log(−l/r) = 0, P(z > 0) is σ(α)."""

SEED = "seed"
"""Under this name the seed of a forward's noise goes from ``sampled`` to ``change``."""


@dataclass(kw_only=True)
class DiffPruningConfig(PeftConfig):
    """Config of diff pruning.

    Args:
        l0_weight: λ, the price of an entry that differs from the base: the loss gains λ · E‖δ‖₀.
        init_log_alpha: first value of every gate's α.
        structured: each weight matrix has a gate for all of its entries beside theirs.
    """

    method = "DIFF_PRUNING"

    l0_weight: NonNegative = 1.25e-7
    init_log_alpha: float = 5.0
    structured: bool = False


@register
class DiffPruning(WeightMethod[DiffPruningConfig]):
    """ΔW = δ = z ⊙ w with w and z (out, in), z hard-concrete: clamp(l + (r − l)·σ(α + log u − log(1 − u)), 0, 1).

    In training u is uniform in (0, 1), drawn for each forward; else it is 1/2, so that z = clamp(l + (r − l)·σ(α)).
    Structured: δ = z_matrix · z ⊙ w. The penalty is λ · Σ P(z > 0), with P(z > 0) = σ(α − log(−l/r)).
    """

    config_class = DiffPruningConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "2 * d_in * d_out"

    def start(self, config: DiffPruningConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        size = (layer.out_features, layer.in_features)
        values = {"diff_w": torch.zeros(size), "diff_log_alpha": torch.full(size, float(config.init_log_alpha))}
        if config.structured:
            values["diff_group_log_alpha"] = torch.full((1,), float(config.init_log_alpha))
        return values

    def change(self, config: DiffPruningConfig, parameters: Values, layer: FrozenLayer) -> Change:
        group, seed = parameters.get("diff_group_log_alpha"), parameters.get(SEED)
        gates = HardConcrete(parameters["diff_w"], parameters["diff_log_alpha"], group, LOW, HIGH)
        return Change(delta=gates if seed is None else replace(gates, seed=int(seed)))

    def sampled(self, config: DiffPruningConfig, parameters: Values) -> Values:
        """With noise on the gate of the matrix, and a seed from which the operator draws that of the entries' gates.

        Where there are no numbers to draw, in a compiled graph and with fake tensors, their noise is a tensor, too.
        """
        alpha = parameters["diff_log_alpha"]
        fake = captured() or type(alpha).__torch_dispatch__ is not Tensor.__torch_dispatch__
        seeded = not fake and alpha.device.type in ("cpu", "cuda")
        drawn: dict[str, Tensor] = {SEED: torch.randint(2**63 - 1, (), device="cpu")} if seeded else {}
        noisy = {
            suffix: value + logistic_noise(value)
            for suffix, value in parameters.items()
            if suffix.endswith("log_alpha") and not (seeded and value is alpha)
        }
        return {**parameters, **noisy, **drawn}

    def penalty(self, config: DiffPruningConfig, layers: Sequence[Values]) -> Tensor | None:
        total: Tensor | None = None
        for values in layers:
            alpha = values["diff_log_alpha"]
            expected = torch.sigmoid(alpha).sum() if transformed() else applied(_Open, alpha)
            if config.structured:
                expected = expected * torch.sigmoid(values["diff_group_log_alpha"]).sum()
            total = expected if total is None else total + expected.to(total.device)
        return None if total is None else config.l0_weight * total


def logistic_noise(like: Tensor) -> Tensor:
    """log u − log(1 − u) for u uniform in (0, 1), finite."""
    return torch.logit(torch.rand_like(like), eps=torch.finfo(like.dtype).eps)


class _Open(torch.autograd.Function):
    """Σ σ(α), the expected number of open gates; keeps α alone, where autograd would keep σ(α) beside it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return torch.sigmoid(logits).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        share = torch.sigmoid(logits)
        return grad * share * (1 - share)
