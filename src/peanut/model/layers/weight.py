"""``AdaptedWeight``: the weight that adapters make of a layer's, as other modules read it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...protocols import Change
from ...stack import in_a_forward
from .calls import CallState
from .changed import ChangedWeight
from .reading import Reading

__all__ = ["AdaptedWeight"]


class AdaptedWeight(ChangedWeight):
    """A frozen layer whose ``weight`` and ``bias``, read by another module in a forward, are W' and b'."""

    _told_undropped = False

    @property
    def weight(self) -> Any:
        """As the layer's: properties, since torch.compile finds those of the class that ``__class__`` answers."""
        return self.__getattr__("weight")

    @property
    def bias(self) -> Any:
        return self.__getattr__("bias")

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("_modules", {}).get(name)
        if module is not None:  # nine times in a forward, and torch takes longer
            return module
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return self._read(self.reads[name]) if name in self.reads else self._fallen(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            plain = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            if plain and name in self.base_layer._parameters:
                raise PeanutError(
                    f"a tensor in the place of the {name} of '{self.path}', which adapters change",
                    f"one in the place of base_layer.{name}, which they then change",
                    f"give torch.func.functional_call 'base_layer.{name}'",
                )
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _read(self, name: str) -> Any:
        """The layer's weight or bias; where another module reads it in its forward, W' or b'."""
        compiled = torch.compiler.is_compiling()
        if not (compiled or in_a_forward()):
            return getattr(self.frozen.module, name)
        if name == "bias" or compiled or self.disable_adapters or not self._read_with(self.state.call):
            return self._effective(name)
        return Reading(self.frozen.module.weight, partial(self._effective, name), self.path)

    def _effective(self, name: str) -> Any:
        """The weight or bias that the layer has in the call that is made now."""
        call = self.state.call
        self.state.check(call)
        if self.disable_adapters:
            return self.frozen.weight if name == "weight" else self.frozen.bias()
        names = self._read_with(call)
        if not names:
            return getattr(self.frozen.module, name)
        if name == "weight":
            return self._weight(call, names)
        return self._combined(call, names, sample=False).offset(self.frozen.bias())  # no method draws a bias

    def _read_with(self, call: CallState) -> list[str]:
        """The adapters that change what is read; none where all of them are merged."""
        experts = {each for gates in call.running.gates.values() for each, _ in gates.get(self.path, [])}
        names = [each for each in (*self.state.acting(), *experts) if each in self.adapters]
        return [] if self.written.keys() >= set(names) else names

    def _weight(self, call: CallState, names: Sequence[str]) -> Tensor:
        """W', as the layer stores it."""
        change, kind = self._combined(call, names, sample=self.training or call.sampling), self.frozen.kind
        if kind.quantised:
            raise self._unread("it is quantised: its weight is codes")
        return kind.layout(self.frozen.module, self._written(change, self._wide_matrix())).to(self.frozen.weight.dtype)

    def _combined(self, call: CallState, names: Sequence[str], *, sample: bool) -> Change:
        """What the adapters ``names`` make of the layer, whatever its input.

        Raises:
            PeanutError: they do not make the same of all of its input.
        """
        mixes = call.tasks is not None and any(self.method_of(name)[0].mixes for name in names)
        if call.samples is not None or call.running.gates or mixes:
            raise self._unread("adapters that differ between the samples or tokens of a batch act there")
        changes = [self.change(name, sample=sample) for name in names]
        drops = sample and self.training and self.frozen.kind.takes_activations
        if drops and any(change.dropout for change in changes) and not self._told_undropped:
            _warn_undropped(self.path)  # a compiled graph cannot tell who asks for a dtype only
            if not torch.compiler.is_compiling():
                self._told_undropped = True
        return Change.together(changes)

    def _unread(self, why: str) -> PeanutError:
        return PeanutError(
            f"a module or hook reads the weight of '{self.path}' in a forward, and {why}",
            "a layer that is called and not read",
            "read base_layer.weight for the base's own, or leave the layer out of target_modules (exclude_modules)",
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # it runs when the graph is made
def _warn_undropped(path: str) -> None:
    warnings.warn(
        f"a module or hook reads the weight of '{path}' in training; if an output is computed with it, and not by "
        "calling the layer, the dropout of the adapters there is not applied: leave the layer out of target_modules, "
        "or set the dropout to 0",
        stacklevel=2,
    )
