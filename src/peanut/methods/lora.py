"""LoRA: the update is a trained low-rank product (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import PeanutError, PeftWarning, warn
from ..operators import LowRank
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.patterns import OUT_PROJECTION
from ..protocols.values import Bound, Count, Scale
from ..weights import FrozenLayer
from .dora import decomposed, norms_with
from .lora_fields import LoraFields
from .olora import orthonormal_factors
from .pissa import minor_triplets, principal_triplets

__all__ = ["Lora", "LoraConfig", "suffixes"]


_STARTS = "True, False, 'gaussian', 'pissa', 'pissa_niter_[number]', 'milora' or 'olora'"
_IN_WEIGHT = r"pissa|pissa_niter_\d{1,4}|milora|olora"
_READ_ONLY = "eva", "orthogonal"
"""Starts of Hugging Face PEFT's that are read only: once trained they are plain LoRAs."""


def _is_start(value: bool | str) -> bool:
    return isinstance(value, bool) or value in ("gaussian", *_READ_ONLY) or re.fullmatch(_IN_WEIGHT, value) is not None


@dataclass(kw_only=True)
class LoraConfig(LoraFields):
    """Config of LoRA.

    Args:
        r: rank.
        lora_alpha: α; the update is scaled by α/r.
        use_rslora: scale by α/√r instead (Kalajdzievski 2023, arXiv 2312.03732).
        init_lora_weights: ``True``: A Kaiming-uniform, B = 0; ``"gaussian"``: A normal with σ = 1/r, B = 0; ``False``:
            both random; ``"pissa"``, ``"pissa_niter_16"`` (by 16 subspace iterations), ``"milora"``, ``"olora"``: both
            a part of the weight, which the change is less by (see ``methods/pissa.py`` and ``methods/olora.py``).
        use_dora: train the rows' lengths apart from their directions (see ``methods/dora.py``).
        lora_bias: B has a bias of its own.
        rank_pattern, alpha_pattern: r and α for particular layers, by name or regular expression.
    """

    method = "LORA"
    by_layer = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))

    r: Count = 8
    use_rslora: bool = False
    init_lora_weights: Annotated[bool | str, Bound(_STARTS, _is_start)] = True
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Scale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        init = self.init_lora_weights
        if init in _READ_ONLY and not self.inference_mode:
            raise PeanutError(f"init_lora_weights={init!r}", _STARTS, "change it")
        if self.lora_bias and (self.use_dora or isinstance(init, str)):
            other = "use_dora=True" if self.use_dora else f"init_lora_weights={init!r}"
            raise PeanutError(f"lora_bias=True with {other}", "one of the two", "set lora_bias=False")
        if self.starts_in_weight:
            self.doubled()  # what files hold: it has to be a config too

    def for_layer(self, path: str) -> LoraConfig:
        """What the patterns say of a layer; α of an attention's output projection is twice as large.

        Hugging Face PEFT adds that projection's change to its weight twice, and its files were trained so.
        """
        own = super().for_layer(path)
        return replace(own, lora_alpha=2 * own.lora_alpha) if path.endswith(OUT_PROJECTION) else own

    @property
    def scaling(self) -> float:
        """s = α/r, or α/√r."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def starts_in_weight(self) -> bool:
        """Whether A and B start as a part of the weight, which the change is then less by."""
        return re.fullmatch(_IN_WEIGHT, str(self.init_lora_weights)) is not None

    def doubled(self) -> LoraConfig:
        """A plain LoRA of twice the rank and the same scaling."""
        more = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            r=2 * self.r,
            lora_alpha=self.lora_alpha * more,
            rank_pattern={name: 2 * r for name, r in self.rank_pattern.items()},
            alpha_pattern={name: alpha * more for name, alpha in self.alpha_pattern.items()},
            init_lora_weights=True,
        )


@register
class Lora(WeightMethod[LoraConfig]):
    """ΔW = s · B · A with A (r, in), B (out, r), s = α/r or α/√r.

    Where A and B start as a part A₀, B₀ of the weight, ΔW = s(BA − B₀A₀) = s[B − B₀, B₀][A; A − A₀], of rank 2r. In
    that form it is exactly zero at the start, and nowhere a small difference of two large products. Files hold its
    factors, a plain LoRA of rank 2r for the untouched base.
    """

    config_class = LoraConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "r * (d_in + d_out)"
    styles = (("DORA", "use_dora", True),)
    mirrored: ClassVar[dict[str, str]] = {
        "lora_A.weight": "lora_embedding_B",
        "lora_B.weight": "lora_embedding_A",
        "start_A": "start_B",
        "start_B": "start_A",
    }

    def start(self, config: LoraConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        a, b = suffixes(layer)
        A, B = torch.empty(layer.down_shape(config.r)), torch.zeros(layer.up_shape(config.r))
        values = {a: A, b: B}
        if config.starts_in_weight:
            factors = part_of_weight(config, layer)
            values = {a: factors[0].reshape(A.shape), b: factors[1].reshape(B.shape)}
            values |= {"start_A": values[a].clone(), "start_B": values[b].clone()}
        elif layer.kind.name == "embedding":
            # An embedding reads one column of A a token, so A is the factor that starts at zero.
            A.zero_()
            nn.init.normal_(B, generator=generator)
        elif config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / config.r, generator=generator)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        if config.init_lora_weights is False:
            if layer.kind.name == "embedding":
                nn.init.normal_(A, generator=generator)
            else:
                nn.init.kaiming_uniform_(B, a=math.sqrt(5), generator=generator)
        if config.lora_bias:
            values["lora_B.bias"] = torch.zeros(layer.out_features)
        if config.use_dora:
            W = layer.matrix().to("meta") if A.is_meta else layer.matrix()
            wide = torch.promote_types(W.dtype, torch.float32)
            low = low_rank(config, {suffix: value.to(W.device, wide) for suffix, value in values.items()})
            shape = (1, -1, *(1 for _ in layer.module.kernel_size)) if layer.kind.name == "conv" else (-1,)
            values["lora_magnitude_vector"] = norms_with(W, low).reshape(shape)
        return values

    def change(self, config: LoraConfig, parameters: Values, layer: FrozenLayer) -> Change:
        low = low_rank(config, parameters)
        shift = config.scaling * parameters["lora_B.bias"] if config.lora_bias else None
        if not config.use_dora:
            return Change(delta=low, shift=shift, dropout=config.lora_dropout)
        magnitude = parameters["lora_magnitude_vector"].flatten()
        return Change(delta=decomposed(magnitude, low, layer), dropout=config.lora_dropout)

    def companions(self, config: LoraConfig) -> list[tuple[WeightMethod[Any], PeftConfig]]:
        return config.token_adapters()

    def rebuilt(self, config: LoraConfig) -> frozenset[str]:
        return frozenset({"start_A", "start_B"} if config.starts_in_weight else ())

    def stored(
        self, config: LoraConfig, layers: Mapping[str, Values]
    ) -> tuple[LoraConfig, dict[str, dict[str, Tensor]]]:
        config, tensors = super().stored(config, layers)
        if not config.starts_in_weight:
            return config, tensors
        for path, values in layers.items():
            if "start_A" in values:
                a, b = names_in(values)
                A0, B0 = values["start_A"], values["start_B"]
                tensors[path][a] = torch.cat([values[a], values[a] - A0])
                tensors[path][b] = torch.cat([values[b] - B0, B0], dim=1)
        return config.doubled(), tensors

    def restored(self, config: LoraConfig, layers: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
        """From a file of rank 2r as ``stored`` gives it, or of rank r: PEFT's own A and B over a reduced base."""
        tensors = super().restored(config, layers)
        for path, values in tensors.items() if config.starts_in_weight else ():
            a, b = names_in(values)
            if a in values and b in values and len(values[a]) == 2 * config.for_layer(path).r:
                values[a] = values[a].chunk(2)[0]
                values[b] = torch.add(*values[b].chunk(2, dim=1))
        return tensors

    def check(self, config: LoraConfig, layer: FrozenLayer, path: str) -> None:
        if config.lora_bias and layer.bias() is None:  # the same words for all layers, so that it is told once
            kind = type(layer.module).__name__
            warn(f"lora_bias=True for {kind} layers without a bias: the adapter cannot be merged there", PeftWarning)
        least = min(layer.out_features, layer.in_features)
        if config.starts_in_weight and config.r > least:
            raise PeanutError(
                f"r={config.r} with init_lora_weights={config.init_lora_weights!r} for '{path}', whose weight is "
                f"{layer.out_features} × {layer.in_features}",
                f"at most {least}",
                "lower r, or set it for that layer in rank_pattern",
            )
        if config.starts_in_weight and config.scaling <= 0:
            raise PeanutError(
                f"lora_alpha={config.lora_alpha} with init_lora_weights={config.init_lora_weights!r} for '{path}'",
                "a positive number",
                "change lora_alpha",
            )


def low_rank(config: LoraConfig, parameters: Values) -> LowRank:
    """ΔW before any DoRA."""
    # A convolution's factors are stored as kernels; flattened they are the matrices.
    A, B = (parameters[name].flatten(1) for name in names_in(parameters))
    if config.starts_in_weight:
        A0, B0 = parameters["start_A"].flatten(1), parameters["start_B"].flatten(1)
        A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
    return LowRank(B, A, config.scaling)


def part_of_weight(config: LoraConfig, layer: FrozenLayer) -> tuple[Tensor, Tensor]:
    """A₀ (r, in) and B₀ (out, r)."""
    W, init = layer.matrix(), str(config.init_lora_weights)
    if init == "olora":
        return orthonormal_factors(W, config.r)
    if init == "milora":
        return minor_triplets(W, config.r, config.scaling)
    iterations = int(init.removeprefix("pissa_niter_")) if init != "pissa" else None
    return principal_triplets(W, config.r, config.scaling, iterations)


def suffixes(layer: FrozenLayer) -> tuple[str, str]:
    """The names under which files keep A and B."""
    return _OF_EMBEDDING if layer.kind.name == "embedding" else _OF_OTHERS


def names_in(values: Values) -> tuple[str, str]:
    """The names of A and B among a layer's tensors."""
    return _OF_EMBEDDING if _OF_EMBEDDING[0] in values else _OF_OTHERS


_OF_EMBEDDING = "lora_embedding_A", "lora_embedding_B"
_OF_OTHERS = "lora_A.weight", "lora_B.weight"
