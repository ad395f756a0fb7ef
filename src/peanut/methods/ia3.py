"""(IA)³: trained scales of a layer's output, or of a feed-forward layer's input (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError, nearest, shown
from ..operators import Diagonal
from ..protocols import Architecture, Change, PeftConfig, Trial, Values, WeightMethod, register
from ..protocols.patterns import check_pattern, ends, fullmatch
from ..weights import FrozenLayer

__all__ = ["IA3", "IA3Config"]


@dataclass(kw_only=True)
class IA3Config(PeftConfig):
    """Config of (IA)³.

    Args:
        feedforward_modules: those of the targets whose input is scaled rather than the output: names of target_modules
            (or narrower ones: ``mlp.c_proj`` of ``c_proj``), or one regular expression for whole paths; ``None`` for
            the architecture's (none if it is unknown), as for target_modules.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        init_ia3_weights: start with gains of one; else with random ones.
    """

    method = "IA3"
    only_here = frozenset({"layers_to_transform", "layers_pattern"})

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.feedforward_modules
        targets = self.target_modules
        if given is None:
            return
        if isinstance(given, str):
            check_pattern("feedforward_modules", given)
            return
        if not all(given):
            raise PeanutError(f"feedforward_modules={shown(given)}", "a list of names", "remove what is not a name")
        self.feedforward_modules = sorted(set(given))
        if isinstance(targets, list):
            known = frozenset(targets)
            for name in self.feedforward_modules:
                if known.isdisjoint(ends(name)):
                    raise PeanutError(
                        f"feedforward_modules names {name!r}",
                        "names that are among target_modules",
                        f"add it there, or take it out (nearest: {nearest(name, targets)})",
                    )

    @property
    def scales_input(self) -> bool:
        """Of a config that ``for_layer`` returned: whether the layer's input is scaled."""
        return bool(self.feedforward_modules)

    def patterns(self) -> Mapping[str, Collection[str]]:
        names = self.feedforward_modules or []
        return {"feedforward_modules": [names] if isinstance(names, str) else names}

    def for_layer(self, path: str) -> IA3Config:
        names = self.feedforward_modules or []
        if isinstance(names, str):
            found = fullmatch(names, path) is not None
        else:
            found = not frozenset(names).isdisjoint(ends(path))
        return replace(self, feedforward_modules=".*" if found else [])


@register
class IA3(WeightMethod[IA3Config]):
    """W' = diag(l) W, b' = l ⊙ b with l (out); on feed-forward layers W' = W diag(l) with l (in), b' = b.

    ``ia3_l`` holds l: (out, 1) or (1, in); of a convolution (1, channels, 1, …), one gain for each channel.
    """

    config_class = IA3Config
    kinds = ("linear", "conv1d", "conv")
    size = "d_out"

    def tried(self, on: Trial) -> dict[str, Any]:
        return {"feedforward_modules": list(on.feed_forward)}

    def completed(self, config: IA3Config, architecture: Architecture) -> IA3Config:
        outputs, inputs = architecture.scaled_outputs, list(architecture.scaled_inputs)
        targets: Any = config.target_modules
        if targets is None and outputs:
            targets = [*outputs, *inputs]
        names: Any = config.feedforward_modules
        if names is None and isinstance(targets, list):
            narrower = {name for name in inputs if not set(targets).isdisjoint(ends(name))}
            names = narrower | {target for target in targets if not set(inputs).isdisjoint(ends(target))}
        return replace(config, target_modules=targets, feedforward_modules=inputs if names is None else names)

    def check(self, config: IA3Config, layer: FrozenLayer, path: str) -> None:
        if config.scales_input and layer.kind.name == "conv" and layer.module.groups > 1:
            raise PeanutError(
                f"'{path}', a convolution in {layer.module.groups} groups, among feedforward_modules",
                "one group there: each group would scale the columns of the kernel in its own way",
                "take it out of feedforward_modules, so that its output is scaled",
            )

    def start(self, config: IA3Config, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        if layer.kind.name == "conv":
            module = layer.module
            channels = module.in_channels if config.scales_input else module.out_channels
            gains = torch.ones(1, channels, *(1 for _ in module.kernel_size))
        else:
            gains = torch.ones((1, layer.in_features) if config.scales_input else (layer.out_features, 1))
        return {"ia3_l": gains if config.init_ia3_weights else nn.init.normal_(gains, generator=generator)}

    def change(self, config: IA3Config, parameters: Values, layer: FrozenLayer) -> Change:
        gains = parameters["ia3_l"].flatten()
        if not config.scales_input:
            return Change(left=Diagonal(gains))
        # The columns of a kernel's matrix are channel by channel, a patch of each.
        return Change(in_scale=Diagonal(gains.repeat_interleave(layer.in_features // gains.numel())))
