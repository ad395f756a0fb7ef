"""Finds modules of a model by path, wraps them or hooks onto them, and puts the originals back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from ...errors import PeanutError, nearest
from ...protocols import Method, PeftConfig, method_of
from ...weights import FrozenLayer, kind_of
from ...weights.attention import InProjection, InProjectionKind
from ...weights.made import made_by_users
from ..layers.adapted import Adapted, walk
from ..layers.attention import AdaptedAttention
from ..layers.hooks import hook, move_hooks, unhook
from ..layers.input import AdaptedInput, AdaptedMixture
from ..layers.layer import AdaptedLayer
from ..layers.output import AdaptedOutput, Listener
from ..layers.saved_modules import SavedModule
from ..layers.state import AdapterState
from ..targets.paths import bare, first_paths, modules_by_path, starts

H = TypeVar("H", AdaptedInput, AdaptedMixture)

__all__ = ["SHARED", "Surgery", "key_of"]

SHARED = "/"
"""What begins the keys of tensors that belong to no one layer: they lie beside the model's modules in files."""


def key_of(path: str, suffix: str) -> str:
    """The key of a tensor at ``path``, or of one that belongs to no layer."""
    return f"{SHARED}{suffix}" if path == SHARED else f"{path}.{suffix}" if path else suffix


class Surgery:
    """Finds the modules of a model where adapters act, and prepares them for adapters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = AdapterState()
        self.state.owner = weakref.ref(self)
        self.configs: dict[str, PeftConfig] = {}
        self.elsewhere: dict[str, list[str]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.state.owner = weakref.ref(self)

    def layers(self, name: str | None = None) -> Iterator[tuple[str, AdaptedLayer]]:
        """The adapted layers with their paths, all or those that have adapter ``name``."""
        return ((place.path, place) for place in self.places(name) if isinstance(place, AdaptedLayer))

    def places(self, name: str | None = None) -> Iterator[Adapted]:
        """Every place where adapters act, or those that have adapter ``name``."""
        for module in walk(self.model):
            if isinstance(module, Adapted) and (name is None or name in module.adapters):
                yield module

    def saved_modules(self, name: str | None = None) -> Iterator[tuple[str, SavedModule]]:
        """The modules trained whole with their paths, all or those of which adapter ``name`` has a copy."""
        for module in walk(self.model):
            if isinstance(module, SavedModule) and (name is None or name in module.modules_to_save):
                yield module.path, module

    def known(self, names: str | Sequence[str]) -> list[str]:
        """``names`` as a list.

        Raises:
            PeanutError: there is no adapter of one of the names.
        """
        wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in wanted:
            if name not in self.configs:
                raise PeanutError(
                    f"no adapter {name!r}",
                    f"one of {', '.join(map(repr, self.configs)) or 'none yet'}",
                    f"nearest: {nearest(name, self.configs, 1)}" if self.configs else "add it first",
                )
        return wanted

    def method(self, name: str) -> Method[Any]:
        """The method of adapter ``name``."""
        return method_of(self.configs[name].peft_type)  # type: ignore[no-any-return]

    def frozen(self, path: str) -> FrozenLayer:
        """The layer at ``path`` as a frozen matrix."""
        module = self.at(path)
        if isinstance(module, AdaptedLayer):
            return module.frozen
        if isinstance(module, nn.MultiheadAttention):
            return FrozenLayer(InProjection(module), InProjectionKind())
        kind = kind_of(module)
        assert kind is not None  # target_paths has checked it
        return FrozenLayer(module, kind)

    def wrapped(self, path: str) -> AdaptedLayer:
        """The layer at ``path`` with adapters around it."""
        module = self.at(path)
        if isinstance(module, AdaptedLayer):
            return module
        layer = (
            AdaptedAttention(module, path, self.state)
            if isinstance(module, nn.MultiheadAttention)
            else AdaptedLayer(module, self.frozen(path), path, self.state)
        )
        self.put(path, layer.train(module.training))
        return layer

    def saved(self, path: str) -> SavedModule:
        """The module at ``path`` with the copies of it that adapters train."""
        module = self.at(path)
        if isinstance(module, SavedModule):
            return module
        saved = SavedModule(module, path, self.state).train(module.training)
        self.put(path, saved)
        return saved

    def output(self, path: str) -> AdaptedOutput:
        """The adapters of the output of the module at ``path``."""
        outer = self.at(path)
        inner = bare(outer)
        found = inner._modules.get("adapted_output")
        if isinstance(found, AdaptedOutput):
            return found
        made = AdaptedOutput(inner, path, self.state).train(inner.training)
        inner.add_module("adapted_output", made)
        hook(outer, made.change)
        hook(self._around(path), made.missed)
        return made

    def _around(self, path: str) -> nn.Module:
        """The module that holds the one at ``path``."""
        return self.at(path.rpartition(".")[0])

    def listener(self, path: str, source: str | None) -> Listener | None:
        """Saves the input of ``source`` for adapters of the output at ``path``; ``None`` if that is its own."""
        if source is None:
            return None
        listeners = self.output(path).listeners
        if source not in listeners:
            listeners[source] = Listener(source, path)
            hook(self.at(source), listeners[source].see, before=True)
        return listeners[source]

    def holder(self, kind: type[H]) -> H:
        """What holds the adapters of the whole model that are of a kind: of its input, or mixtures."""
        if kind.name not in self.model._modules:
            self.model.add_module(kind.name, kind(SHARED, self.state).train(self.model.training))
        return self.model._modules[kind.name]  # type: ignore[return-value]

    def emptied(self, place: Adapted) -> None:
        """Takes a place without adapters out of the model."""
        if isinstance(place, AdaptedLayer):
            self.put(place.path, place.base_layer)
        elif isinstance(place, AdaptedOutput):
            outer = self.at(place.path)
            unhook(outer, place)
            unhook(self._around(place.path), place)
            for source, listener in place.listeners.items():
                unhook(self.at(source), listener)
            del bare(outer)._modules["adapted_output"]
        else:
            assert isinstance(place, (AdaptedInput, AdaptedMixture))
            del self.model._modules[place.name]

    def put(self, path: str, module: nn.Module) -> None:
        """Replaces the module at ``path`` wherever it stands; this library's hooks move to the new one."""
        move_hooks(self.at(path), module)
        for place in [path, *self.elsewhere.get(path, ())]:
            parent, _, name = place.rpartition(".")
            setattr(self.own(self.at(parent)), name, module)

    def find_elsewhere(self) -> None:
        """Looks which modules stand in several places of the model."""
        self.elsewhere = {}
        for path, first in first_paths(modules_by_path(self.model)).items():
            if path != first:
                self.elsewhere.setdefault(first, []).append(path)

    def at(self, path: str) -> nn.Module:
        """The module at ``path`` in the base model; inside a module that is trained whole, that of the original."""
        module = self.model
        for name in path.split(".") if path else ():
            inner = self.own(module)
            if name == "base_layer" and not isinstance(inner, Adapted):  # of an attention that is not adapted yet
                continue
            module = inner._modules.get(name) or getattr(inner, name)
        return module

    @staticmethod
    def own(module: nn.Module) -> nn.Module:
        """A module, or the base's own if it is trained whole."""
        return module.original_module if isinstance(module, SavedModule) else module

    def inside(self, paths: Sequence[str]) -> dict[str, nn.Module]:
        """The base's modules at ``paths`` and in them, by path."""
        modules, outer = modules_by_path(self.model), frozenset(paths)
        return {path: self.own(module) for path, module in modules.items() if not outer.isdisjoint(starts(path))}

    def check_whole(self, path: str) -> None:
        """Refuses to train the module at ``path`` whole if parts of it are quantised or changed by an adapter.

        And one of which a user's hook makes the weight: it would go on making that of the base's module.
        """
        own = self.own(self.at(path))
        if kind_of(own) is not None and made_by_users(own, "weight"):
            raise PeanutError(
                f"'{path}' has its weight made by a hook, and is to be trained whole",
                "a weight that is a parameter, or one that a parametrisation makes",
                "leave it out of what is trained whole",
            )
        for inner, module in own.named_modules(prefix=path):
            kind = kind_of(bare(module))
            if kind is not None and kind.quantised:
                raise PeanutError(
                    f"'{path}' is to be trained whole, and '{inner}' in it is quantised",
                    "modules with weights that are numbers",
                    "leave it out of what is trained whole",
                )
            if isinstance(module, Adapted):
                raise PeanutError(
                    f"'{path}' is to be trained whole, and another adapter changes a layer in it",
                    "a module that no adapter changes",
                    "leave it out of modules_to_save, or delete that adapter first",
                )
