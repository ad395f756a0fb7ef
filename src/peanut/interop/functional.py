"""What libraries call on a model with injected adapters, which is no ``PeftModel``: diffusers', say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from ..errors import PeanutError
from ..model.adapters.adapter_set import AdapterSet
from ..model.layers.calls import EVERYWHERE
from ..model.layers.layer import AdaptedLayer

__all__ = [
    "DoraCaching",
    "cast_adapter_dtype",
    "delete_adapter",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "set_adapter",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Makes one adapter, or several whose changes then add, active, and trainable unless ``inference_mode``.

    ``layer_cls`` is accepted for scripts: adapters are found in all layers.
    """
    AdapterSet.of(model).activate(adapter_name, trainable=not inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str | None = None, layer_cls: Any = None
) -> list[str] | None:
    """Takes an adapter out of a model; the names of those that are active then, ``None`` if none is.

    ``prefix`` and ``layer_cls`` are accepted for scripts.
    """
    adapters = AdapterSet.of(model)
    adapters.delete(adapter_name)
    return list(adapters.state.active) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Trains or freezes adapters; which are active stays as it is."""
    AdapterSet.of(model).set_requires_grad(adapter_names, requires_grad)


@torch.no_grad()
def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Puts an adapter's tensors of less than 32 bits into float32; new parameters take the old ones' places."""
    adapters = AdapterSet.of(model)
    adapters.known(adapter_name)
    for place in adapters.places(adapter_name) if autocast_adapter_dtype else ():
        for own in [held[adapter_name] for held in (place.adapters, place.banks) if adapter_name in held]:
            for suffix, value in own.values_by_suffix().items():
                if value.is_floating_point() and value.itemsize < 4:
                    own.assign(suffix, value.float())


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Accepted for scripts: inputs are never cast here, so there is nothing to switch off."""
    yield


class DoraCaching:
    """Within the context, or for good by ``DoraCaching()(enabled=True)``, evaluation caches, in every model.

    In ``eval()`` and without gradients what adapters make of the weights is then computed once: DoRA's norms, and what
    other methods have of that kind. A forward in training, a change of the adapters, or a write to their tensors or the
    weight (but through ``.data``) lets go of it. ``model.inference()`` does the same for one model.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled, self._before = enabled, list[bool | None]()

    def __enter__(self) -> Self:
        self._before.append(EVERYWHERE.switch_here(self.enabled))
        return self

    def __exit__(self, *_: object) -> None:
        EVERYWHERE.switch_here(self._before.pop())

    def __call__(self, enabled: bool = True) -> None:
        EVERYWHERE.switch(enabled)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the context the changes that adapters make of weights are multiplied by a number (WiSE-FT).

    Raises:
        TypeError: ``multiplier`` is no number.
        PeanutError: the model has no layer with adapters, or an adapter that does not only add to weights.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"multiplier={multiplier!r}; expected a number")
    layers = [layer for _, layer in AdapterSet.of(model).layers()]
    if not layers:
        raise PeanutError(f"{type(model).__name__} has no layer whose weight an adapter changes", "one that has some")
    before = [(layer, dict(layer.scaling)) for layer in layers]
    try:
        _rescale(layers, multiplier)
        yield
    finally:
        for layer, scaling in before:
            for name, scale in scaling.items():
                layer.rescale(name, scale)


def _rescale(layers: Sequence[AdaptedLayer], multiplier: float) -> None:
    for layer in layers:
        for name, scale in list(layer.scaling.items()):
            layer.rescale(name, scale * multiplier)
