"""Bottleneck adapters: small networks inserted into the blocks (Houlsby et al. 2019, arXiv 1902.00751)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PeanutError
from ..protocols import Call, OutputMethod, PeftConfig, PlaceName, Site, Values, register
from ..protocols.values import Count, Positive, Probability, Scale
from .peanut import activation, check_activation

__all__ = ["Bottleneck", "BottleneckConfig"]

Style = Literal["houlsby", "pfeiffer", "parallel"]
Start = Literal["near_identity", "bert", "mam"]


@dataclass(frozen=True)
class _Defaults:
    """What a style has where the config leaves it open: the values of the package ``adapters``, but for the start."""

    act_fn: str
    reduction_factor: float
    scaling: float
    init_weights: Start


_STYLES: dict[str, _Defaults] = {
    "houlsby": _Defaults("swish", 16, 1.0, "near_identity"),
    "pfeiffer": _Defaults("relu", 16, 1.0, "near_identity"),
    "parallel": _Defaults("relu", 2, 4.0, "mam"),
}
_DEVIATIONS = {"near_identity": 1e-3, "bert": 0.02}


@dataclass(kw_only=True)
class BottleneckConfig(PeftConfig):
    """Config of bottleneck adapters; what is ``None`` is the style's: see ``Bottleneck``.

    Args:
        style: where adapters sit: ``"houlsby"``, ``"pfeiffer"`` or ``"parallel"``.
        bottleneck_size: r, the width in the middle.
        reduction_factor: r is the width of the output divided by this, if no ``bottleneck_size`` is given.
        act_fn: f, a key of transformers' ACT2FN, or ``"sine"``.
        scaling: s.
        dropout: probability with which, in training, an entry of what is added is zeroed.
        init_weights: how D and U start: ``"near_identity"``: normal with σ = 0.001; ``"bert"``: normal with σ = 0.02;
            ``"mam"``: D Kaiming-uniform, U = 0, so that a new adapter changes nothing. Biases start at 0.
        target_modules: the modules whose output is changed, if not those of the style.

    Raises:
        PeanutError: a value is out of range, or both sizes are given.
    """

    method = "BOTTLENECK"

    style: Style = "houlsby"
    bottleneck_size: Count | None = None
    reduction_factor: Positive | None = None
    act_fn: str | None = None
    scaling: Scale | None = None
    dropout: Probability = 0.0
    init_weights: Start | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = _STYLES[self.style]
        if self.bottleneck_size is not None:
            if self.reduction_factor is not None:
                raise PeanutError(
                    f"bottleneck_size={self.bottleneck_size} and reduction_factor={self.reduction_factor}",
                    "one of the two",
                    "leave one out",
                )
        elif self.reduction_factor is None:
            self.reduction_factor = defaults.reduction_factor
        self.act_fn = defaults.act_fn if self.act_fn is None else self.act_fn
        self.scaling = defaults.scaling if self.scaling is None else self.scaling
        self.init_weights = self.init_weights or defaults.init_weights
        check_activation(self.act_fn)

    def size_for(self, width: int) -> int:
        """r where the output has this width."""
        return self.bottleneck_size or max(1, int(min(width / (self.reduction_factor or 1), 2**62)))


@register
class Bottleneck(OutputMethod[BottleneckConfig]):
    """A(x) = s · (U f(D x + b_d) + b_u) with D (r, in), b_d (r), U (out, r), b_u (out).

    - houlsby: y' = y + A(y) for the outputs y of attention and of the feed-forward part, before they are added to the
      stream (Houlsby et al. 2019, arXiv 1902.00751).
    - pfeiffer, also called AdapterFFN: y' = y + A(y) at the end of each block; where a block ends with a norm,
      y = LN(x), it is y' = LN(x + A(y)), the norm twice (Pfeiffer et al. 2021, arXiv 2005.00247).
    - parallel: y' = y + A(x) for the output y of the feed-forward part, x the stream that it begins with (He et al.
      2022, arXiv 2110.04366). At a module that ``target_modules`` names, x is what that module is given.
    """

    config_class = BottleneckConfig
    size = "r * (d_in + d_out + 1) + d_out"
    styles = (("BOTTLENECK_PFEIFFER", "style", "pfeiffer"), ("BOTTLENECK_PARALLEL", "style", "parallel"))

    def places(self, config: BottleneckConfig) -> tuple[PlaceName, ...]:
        if config.style == "houlsby":
            return "attention_output", "feed_forward_output"
        return ("block_end",) if config.style == "pfeiffer" else ("feed_forward_output",)

    def source(self, config: BottleneckConfig) -> Literal["feed_forward_input"] | None:
        return "feed_forward_input" if config.style == "parallel" else None

    def changes_input(self, config: BottleneckConfig, kind: str | None) -> bool:
        return config.style == "pfeiffer" and kind == "norm"

    def start(self, config: BottleneckConfig, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        activation(str(config.act_fn), torch.device("cpu"))  # made now, as torch.compile cannot make one
        r, inputs = config.size_for(site.width), site.reads if config.style == "parallel" else site.width
        D, U = torch.empty(r, inputs), torch.zeros(site.width, r)
        if config.init_weights == "mam":
            nn.init.kaiming_uniform_(D, a=math.sqrt(5), generator=generator)
        else:
            for weight in (D, U):
                nn.init.normal_(weight, std=_DEVIATIONS[str(config.init_weights)], generator=generator)
        return {DOWN: D, DOWN_BIAS: torch.zeros(r), UP: U, UP_BIAS: torch.zeros(site.width)}

    def adapt(self, config: BottleneckConfig, parameters: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if self.changes_input(config, call.kind):
            return x + answer(config, parameters, y, call.training)
        return y + answer(config, parameters, x if config.style == "parallel" else y, call.training)


def answer(config: BottleneckConfig, parameters: Values, x: Tensor, training: bool) -> Tensor:
    """A(x), (…, in) → (…, out)."""
    D, b_d, U, b_u = (parameters[suffix].to(x.dtype) for suffix in (DOWN, DOWN_BIAS, UP, UP_BIAS))
    f = activation(str(config.act_fn), x.device)
    scaling = config.scaling if config.scaling is not None else 1.0
    return F.dropout(scaling * F.linear(f(F.linear(x, D, b_d)), U, b_u), config.dropout, training)


DOWN, DOWN_BIAS = "bottleneck_down.weight", "bottleneck_down.bias"
UP, UP_BIAS = "bottleneck_up.weight", "bottleneck_up.bias"
