"""``add_weighted_adapter``: several adapters, of any methods, combined into a new one of LoRA type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PeanutError, nearest
from ...methods.ia3 import IA3Config
from ...methods.lora import LoraConfig, suffixes
from ...operators import LowRank
from ...operators.combining import Majority, clamped, combined, slerp_weights
from ...protocols import METHODS, PeftConfig
from ...protocols.patterns import outer
from ..layers.layer import AdaptedLayer
from .adapter_set import AdapterSet

__all__ = ["Combination", "add_weighted"]

_OF_FACTORS = "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"
_SUMS = "cat", "task_arithmetic", "slerp"
_OF_CHANGES = "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"


@dataclass(frozen=True)
class Combination:
    """How adapters are combined; see ``AdaptedModel.add_weighted_adapter``.

    Raises:
        PeanutError: a value is none that there is.
    """

    kind: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority: Majority = "total"

    def __post_init__(self) -> None:
        kinds = (*_OF_FACTORS, *_SUMS, *_OF_CHANGES)
        if self.kind not in kinds:
            near = nearest(self.kind, kinds)
            raise PeanutError(f"combination_type={self.kind!r}", f"one of {', '.join(kinds)}", f"nearest: {near}")
        if self.majority not in get_args(Majority):
            raise PeanutError(f"majority_sign_method={self.majority!r}", "'total' or 'frequency'")
        if any(name in self.kind for name in ("ties", "dare", "prune")):
            least = "above 0" if "dare" in self.kind else "0 or more"
            if self.density is None or not 0 <= self.density <= 1 or (self.density == 0 and "dare" in self.kind):
                raise PeanutError(
                    f"density={self.density} with {self.kind!r}", f"a number {least}, at most 1", "set density"
                )

    def of_layer(self, layer: AdaptedLayer, names: Sequence[str], weights: Sequence[float]) -> LowRank:
        """The combined change of a layer that each of the adapters changes."""
        if self.kind in _OF_CHANGES or (self.kind == "task_arithmetic" and self.svd_rank is not None):
            kind = "linear" if self.kind in ("svd", "task_arithmetic") else self.kind.removesuffix("_svd")
            deltas = [layer.delta(name) for name in names]
            total = combined(kind, deltas, weights, self.density, self.majority)
            U, S, Vh = torch.linalg.svd(total, full_matrices=self.svd_full_matrices, driver=self.svd_driver)
            r = self.svd_rank or max(_rank(layer, name) for name in names)
            k = min(r, len(S))  # a layer may be narrower
            B, A = clamped(U[:, :k] * S[:k], Vh[:k], self.svd_clamp)
            return LowRank(F.pad(B, (0, r - k)), F.pad(A, (0, 0, 0, r - k)))
        factors = [_factors(layer, name, self.kind) for name in names]
        if self.kind in _SUMS:
            if self.kind == "slerp" and len(names) == 2:
                t = weights[1] / sum(weights)
                first, second = (own.dense() for own in factors)
                weights = slerp_weights(first, second, t)
            return LowRank(
                torch.cat([own.up for own in factors], dim=1),
                torch.cat([own.down * (weight * own.scaling) for own, weight in zip(factors, weights, strict=True)]),
            )
        ranks = {name: own.rank for name, own in zip(names, factors, strict=True)}
        if len(set(ranks.values())) > 1:
            raise PeanutError(
                f"adapters of ranks {ranks} at '{layer.path}' with {self.kind!r}", "one rank", "use 'cat' or an svd"
            )
        whole = [weight * own.scaling for own, weight in zip(factors, weights, strict=True)]
        roots = [abs(weight) ** 0.5 for weight in whole]
        signed = [root if weight >= 0 else -root for root, weight in zip(roots, whole, strict=True)]
        # A before B, so that one random state gives what it gives in Hugging Face PEFT.
        down = combined(self.kind, [own.down for own in factors], signed, self.density, self.majority)
        return LowRank(combined(self.kind, [own.up for own in factors], roots, self.density, self.majority), down)


def _factors(layer: AdaptedLayer, name: str, kind: str) -> LowRank:
    """The change of an adapter as a product of thin factors, which have to be exact."""
    own = layer.low_rank(name)
    if own is None:
        raise PeanutError(
            f"adapter {name!r} at '{layer.path}', which is no product of two thin factors, with {kind!r}",
            "adapters that LoRA can be exactly",
            "use a combination_type that ends in svd",
        )
    return own


def _rank(layer: AdaptedLayer, name: str) -> int:
    """The rank of an adapter: its config's, or that of its factors."""
    factors, r = layer.factors(name), getattr(layer.method_of(name)[1], "r", None)
    return factors[0].shape[1] if factors is not None else r or 16


@torch.no_grad()
def add_weighted(
    adapters: AdapterSet, names: Sequence[str], weights: Sequence[float], new_name: str, how: Combination
) -> None:
    """Adds the combination of adapters under a new name, neither active nor trained.

    Raises:
        PeanutError: an adapter is unknown or cannot be combined, or the weights are not one for each.
    """
    if not names or len(weights) != len(names):
        raise PeanutError(f"{len(weights)} weights for {len(names)} adapters", "one for each of at least one adapter")
    if how.kind == "slerp" and (len(names) != 2 or not sum(weights)):
        raise PeanutError(
            f"'slerp' of {len(names)} adapters with weights {list(weights)}", "two, whose weights have a sum"
        )
    adapters.known(list(names))
    configs = [adapters.configs[name] for name in names]
    layers: dict[str, AdaptedLayer] = {path: layer for name in names for path, layer in adapters.layers(name)}
    there = {path: [name for name in names if name in layer.adapters] for path, layer in layers.items()}
    by_name = dict(zip(names, weights, strict=True))
    heads = [path for name in names for path, _ in adapters.saved_modules(name)]
    twice = [path for path in heads if heads.count(path) > 1]
    if not layers or twice:
        found = f"'{twice[0]}', which several of them train whole" if twice else "adapters that change no layer"
        raise PeanutError(found, "adapters that change weights", "combine others")
    config: PeftConfig
    values: dict[str, dict[str, Tensor]]
    if all(isinstance(own, IA3Config) for own in configs):
        if how.kind not in ("linear", "svd"):  # svd is what is called where nothing is said
            raise PeanutError(f"combination_type={how.kind!r} of (IA)³ adapters", "'linear'", "leave it out")
        config, values = _gains(configs[0], layers, there, by_name)
    else:
        config, values = _factored(configs[0], layers, there, by_name, how)
    owner = next((name for name in names if any(True for _ in adapters.saved_modules(name))), names[0])
    config = replace(config, modules_to_save=adapters.configs[owner].modules_to_save)
    adapters.add_given(new_name, config)
    for path, layer in adapters.layers(new_name):
        for suffix, tensor in layer.adapters[new_name].values_by_suffix().items():
            tensor.copy_(values[path][suffix])
    for _, saved in adapters.saved_modules(owner):
        saved.modules_to_save[new_name].load_state_dict(saved.modules_to_save[owner].state_dict())


Parts = tuple[PeftConfig, dict[str, dict[str, Tensor]]]


def _gains(
    first: Any, layers: dict[str, AdaptedLayer], there: dict[str, list[str]], weights: dict[str, float]
) -> Parts:
    """Σ wᵢ lᵢ."""
    values, inputs = {}, []
    for path, layer in layers.items():
        gains = [layer.values(name)["ia3_l"] for name in there[path]]
        if len({own.shape for own in gains}) > 1:
            raise PeanutError(f"'{path}', whose input some and whose output others scale", "one of the two")
        values[path] = {"ia3_l": sum(weights[name] * own for name, own in zip(there[path], gains, strict=True))}
        if layer.method_of(there[path][0])[1].scales_input:
            inputs.append(path)
    return replace(first, target_modules=sorted(set(map(outer, layers))), feedforward_modules=inputs), values  # type: ignore[return-value]


def _factored(
    first: PeftConfig,
    layers: dict[str, AdaptedLayer],
    there: dict[str, list[str]],
    weights: dict[str, float],
    how: Combination,
) -> Parts:
    """The combination in each layer, with zeros where it has less than the largest rank."""
    found: dict[str, LowRank] = {}
    for path, layer in layers.items():
        if layer.frozen.kind.name not in METHODS["LORA"].kinds:
            raise PeanutError(f"'{path}', a {type(layer.base_layer).__name__}", "layers that LoRA can change")
        bias = layer.frozen.bias()
        for name in there[path]:
            change = layer.change(name)
            if change.shift is not None or (change.left is not None and bias is not None):
                raise PeanutError(
                    f"adapter {name!r} changes the bias of '{path}'", "adapters that change weights", "leave it out"
                )
        way = replace(how, kind="linear") if len(weights) == 1 and how.kind in ("svd", *_SUMS) else how
        if way.kind == "linear" and layer.factors(there[path][0]) is None:
            way = how
        found[path] = way.of_layer(layer, there[path], [weights[name] for name in there[path]])
    r = max(own.rank for own in found.values())
    base = first if isinstance(first, LoraConfig) else LoraConfig(task_type=first.task_type)
    config = replace(
        base,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        r=r,
        lora_alpha=r,  # the scaling is in the factors
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
        rank_pattern={},
        alpha_pattern={},
        target_modules=sorted(set(map(outer, found))),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        trainable_token_indices=None,
        ensure_weight_tying=False,
        fan_in_fan_out=any(layer.frozen.kind.name == "conv1d" for layer in layers.values()),
    )
    values = {}
    for path, own in found.items():
        frozen, (a, b) = layers[path].frozen, suffixes(layers[path].frozen)
        down = torch.nn.functional.pad(own.down, (0, 0, 0, r - own.rank)).reshape(frozen.down_shape(r))
        up = own.scaled_up() / config.for_layer(path).scaling
        up = torch.nn.functional.pad(up, (0, r - own.rank)).reshape(frozen.up_shape(r))
        values[path] = {a: down, b: up}
    return config, values
