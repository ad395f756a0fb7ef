"""AdaLoRA: LoRA whose rank budget is distributed by importance (Zhang et al. 2023, arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError, shown, warn
from ..operators import LowRank
from ..protocols import Architecture, Change, PeftConfig, Trial, Values, WeightMethod, register
from ..protocols.values import Bound, Count, NonNegative, Scale, Whole
from ..weights import FrozenLayer
from .lora_fields import LoraFields

__all__ = ["AdaLora", "AdaLoraConfig", "budget"]


_Decay = Annotated[float, Bound("a number between 0 and 1", lambda value: 0 < value < 1)]


@dataclass(kw_only=True)
class AdaLoraConfig(LoraFields):
    """Config of AdaLoRA.

    The ranks are learnt in three phases: ``tinit`` steps with all triplets; then, until ``tfinal`` steps before the
    end, a budget that falls with the cube of the time left; then the triplets that are left, fine-tuned.

    Args:
        target_r: the average rank at the end.
        init_r: the rank of every layer at the start.
        lora_alpha: α; the update is scaled by α/init_r, or by 1 where α is not positive.
        tinit, tfinal: steps of the first and of the last phase.
        deltaT: steps from one sharing out of the budget to the next.
        beta1, beta2: the share of the past in the averages of sensitivity and of its uncertainty.
        orth_reg_weight: weight of the penalty that keeps the singular vectors orthonormal.
        total_step: steps of the whole training; needed to train.
        rank_pattern: for each layer (its path with ``.lora_E`` behind it), which of its init_r triplets its tensors
            hold; Hugging Face PEFT writes it after training.
        init_lora_weights: ``True``: E = 0, A and B normal with σ = 0.02; ``False``: all three standard normal.
        r: accepted and ignored; in the config of one layer, the number of its triplets.
    """

    method = "ADALORA"

    target_r: Count = 8
    init_r: Count = 12
    tinit: Whole = 0
    tfinal: Whole = 0
    deltaT: Count = 1  # noqa: N815 - Hugging Face PEFT's name
    beta1: _Decay = 0.85
    beta2: _Decay = 0.85
    orth_reg_weight: NonNegative = 0.5
    total_step: Count | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    init_lora_weights: bool = True
    r: Whole = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    alpha_pattern: dict[str, Scale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_r > self.init_r:
            raise PeanutError(
                f"target_r={self.target_r} above init_r={self.init_r}", "a rank that falls", "raise init_r"
            )
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise PeanutError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of total_step={self.total_step} to share "
                "out the budget in",
                "tinit + tfinal below total_step",
                "lower tinit or tfinal",
            )
        for name in ("use_rslora", "use_dora", "lora_bias", "alpha_pattern"):
            if getattr(self, name):
                raise PeanutError(
                    f"{name}={shown(getattr(self, name))}", "that it is not set", f"remove {name}: AdaLoRA has none"
                )

    def for_layer(self, path: str) -> AdaLoraConfig:
        kept = (self.rank_pattern or {}).get(f"{path}.lora_E")
        return replace(self, r=self.init_r if kept is None else sum(kept))

    @property
    def scaling(self) -> float:
        """s = α/init_r, whatever of init_r is left; the small number is PEFT's and part of what was trained."""
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + 1e-5)


@register
class AdaLora(WeightMethod[AdaLoraConfig]):
    """ΔW = s · B · diag(E) · A with A (r, in), E (r, 1), B (out, r): r triplets, each a direction in, out and a value.

    Training keeps beside each of them the averages of its sensitivity ``ipt`` and of that one's uncertainty ``unc``,
    which triplets are left (``kept``), and the number of steps done (``steps``).
    """

    config_class = AdaLoraConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "init_r * (d_in + d_out + 1)"

    def tried(self, on: Trial) -> dict[str, Any]:
        return {"total_step": 10_000}  # Hugging Face PEFT makes no AdaLoRA without

    def completed(self, config: AdaLoraConfig, architecture: Architecture) -> AdaLoraConfig:
        if config.r != AdaLoraConfig.r:
            warn(f"r={config.r} is not used by AdaLoRA: init_r={config.init_r} and target_r={config.target_r} are")
        return config

    def start(self, config: AdaLoraConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        r = config.r
        shapes = {"lora_A": (r, layer.in_features), "lora_B": (layer.out_features, r), "lora_E": (r, 1)}
        std = 0.02 if config.init_lora_weights else 1.0
        values = {name: nn.init.normal_(torch.empty(shape), 0.0, std, generator) for name, shape in shapes.items()}
        if config.init_lora_weights:
            values["lora_E"].zero_()
        state = {f"{kind}_{name[-1]}": torch.zeros(shape) for name, shape in shapes.items() for kind in ("ipt", "unc")}
        return values | state | {"kept": torch.ones(r, 1), "steps": torch.zeros(1)}

    def change(self, config: AdaLoraConfig, parameters: Values, layer: FrozenLayer) -> Change:
        A, B, E = (parameters[f"lora_{letter}"] for letter in "ABE")
        return Change(delta=LowRank(B * E.T, A, config.scaling), dropout=config.lora_dropout)

    def companions(self, config: AdaLoraConfig) -> list[tuple[WeightMethod[Any], PeftConfig]]:
        return config.token_adapters()

    def passing(self, config: AdaLoraConfig) -> frozenset[str]:
        return frozenset({"ipt_A", "ipt_B", "ipt_E", "unc_A", "unc_B", "unc_E", "kept", "steps"})

    def planned(self, config: AdaLoraConfig, steps: int, rows: int) -> AdaLoraConfig:
        return replace(config, total_step=steps) if config.total_step is None else config

    def penalty(self, config: AdaLoraConfig, layers: Sequence[Values]) -> Tensor | None:
        """The weight times the mean of ‖AAᵀ − I‖ and ‖BᵀB − I‖ (Frobenius) over the layers."""
        if config.orth_reg_weight == 0:
            return None
        squares = [P @ P.T for values in layers for P in (values["lora_A"], values["lora_B"].T)]
        lengths = [torch.linalg.matrix_norm(square - torch.eye(len(square)).to(square)) for square in squares]
        return config.orth_reg_weight * torch.stack([length.to(lengths[0]) for length in lengths]).mean()

    @torch.no_grad()
    def after_step(self, config: AdaLoraConfig, layers: Sequence[Values]) -> None:
        if config.total_step is None:
            raise PeanutError("AdaLoRA in training without total_step", "the number of steps", "set total_step")
        step, last = int(layers[0]["steps"].item()) + 1, config.total_step - config.tfinal
        for values in layers:
            values["steps"].fill_(step)
            if step < last:
                observe(config, values)
        budget_now = budget(config, step, total=sum(len(values["lora_E"]) for values in layers), count=len(layers))
        if budget_now is not None:
            share_out(layers, budget_now)
        if budget_now is not None or step > last:
            for values in layers:
                values["lora_E"].mul_(values["kept"])


def budget(config: AdaLoraConfig, step: int, total: int, count: int) -> int | None:
    """How many triplets are left after ``step`` (the first is 1), or ``None`` where they are not allocated again.

    Args:
        config: the schedule.
        step: steps done.
        total: triplets at the start.
        count: layers.
    """
    assert config.total_step is not None  # after_step has checked it
    last, target = config.total_step - config.tfinal, config.target_r * count
    if step <= config.tinit or step > last or (step < last and step % config.deltaT):
        return None
    left = 1 - (step - config.tinit) / (last - config.tinit)
    return int((total - target) * left**3 + target)


def observe(config: AdaLoraConfig, values: Values) -> None:
    """Averages how much the loss depends on each entry, |w · ∂L/∂w|, and how much that varies (equations 9 to 11)."""
    for letter in "ABE":
        value, ipt, unc = (values[f"{kind}_{letter}"] for kind in ("lora", "ipt", "unc"))
        now = torch.zeros_like(ipt) if value.grad is None else (value * value.grad).abs()
        ipt.copy_(config.beta1 * ipt + (1 - config.beta1) * now)
        unc.copy_(config.beta2 * unc + (1 - config.beta2) * (now - ipt).abs())


def share_out(layers: Sequence[Values], keep: int) -> None:
    """Marks as left the ``keep`` most important triplets of all layers, of equal ones the first."""
    scores = []
    for values in layers:
        A, B, E = (values[f"ipt_{letter}"] * values[f"unc_{letter}"] for letter in "ABE")
        scores.append(E.flatten() + torch.stack([A.mean(1), B.mean(0)], dim=1).sum(1))
    every = torch.cat([score.cpu() for score in scores])
    left = torch.zeros_like(every)
    left[every.argsort(descending=True, stable=True)[:keep]] = 1
    for values, own in zip(layers, left.split([len(score) for score in scores]), strict=True):
        values["kept"].copy_(own.unsqueeze(1))
