"""SHiRA: a few entries of the weight itself are trained (Bhardwaj et al. 2024, arXiv 2406.13175)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators.sparse import Sparse
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Count, Whole
from ..weights import FrozenLayer

__all__ = ["Shira", "ShiraConfig"]


@dataclass(kw_only=True)
class ShiraConfig(PeftConfig):
    """Config of SHiRA.

    Args:
        r: r·(out + in) entries of a layer are trained, as many as LoRA of rank r trains; the rank is not limited.
        mask_type: ``"random"``, or a name for the places that ``mask_fn`` chooses.
        random_seed: seed of random places, the same in layers of one size; ``None``: each layer has its own.
        mask_fn: for any other mask_type: takes the layer's module and r, returns a tensor of the shape of the module's
            weight, one at the places to train and zero elsewhere. Not saved: files hold the places.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        init_weights: start with zeros, so that nothing changes at first; else standard normal.
    """

    method = "SHIRA"
    only_here = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    r: Count = 32
    mask_type: str = "random"
    random_seed: Whole | None = None
    mask_fn: Callable[[nn.Module, int], Tensor] | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "mask_fn"}


@register
class Shira(WeightMethod[ShiraConfig]):
    """ΔW[places] = w: r·(out + in) trained numbers at fixed places, zero elsewhere."""

    config_class = ShiraConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "r * (d_in + d_out)"

    def start(self, config: ShiraConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        n = count(config, layer)
        if config.mask_type != "random" and config.mask_fn is not None:
            places = torch.nonzero(layer.kind.matrix(layer.module, config.mask_fn(layer.module, config.r)) == 1).T
        else:
            if config.random_seed is not None:
                generator = torch.Generator().manual_seed(config.random_seed)
            entries = torch.randperm(layer.out_features * layer.in_features, generator=generator, device="cpu")
            flat = entries[:n].sort().values
            places = torch.stack([flat // layer.in_features, flat % layer.in_features])
        weight = torch.zeros(n) if config.init_weights else torch.randn(n, generator=generator)
        return {"shira_weight": weight, "shira_indices": places.to(torch.int32)}

    def fixed(self, config: ShiraConfig) -> frozenset[str]:
        return frozenset({"shira_indices"})

    def change(self, config: ShiraConfig, parameters: Values, layer: FrozenLayer) -> Change:
        size = (layer.out_features, layer.in_features)
        return Change(delta=Sparse(parameters["shira_weight"], parameters["shira_indices"], size))

    def restored(self, config: ShiraConfig, layers: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
        # Files written on Windows keep the places as floating-point numbers.
        return {
            path: {
                suffix: value.long() if suffix == "shira_indices" and value.is_floating_point() else value
                for suffix, value in values.items()
            }
            for path, values in layers.items()
        }

    def check_read(self, config: ShiraConfig, layer: FrozenLayer, values: Values, path: str) -> None:
        places, size = values["shira_indices"], torch.tensor([[layer.out_features], [layer.in_features]])
        if bool((places < 0).any()) or bool((places >= size.to(places.device)).any()):
            raise PeanutError(
                f"the file's places for '{path}' lie outside of its weight, {layer.out_features}×{layer.in_features}",
                "rows and columns of it",
                "save the adapter again",
            )

    def check(self, config: ShiraConfig, layer: FrozenLayer, path: str) -> None:
        out, inputs = layer.out_features, layer.in_features
        if count(config, layer) > out * inputs:
            raise PeanutError(
                f"r={config.r} trains {count(config, layer)} entries of '{path}', which has {out}×{inputs}",
                f"r of at most {out * inputs // (out + inputs)}",
                "lower r",
            )
        if config.mask_type == "random":
            return
        if config.mask_fn is None:
            if not config.inference_mode:
                raise PeanutError(
                    f"mask_type={config.mask_type!r} without a mask_fn", "a function (module, r) → mask", "give mask_fn"
                )
            return
        mask = config.mask_fn(layer.module, config.r)
        if mask.shape != layer.weight.shape or int((mask == 1).sum()) != count(config, layer):
            raise PeanutError(
                f"mask_fn chose {int((mask == 1).sum())} places of {tuple(mask.shape)} for '{path}'",
                f"{count(config, layer)} of {tuple(layer.weight.shape)}",
                "change mask_fn",
            )


def count(config: ShiraConfig, layer: FrozenLayer) -> int:
    """Number of trained entries of a layer."""
    return config.r * (layer.out_features + layer.in_features)
