"""FourierFT: the update is the inverse Fourier transform of few trained entries (Gao et al. 2024, arXiv 2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import PeanutError
from ..operators.fourier import Fourier
from ..protocols import Change, PeftConfig, Trial, Values, WeightMethod, register
from ..protocols.values import Count, Scale, Whole
from ..weights import FrozenLayer

__all__ = ["FourierFT", "FourierFTConfig"]


@dataclass(kw_only=True)
class FourierFTConfig(PeftConfig):
    """Config of FourierFT.

    Args:
        n_frequency: number of trained entries of a layer's spectrum.
        scaling: α. The paper: 100 to 150 for RoBERTa, 300 for LLaMA and ViT.
        random_loc_seed: seed of the entries' places, the same in layers of one size.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        bias: ``"none"``, ``"all"`` or ``"fourier_only"``: which biases are trained too.
        n_frequency_pattern: n_frequency for particular layers, by name or regular expression.
        init_weights: start with a spectrum of zeros, so that nothing changes at first; else it is standard normal.
    """

    method = "FOURIERFT"
    by_layer = (("n_frequency", "n_frequency_pattern"),)

    n_frequency: Count = 1000
    scaling: Scale = 300.0
    random_loc_seed: Whole = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "fourier_only"] = "none"
    n_frequency_pattern: dict[str, Count] = field(default_factory=dict)
    init_weights: bool = False


@register
class FourierFT(WeightMethod[FourierFTConfig]):
    """ΔW = α · Re F⁻¹(S) with S (out, in) zero but for n trained numbers at places drawn from a seed.

    ΔW[j, k] = α/(out·in) · Σ_l c_l cos 2π(row_l·j/out + column_l·k/in).
    """

    config_class = FourierFTConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "n_frequency"

    def tried(self, on: Trial) -> dict[str, Any]:
        return {"n_frequency": min([1000, *(out * inputs for out, inputs in on.shapes)])}

    def start(self, config: FourierFTConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        n, size = config.n_frequency, layer.out_features * layer.in_features
        spectrum = torch.zeros(n) if config.init_weights else torch.randn(n, generator=generator)
        seeded = torch.Generator().manual_seed(config.random_loc_seed)
        flat = torch.randperm(size, generator=seeded, device="cpu")[:n]
        places = torch.stack([flat // layer.in_features, flat % layer.in_features])
        return {"fourierft_spectrum": spectrum, "fourierft_places": places}

    def rebuilt(self, config: FourierFTConfig) -> frozenset[str]:
        return frozenset({"fourierft_places"})

    def change(self, config: FourierFTConfig, parameters: Values, layer: FrozenLayer) -> Change:
        size = (layer.out_features, layer.in_features)
        places = parameters["fourierft_places"]
        return Change(delta=Fourier(parameters["fourierft_spectrum"], places, size, config.scaling))

    def check(self, config: FourierFTConfig, layer: FrozenLayer, path: str) -> None:
        out, inputs = layer.out_features, layer.in_features
        if config.n_frequency > out * inputs:
            raise PeanutError(
                f"n_frequency={config.n_frequency} for '{path}' of {out}×{inputs}",
                f"at most {out * inputs}, one for each entry of its weight",
                "lower n_frequency, or set it for this layer in n_frequency_pattern",
            )
