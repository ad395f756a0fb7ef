"""``Acting``: which adapters of a model act, and which are trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from ...errors import PeanutError, warn
from ...protocols import MixtureMethod, PeftConfig, method_of
from ..layers.adapted import Adapted, walk
from ..layers.saved_modules import SavedModule
from .merging import Merging, changes
from .surgery import SHARED

__all__ = ["Acting", "experts_of"]


class Acting(Merging):
    """The adapters of a model that act, those that are trained, and the switch for all of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.trained: list[str] = []
        self._resting: list[str] | None = None

    @changes
    def activate(self, names: str | Sequence[str], *, trainable: bool = True) -> None:
        """Makes exactly ``names`` active, and trainable unless told otherwise.

        What is merged is unmerged first, with a warning, where it would not be active, or not next to the weight.

        Raises:
            PeanutError: an adapter is unknown, or two have a copy of one head.
        """
        wanted = self.known(names)
        self.refuse_two_heads(wanted)
        if (merged := self.state.merged) and not self._stays_merged(wanted):
            warn(f"adapter {merged[0]!r} was merged, and is unmerged so that {wanted} can be active")
            self.unmerge()
        self.state.active, self.state.local = wanted, {}
        self._resting = None
        self.freeze(trainable=wanted if trainable else ())

    def _stays_merged(self, wanted: Sequence[str]) -> bool:
        """Whether what is merged can stay so while ``wanted`` act."""
        try:
            for _, layer in self.layers():
                layer.check_merge(self.state.merged, wanted)
        except PeanutError:
            return False
        return set(self.state.merged) <= set(wanted)

    @changes
    def enable(self, enabled: bool) -> None:
        """Lets the model compute what its base does, with all adapters frozen, until it is called with ``True``."""
        if enabled == self.state.enabled and not self.state.off:
            return
        self.state.enabled, self.state.off = enabled, set()
        if not enabled:
            self._resting = self.trained
            self.freeze(())
        else:
            self.freeze(self.trained if self._resting is None else self._resting)
            self._resting = None

    @changes
    def activate_in(self, place: Any, names: list[str], *, trainable: bool) -> None:
        """Makes exactly ``names`` active in one place; in the model, where all places then agree."""
        path = place.path
        if isinstance(place, SavedModule):
            self.refuse_two_heads(names)
        model = self.state.active, self.trained == self.state.active
        there = {each: self.state.local.get(each, model) for each in self._paths()}
        there[path] = names, trainable
        if all(own == (names, trainable) for own in there.values()):
            self.activate(names, trainable=trainable)
        else:
            if merged := self.state.merged:
                warn(f"adapter {merged[0]!r} was merged, and is unmerged so that {names} can be active at '{path}'")
                self.unmerge()
            self.state.local = {each: own for each, own in there.items() if own != model}
            self.freeze_in(place)

    def _paths(self) -> set[str]:
        """The paths of all modules with adapters."""
        found = (module.path for module in walk(self.model) if isinstance(module, (Adapted, SavedModule)))
        return {path for path in found if path != SHARED}

    @changes
    def enable_in(self, place: Any, enabled: bool) -> None:
        """Switches the adapters of one place; of the model, where all places are then on or off alike."""
        every = self._paths()
        off = set(self.state.off) if self.state.enabled else every
        off = off - {place.path} if enabled else off | {place.path}
        if off == every:
            self.enable(False)
        elif self.state.enabled:
            self.state.off = off
            self.freeze_in(place)
        else:
            self.enable(True)
            self.state.off = off
            self.freeze(self.trained)

    def trains(self, names: Collection[str], trained: bool) -> None:
        """Notes that adapters are trained, or not."""
        others = [name for name in self.trained if name not in names]
        self.trained = [*others, *(name for name in self.configs if name in names)] if trained else others

    def set_requires_grad(self, names: str | Sequence[str], trained: bool) -> None:
        """Trains or freezes adapters; which are active stays as it is."""
        wanted = self.known(names)
        self.trains(wanted, trained)
        self.freeze(self.trained)
        for place in self.places() if self.state.local else ():  # where others are active, too
            for own in (place.adapters, place.banks):
                for name in own.keys() & set(wanted):
                    own[name].requires_grad_(trained and place.path not in self.state.off)

    @changes
    def freeze(self, trainable: Sequence[str]) -> None:
        """Freezes the parameters of every adapter but those called ``trainable``."""
        self.trained = list(trainable)
        for place in self.places():
            self.freeze_in(place)
        for _, saved in self.saved_modules():
            self.freeze_in(saved)

    def freeze_in(self, module: Any) -> None:
        """Freezes what is in one place but for the adapters that are trained, all where they are switched off."""
        trainable = [*self.trained, *(expert for name in self.trained for expert in self._trained_with(name))]
        if module.path in self.state.local:
            names, trained = self.state.local[module.path]
            trainable = names if trained else []
        if module.path in self.state.off:
            trainable = []
        if isinstance(module, SavedModule):
            module.original_module.requires_grad_(False)
            for name in module.modules_to_save:
                module.modules_to_save[name].requires_grad_(name in trainable)
            return
        for own in (module.adapters, module.banks):
            for name in own:
                own[name].requires_grad_(name in trainable)

    def _trained_with(self, name: str) -> list[str]:
        """The experts that are trained when mixture ``name`` is."""
        config = self.configs[name]
        method = method_of(config.peft_type)
        trains = isinstance(method, MixtureMethod) and method.trains_experts(config)
        return experts_of(config) if trains else []


def experts_of(config: PeftConfig) -> list[str]:
    """The adapters that an adapter with ``config`` mixes."""
    method = method_of(config.peft_type)
    return list(method.experts(config)) if isinstance(method, MixtureMethod) else []
