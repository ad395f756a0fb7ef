"""``Live``: what scripts and libraries written for Hugging Face PEFT ask of a layer with adapters, and tell it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...absent import without
from ...errors import PeanutError
from ...identity import Recognised
from .by_adapter import ByAdapter, TokenHolder
from .of_configs import OfConfigs, TokenRows
from .parameters import Parameters
from .shared import Shared

if TYPE_CHECKING:
    from .state import AdapterState

__all__ = ["Live", "Switched", "initial_scale"]

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""What a layer has of LoRA there, by adapter, also where it is of none."""


def initial_scale(config: Any) -> float:
    """The number by which a method multiplies its update, from its config; 1 where there is none."""
    scale, alpha, r = (getattr(config, name, None) for name in ("scaling", "alpha", "r"))
    if isinstance(scale, (int, float)):
        return float(scale)
    return alpha / r if isinstance(alpha, (int, float)) and r else 1.0


def _of_config(field: str) -> Any:
    def read(self: Live) -> Mapping[str, Any]:
        return OfConfigs(self._methods, field)

    return property(read, doc=f"``{field}`` of each adapter here whose config has it.")


_WIDTHS = (("in_features", "out_features"), ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim"))


def _width(layer: Any, side: int) -> int:
    """The width of a layer's input (0) or output (1)."""
    for names in _WIDTHS:
        if isinstance(found := getattr(layer, names[side], None), int):
            return found
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dim() == 0:
        raise AttributeError(f"a {type(layer).__name__} says nothing of its widths")
    return int(weight.shape[side if weight.dim() > 1 else 0])  # (in, out): a Conv1D of transformers


class Switched(Recognised):
    """A module whose adapters are switched on and off, and made active: what all modules agree on is the model's."""

    state: AdapterState
    path: str

    @property
    def owner(self) -> Any:
        """The adapters of the model that this module is in.

        Raises:
            PeanutError: it is in none.
        """
        found = self.state.owner and self.state.owner()
        if found is None:
            raise PeanutError("a layer with adapters apart from its model", "one in its model", "keep the model")
        return found

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are active here, also of those that are not in this module."""
        return list(self.state.active_at(self.path))

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether this module computes what the base's does."""
        return self.state.disabled or self.path in self.state.off

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters of this module on or off, until it is called again; those that are off are frozen."""
        self.owner.enable_in(self, enabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes exactly these adapters active in this module, and trainable unless ``inference_mode``."""
        self.owner.activate_in(self, self.owner.known(adapter_names), trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Takes an adapter out of the model; its modules stay wrapped. Without effect where it is gone already."""
        if adapter_name in self.owner.configs:
            self.owner.delete(adapter_name, unwrap=False)


class Live(Switched):
    """A place where adapters act."""

    adapters: dict[str, Parameters]
    banks: dict[str, Parameters]
    scaling: dict[str, float]
    """For each adapter the number that its update is multiplied by: its config's, times that of ``set_scale``."""
    _methods: dict[str, tuple[Any, Any]]
    _shared: dict[str, tuple[Parameters, ...]]
    _modules: dict[str, nn.Module | None]

    def counterparts(self) -> tuple[tuple[str, str], ...]:
        return (("peft.tuners.tuners_utils", "BaseTunerLayer"),)

    # What there is

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The names under which this module holds what its adapters train."""
        return tuple(name for name, module in self._by_adapter() if next(module.parameters(), None) is not None)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The names under which it holds what its adapters have beside that."""
        return tuple(name for name, module in self._by_adapter() if next(module.parameters(), None) is None)

    def _by_adapter(self) -> Iterator[tuple[str, nn.Module]]:
        inside = self._modules.get("token_adapter")
        for before, held in (("", self._modules), ("token_adapter.", {} if inside is None else inside._modules)):
            yield from ((before + name, module) for name, module in held.items() if isinstance(module, ByAdapter))

    def method_of(self, name: str) -> tuple[Any, Any]:
        """The method of an adapter and its config here."""
        return self._methods[name]

    def values(self, name: str) -> dict[str, Tensor]:
        """The tensors of an adapter here by suffix, those that it shares with other places among them."""
        own = self.adapters[name].values_by_suffix()
        for shared in self._shared[name]:
            own.update(shared.values_by_suffix())
        return own

    r, lora_alpha, res_num, token_indices = map(_of_config, ("r", "lora_alpha", "depth", "token_indices"))

    @property
    def in_features(self) -> int:
        """The width of the base layer's input: of a convolution its channels, of an embedding its rows."""
        return self._width(0)

    @in_features.setter
    def in_features(self, value: int) -> None:
        self.get_base_layer().in_features = value

    @property
    def out_features(self) -> int:
        """The width of the base layer's output."""
        return self._width(1)

    @out_features.setter
    def out_features(self, value: int) -> None:  # transformers' resizing does
        self.get_base_layer().out_features = value

    def _width(self, side: int) -> int:
        return _width(self.get_base_layer(), side)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer's weight."""
        return []

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def get_base_layer(self) -> Any:
        """The base's own layer."""
        return self._modules.get("base_layer")

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains or freezes these adapters here."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for own in (self.adapters, self.banks):
            for name in names & own.keys():
                own[name].requires_grad_(requires_grad)
        self.owner.trains(names, requires_grad)

    use_dora, use_rslora, lora_bias = map(_of_config, ("use_dora", "use_rslora", "lora_bias"))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``convert_to_lora`` takes what an adapter does here."""
        return False

    def _fallen(self, name: str) -> Any:
        """An attribute of the base's layer; else, as Hugging Face PEFT has it, one of adapters that are not there."""
        for own in self.adapters.values():  # tensors of tied layers are in the first of them
            if name in own.homes:
                return own.homes[name]
        if isinstance(self._modules.get("token_adapter"), TokenHolder) and name == "original_module":
            return self.get_base_layer()
        if name == "trainable_tokens_original" and len(self.token_indices):
            return TokenRows(self)
        try:
            return getattr(self.get_base_layer(), name)
        except AttributeError as error:
            if name in _FACTORS:
                return {}
            if shared := Shared({own: bank for own, banks in self._shared.items() for bank in banks}, name):
                return shared
            raise (without(self, name) or error) from None

    # Scales

    def factor(self, name: str) -> float:
        """What the change of adapter ``name`` is multiplied by here."""
        initial = initial_scale(self._methods[name][1])
        return self.scaling[name] / initial if initial else 1.0

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiplies the change that an adapter makes here by ``scale``, instead of by what was set before.

        Without effect where the adapter is not here. What is merged stays as it is until it is unmerged. The scale is
        not saved with the adapter.

        Raises:
            PeanutError: the adapter does not only add to the weight, so it cannot be scaled (by 1 it can).
        """
        if adapter in self.adapters:
            self.rescale(adapter, scale * initial_scale(self._methods[adapter][1]))

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of each active adapter here by ``scale``; errors: see ``set_scale``."""
        for name in self.active_adapters:
            if name in self.adapters and scale != 1:
                self.rescale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of each active adapter here by ``scale``; without one, it is what it was at first."""
        for name in self.active_adapters:
            if name in self.adapters:
                self.rescale(name, self.scaling[name] / scale if scale else initial_scale(self._methods[name][1]))

    def rescale(self, name: str, wanted: float) -> None:
        """Sets ``scaling`` of an adapter; errors: see ``set_scale``."""
        initial = initial_scale(self._methods[name][1])
        wanted = initial if math.isclose(wanted, initial, rel_tol=1e-9) else float(wanted)
        if not math.isfinite(wanted):
            raise PeanutError(f"a scale of {wanted} for adapter {name!r} at '{self.path}'", "a finite number")
        if wanted not in (initial, self.scaling[name]):
            self._check_scale(name)
        with self.state.changing():
            self.scaling = {**self.scaling, name: wanted}  # what somebody has read stays what it was
            self.state.scale(self.path, name, None if wanted == initial else wanted)

    def _check_scale(self, name: str) -> None:
        """Refuses a scale for an adapter that cannot be scaled here."""
        method = self._methods[name][0]
        raise PeanutError(
            f"a scale for adapter {name!r} at '{self.path}', of {method.name}, which does not add to a weight",
            "an adapter that does, or a scale of 1",
            "leave its scale as it is",
        )

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Writes adapters (default: the active ones) into the weight of this layer; those not here are left out.

        Raises:
            PeanutError: as ``merge_adapter`` of the model.
        """
        raise PeanutError(
            f"a merge at '{self.path}', where adapters change no weight", "a layer's weight", "use it unmerged"
        )

    def unmerge(self) -> None:
        """Restores this layer's weight bit for bit."""
