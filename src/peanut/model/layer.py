"""The layer wrapper: one class for every method and every kind of layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators import LowRank
from ..protocols import Change, PeftConfig, WeightMethod
from ..weights import FrozenLayer, LayerKind
from .parameters import NamedModules, Parameters
from .state import BASE, AdapterState

__all__ = ["AdaptedLayer"]


class AdaptedLayer(nn.Module):
    """A frozen layer and the adapters that change it: y = (W + Σ Δ_k) x + b + Σ shift_k over the active adapters k.

    It knows how adapters live (which act, which are merged, how their changes combine); what a change is, the
    methods say, and how it is applied fast, the operators.
    """

    def __init__(self, base_layer: nn.Module, kind: LayerKind, path: str, state: AdapterState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters: NamedModules[Parameters] = NamedModules()
        self.frozen = FrozenLayer(base_layer, kind)
        self.path = path
        self.state = state
        self._methods: dict[str, tuple[WeightMethod[Any], PeftConfig]] = {}
        self._known: dict[str, tuple[Any, Change]] = {}
        self.register_state_dict_post_hook(_save_unmerged)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]

    def add(self, name: str, method: WeightMethod[Any], config: PeftConfig, parameters: Parameters) -> None:
        """Adds an adapter that ``method`` and ``config`` (patterns resolved) describe."""
        self.adapters[name] = parameters
        self._methods[name] = (method, config)
        self._known.pop(name, None)

    def delete(self, name: str) -> None:
        """Removes an adapter."""
        del self.adapters[name], self._methods[name]
        self._known.pop(name, None)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer's weight."""
        return [name for name in self.state.merged if name in self.adapters]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters that this layer has."""
        return [name for name in self.state.active if name in self.adapters]

    @property
    def disable_adapters(self) -> bool:
        return self.state.disabled

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that looks at a layer's dtype or device."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def method_of(self, name: str) -> tuple[WeightMethod[Any], Any]:
        """The method of an adapter and its config for this layer."""
        return self._methods[name]

    def change(self, name: str) -> Change:
        """The change that adapter ``name`` makes here, from the weight before any merge.

        Without gradients and outside training it is computed once and kept while no parameter and no weight changes,
        and autocast neither begins nor ends.
        """
        method, config = self._methods[name]
        parameters = self.adapters[name].values_by_suffix()
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return method.change(config, parameters, self.frozen)
        version = _version([*parameters.values(), self.frozen.weight])
        known = self._known.get(name)
        if known is None or version is None or known[0] != version:
            known = (version, method.change(config, parameters, self.frozen))
            self._known[name] = known
        return known[1]

    def delta(self, name: str) -> Tensor:
        """ΔW of adapter ``name`` written out, (out, in), in float32 or the parameters' wider dtype."""
        out, inputs = self.frozen.out_features, self.frozen.in_features
        operator = self.change(name).delta
        return self.frozen.matrix().new_zeros(out, inputs) if operator is None else operator.dense()

    @torch.no_grad()
    def merge(self, names: list[str], shared: bool) -> None:
        """Writes W + Σ Δ and b + Σ shift over ``names``, all from the weight before any merge."""
        names = [name for name in names if name in self.adapters]
        if not names:
            return
        matrix, bias = self.frozen.matrix(), self.frozen.bias()
        wide = torch.promote_types(matrix.dtype, torch.float32)
        merged, shift = matrix.to(wide, copy=True), None
        for name in names:
            change = self.change(name)
            if change.delta is not None:
                merged += change.delta.dense().to(wide)
            if change.shift is not None:
                shift = change.shift if shift is None else shift + change.shift
        own = matrix.new_zeros(self.frozen.out_features) if bias is None else bias
        self.frozen.write(merged, None if shift is None else own + shift.to(own.dtype), shared=shared)

    def unmerge(self) -> None:
        """Restores the weight bit for bit."""
        self.frozen.restore()

    def train(self, mode: bool = True) -> AdaptedLayer:
        self._known.clear()
        return super().train(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.disabled:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if self.state.samples is not None:
            return self._forward_per_sample(x, *args, **kwargs)
        changes = [
            self.change(name) for name in self.state.active if name in self.adapters and name not in self.state.merged
        ]
        if not changes:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if not args and not kwargs and self.frozen.kind.fused(self.base_layer):
            operator = self._one_low_rank(changes)
            if operator is not None:
                return self._forward_joined(x, operator, changes)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y + self._added(x, changes).to(y.dtype)

    def _forward_joined(self, x: Tensor, operator: LowRank, changes: list[Change]) -> Tensor:
        """The frozen product and a low-rank change in one go."""
        weight, bias = self.frozen.kind.matrix(self.base_layer, self.weight), self.bias
        dtype = _autocast_dtype(x.device)
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        for change in changes:
            if change.shift is not None:
                bias = change.shift.to(x.dtype) if bias is None else bias + change.shift.to(bias.dtype)
        return operator.to(x.dtype).joined(x, weight, bias)

    def _one_low_rank(self, changes: list[Change]) -> LowRank | None:
        """The changes' sum as one low-rank operator, if all of them are one and none drops its input out."""
        operators: list[LowRank] = []
        for change in changes:
            if (change.dropout and self.training) or not isinstance(change.delta, LowRank):
                return None
            operators.append(change.delta)
        return LowRank.sum(operators)

    def _added(self, x: Tensor, changes: list[Change]) -> Tensor:
        """What the changes add to the layer's output: the one definition of several adapters at once."""
        kind, total = self.frozen.kind, None
        dtype = x.dtype if kind.takes_activations() else self.weight.dtype
        for change in changes:
            if change.delta is not None:
                droppable = change.dropout and self.training and kind.takes_activations()
                seen = nn.functional.dropout(x, change.dropout) if droppable else x
                added = kind.respond(self.base_layer, seen, change.delta.to(dtype))
                total = added if total is None else total + added
            if change.shift is not None:
                shift = kind.along_output(change.shift.to(dtype))
                total = shift if total is None else total + shift
        return x.new_zeros(()) if total is None else total

    def _forward_per_sample(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Row by row: the base's output for all, and to each sample's rows its own adapter's change."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name, rows in self.state.groups(x.shape[0]).items():
            if name != BASE and name in self.adapters:
                index = torch.tensor(rows, device=x.device)
                added = self._added(x[index], [self.change(name)]).to(y.dtype)
                y = y.index_add(0, index, added.expand(len(rows), *y.shape[1:]))
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {method.name}" for name, (method, _) in self._methods.items())


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast has products computed on ``device`` now, or ``None``."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _version(tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """A value that changes whenever one of the tensors does, or ``None`` where torch does not count versions."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return (
        _autocast_dtype(tensors[-1].device),
        *((tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors),
    )


def _save_unmerged(layer: AdaptedLayer, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A state dict taken while merged holds the weight before the merge, so that loading it applies nothing twice."""
    if layer.frozen.merged:
        for name, value in (("weight", layer.frozen.weight), ("bias", layer.frozen.bias())):
            key = f"{prefix}base_layer.{name}"
            if value is not None and key in state:
                state[key] = value


def _refuse_merged(layer: AdaptedLayer, *_: Any) -> None:
    """A state dict holds weights without adapters, and would put them where the merged ones are."""
    if layer.merged:
        raise PeanutError(
            f"a state dict for a model in which adapter {layer.merged_adapters[0]!r} is merged",
            "an unmerged model",
            "call unmerge_adapter() first",
        )
