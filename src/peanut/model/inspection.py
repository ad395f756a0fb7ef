"""Statistics of an adapter: the norm and effective rank of its update in each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..operators import Dense
from ..weights import FrozenLayer
from .adapters.adapter_set import AdapterSet
from .layers.layer import AdaptedLayer

__all__ = ["LayerReport", "PlaceReport", "effective_rank", "inspect_adapter", "inspect_places"]


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    Args:
        shape: (out, in) of its matrix.
        weight_norm: Frobenius norm of W⁰.
        delta_norm: Frobenius norm of ΔW.
        effective_rank: exp of the entropy of ΔW's normalised singular values; at most its rank.
    """

    path: str
    method: str
    kind: str
    shape: tuple[int, int]
    parameters: int
    weight_norm: float
    delta_norm: float
    effective_rank: float

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖ / ‖W⁰‖."""
        return self.delta_norm / self.weight_norm if self.weight_norm else float("inf")


@dataclass(frozen=True)
class PlaceReport:
    """A place where an adapter changes no weight: an output, the input, the gate of a mixture.

    Args:
        path: where it is in the model, "/" for the model's input.
        tensors: the shape and the Frobenius norm of each of its tensors, by suffix.
    """

    path: str
    method: str
    tensors: dict[str, tuple[tuple[int, ...], float]]
    parameters: int


@torch.no_grad()
def inspect_places(model: nn.Module, name: str = "default") -> list[PlaceReport]:
    """A report of every place where adapter ``name`` does something else than change a weight.

    Raises:
        PeanutError: there is no such adapter.
    """
    adapters = AdapterSet.of(model)
    adapters.known(name)
    reports = []
    for place in adapters.places(name):
        if not isinstance(place, AdaptedLayer):
            values = place.values(name)
            tensors = {suffix: (tuple(value.shape), float(value.double().norm())) for suffix, value in values.items()}
            count = sum(value.numel() for value in values.values())
            reports.append(PlaceReport(place.path, place.method_of(name)[0].name, tensors, count))
    return reports


@torch.no_grad()
def inspect_adapter(model: nn.Module, name: str = "default") -> list[LayerReport]:
    """A report of every layer that adapter ``name`` changes, in the model's order.

    Raises:
        PeanutError: there is no such adapter.
    """
    adapters = AdapterSet.of(model)
    adapters.known(name)
    reports = []
    for path, layer in adapters.layers(name):
        change = layer.change(name)
        delta = change.delta if change.adds else Dense(layer.delta(name))
        values = torch.zeros(1, dtype=torch.float64) if delta is None else delta.singular_values()
        reports.append(
            LayerReport(
                path=path,
                method=layer.method_of(name)[0].name,
                kind=layer.frozen.kind.name,
                shape=(layer.frozen.out_features, layer.frozen.in_features),
                parameters=sum(value.numel() for value in layer.adapters[name] if isinstance(value, nn.Parameter)),
                weight_norm=_norm(layer.frozen),
                delta_norm=float(values.norm()),
                effective_rank=effective_rank(values),
            )
        )
    return reports


def _norm(layer: FrozenLayer) -> float:
    """‖W‖, not a number where W cannot be read."""
    unread = layer.unreadable(layer.weight) is not None
    return math.nan if unread else float(layer.matrix().double().norm())


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007); 0 for a zero operator."""
    total = values.sum()
    return float(torch.exp(torch.special.entr(values / total).sum())) if total else 0.0
