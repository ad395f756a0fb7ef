"""Converts adapters to LoRA (exactly, if the update is low-rank, or the best approximation) and LoRA to PEANuT."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..methods.lora import LoraConfig, suffixes
from ..methods.peanut import PeanutConfig
from ..model.adapters.adapter_set import AdapterSet
from ..model.checkpoints.checkpoint import save_adapter
from ..model.layers.layer import AdaptedLayer
from ..model.targets.matching import target_paths
from ..operators import LowRank
from ..protocols import METHODS, PeftConfig, WeightMethod, method_of
from ..protocols.arguments import checked
from ..protocols.patterns import outer

__all__ = [
    "LoraExport",
    "carried",
    "from_lora",
    "lora_values",
    "moved_bias",
    "shortest_targets",
    "to_lora",
]


@dataclass(frozen=True)
class LoraExport:
    """An adapter written as LoRA, living in the model beside its source.

    Args:
        adapters: the model's adapters.
        name: the name under which the LoRA is among them.
        errors: for each layer ‖ΔW_LoRA − ΔW‖ / ‖ΔW‖ in Frobenius norm, measured.
    """

    adapters: AdapterSet
    name: str
    errors: dict[str, float]

    @property
    def largest_error(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / max(1, len(self.errors))

    @property
    def rank(self) -> int:
        """The rank of the new adapter, of the largest layer."""
        return int(self.adapters.configs[self.name].r)  # type: ignore[attr-defined]

    @checked
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the LoRA as an adapter of its own, which Hugging Face PEFT and servers of LoRA read."""
        return save_adapter(folder, self.adapters, self.name)


@torch.no_grad()
@checked
def to_lora(
    model: nn.Module,
    name: str = "default",
    new_name: str | None = None,
    rank: int | None = None,
    progressbar: bool = False,
) -> LoraExport:
    """The adapter ``name`` as a LoRA: B = up, A = down, α = r.

    Exact, of the adapter's own rank, where ΔW is given as a product of thin factors; otherwise the best approximation
    of rank ``rank`` in Frobenius norm (truncated singular value decomposition), whose error is returned and printed.
    All layers have one rank r, with zeros where less would do, and one α: llama.cpp scales each layer by α / its rank.

    Args:
        model: a model with adapters; the LoRA is added to it, not active.
        name: the adapter.
        new_name: what the LoRA is called; ``<name>_lora`` by default.
        rank: the largest rank allowed; by default that of the factors, or 16 where there are none.
        progressbar: show how many layers are done.

    Raises:
        PeanutError: there is no such adapter, it changes nothing, or it changes a layer that LoRA cannot change.
    """
    from transformers.utils.logging import tqdm

    adapters = AdapterSet.of(model)
    adapters.known(name)
    layers = dict(adapters.layers(name))
    if not layers:
        raise PeanutError(f"adapter {name!r} changes no layer", "an adapter that does", "use it as it is")
    for path, layer in layers.items():
        if layer.frozen.kind.name not in METHODS[LoraConfig.method].kinds:
            raise PeanutError(
                f"adapter {name!r} changes '{path}', a {type(layer.base_layer).__name__}",
                "layers that LoRA can change",
                "merge it instead",
            )
    steps = tqdm(layers.items(), desc="Converting to LoRA", disable=not progressbar)
    factors = {path: _product(layer, name, rank) for path, layer in steps}
    shifts = {path: moved_bias(layer, name) for path, layer in layers.items()}
    source = adapters.configs[name]
    r = max(operator.rank for operator in factors.values())
    config = LoraConfig(
        **carried(source),
        r=r,
        lora_alpha=r,  # the scaling is in the factors
        lora_bias=any(shift is not None for shift in shifts.values()),
        fan_in_fan_out=any(layer.frozen.kind.name == "conv1d" for layer in layers.values()),
    )
    values = {
        path: lora_values(layer, factors[path], shifts[path], config.for_layer(path)) for path, layer in layers.items()
    }
    made = _add_beside(adapters, name, new_name or f"{name}_lora", config, values)
    export = LoraExport(adapters, made, {path: _relative(layer, name, made) for path, layer in layers.items()})
    if export.largest_error > 1e-5:
        print(
            f"{source.method} as LoRA of rank {r}: relative error of ΔW {export.mean_error:.3g} on average, "
            f"{export.largest_error:.3g} at most"
        )
    return export


def _product(layer: AdaptedLayer, name: str, rank: int | None) -> LowRank:
    """The change of a layer as a product of thin factors: its own, or the best of rank ``rank``."""
    own = layer.low_rank(name)
    if own is not None and (rank is None or own.rank <= rank):
        return own
    U, S, Vh = torch.linalg.svd(layer.delta(name).double(), full_matrices=False)
    r = min(16 if rank is None else rank, len(S))
    root = S[:r].sqrt()
    return LowRank((U[:, :r] * root).float(), (root[:, None] * Vh[:r]).float())


def lora_values(layer: AdaptedLayer, product: LowRank, shift: Tensor | None, config: LoraConfig) -> dict[str, Tensor]:
    """The tensors of a LoRA with this config whose change is ``product``, and of the bias ``shift``.

    It has zeros beyond the product's ranks; what the scalings differ by is in B.
    """
    (a, b), r = suffixes(layer.frozen), config.r
    up = product.up if product.scaling == config.scaling else product.up * (product.scaling / config.scaling)
    values = {
        a: _padded(product.down, 0, r).reshape(layer.frozen.down_shape(r)),
        b: _padded(up, 1, r).reshape(layer.frozen.up_shape(r)),
    }
    if config.lora_bias:
        none = up.new_zeros(layer.frozen.out_features)
        values["lora_B.bias"] = none if shift is None else shift / config.scaling
    return values


def _padded(factor: Tensor, dim: int, r: int) -> Tensor:
    """A factor with zeros up to rank ``r`` in dimension ``dim``."""
    missing = r - factor.shape[dim]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if dim == 0 else (0, missing))


def moved_bias(layer: AdaptedLayer, name: str) -> Tensor | None:
    """b' − b, or ``None`` where an adapter leaves the bias alone."""
    change, bias = layer.change(name), layer.frozen.bias()
    if change.left is None or bias is None:
        return change.shift
    offset = change.offset(bias)
    return None if offset is None else offset - bias


@torch.no_grad()
@checked
def from_lora(
    model: nn.Module, name: str = "default", new_name: str | None = None, side: Literal["in", "out"] = "in"
) -> LoraExport:
    """A PEANuT that starts where a trained LoRA ended, by the paper's Proposition 3.2.

    Since x = ReLU(x) − ReLU(−x), the hidden units Aᵀ = [W⁺B, −W⁺B] and the output projection [Aᵀ, −Aᵀ] of the LoRA give
    ΔW_PEANuT = W W⁺ ΔW_LoRA: 2r hidden units, and the LoRA's update projected on W's left singular space
    (``side="in"``, the paper's form; ``side="out"`` projects on the right singular space instead). What lies outside
    is lost, and told.

    Args:
        model: a model with a LoRA adapter; the PEANuT is added to it, not active.
        name: the LoRA.
        new_name: what the PEANuT is called; ``<name>_peanut`` by default.
        side: the side of W that A reads.

    Returns:
        the new adapter's name, and for each layer the relative part of the LoRA's update that it could not take over.

    Raises:
        PeanutError: ``name`` is no LoRA, or it changes a bias, which PEANuT has not.
    """
    adapters = AdapterSet.of(model)
    adapters.known(name)
    source = adapters.configs[name]
    if not isinstance(source, LoraConfig) or source.lora_bias or source.bias != "none" or source.use_dora:
        raise PeanutError(
            f"adapter {name!r} is {source.peft_type} that changes more than a weight"
            if isinstance(source, LoraConfig)
            else f"adapter {name!r} is a {type(source).__name__}",
            "a plain LoRA without biases",
            "start PEANuT from scratch",
        )
    layers = dict(adapters.layers(name))
    values: dict[str, dict[str, Tensor]] = {}
    for path, layer in layers.items():
        delta = layer.change(name).delta
        assert isinstance(delta, LowRank)  # what LoRA makes
        W, up, down = layer.frozen.matrix().double(), delta.scaled_up().double(), delta.down.double()
        read, other = (torch.linalg.pinv(W) @ up, down.T) if side == "in" else (torch.linalg.pinv(W.T) @ down.T, up)
        values[path] = {
            "peanut_A.weight": torch.cat([read, -read], dim=1).T,
            "peanut_B.weight": torch.cat([other, -other], dim=1),
        }
    ranks = {path: len(value["peanut_A.weight"]) for path, value in values.items()}
    r = max(ranks.values())
    config = PeanutConfig(
        **carried(source),
        r=r,
        act_fn="relu",
        side=side,
        dropout=source.lora_dropout,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != r},
    )
    made = _add_beside(adapters, name, new_name or f"{name}_peanut", config, values)
    return LoraExport(adapters, made, {path: _relative(layer, name, made) for path, layer in layers.items()})


def carried(source: PeftConfig) -> dict[str, Any]:
    """What an adapter in another form keeps of its source's config."""
    names = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "modules_to_save")
    return {name: getattr(source, name) for name in names}


def _add_beside(
    adapters: AdapterSet,
    name: str,
    new_name: str,
    config: LoraConfig | PeanutConfig,
    values: Mapping[str, Mapping[str, Tensor]],
) -> str:
    """Adds an adapter with given parameters on the layers of adapter ``name``, with copies of its trained modules."""
    config = replace(config, target_modules=shortest_targets(adapters, config, list(values)))
    adapters.add_given(new_name, config)
    for path, layer in adapters.layers(new_name):
        own = layer.adapters[new_name].values_by_suffix()
        for suffix, value in values[path].items():
            own[suffix].copy_(value)
    for _, saved in adapters.saved_modules(name):
        saved.modules_to_save[new_name].load_state_dict(saved.modules_to_save[name].state_dict())
    return new_name


def shortest_targets(adapters: AdapterSet, config: LoraConfig | PeanutConfig, paths: list[str]) -> list[str]:
    """Layer names if they name just ``paths`` (servers of LoRA look at names), else the paths themselves."""
    paths = sorted(set(map(outer, paths)))
    names = sorted({path.rpartition(".")[2] for path in paths})
    method = method_of(config.peft_type)
    assert isinstance(method, WeightMethod)  # as both configs are of one
    try:
        named = target_paths(adapters.model, replace(config, target_modules=names), method)
    except PeanutError:
        return paths
    return names if set(named) == set(paths) else paths


def _relative(layer: AdaptedLayer, name: str, made: str) -> float:
    """‖ΔW_made − ΔW_name‖ / ‖ΔW_name‖; where both are thin products, from the factors alone."""
    source, result = layer.change(name), layer.change(made).delta
    if isinstance(source.delta, LowRank) and source.adds and isinstance(result, LowRank):
        minus = _double(source.delta, -1)
        apart = LowRank.sum([_double(result, 1), minus]).singular_values().norm()
        size = minus.singular_values().norm()
    else:
        own = layer.delta(name).double()
        apart, size = (layer.delta(made).double() - own).norm(), own.norm()
    return float(apart / size) if size > 0 else float(apart)


def _double(operator: LowRank, sign: int) -> LowRank:
    return LowRank(operator.up.double(), operator.down.double(), sign * operator.scaling)
