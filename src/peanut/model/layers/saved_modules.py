"""``SavedModule``: modules that are trained whole beside the adapter, such as a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...errors import PeanutError
from ...stack import in_a_forward
from ...weights.emptied import whole
from ...weights.stored import copied, onload
from .by_adapter import ByAdapter
from .calls import scattered
from .hooks import input_of
from .live import Switched
from .reading import Reading
from .state import AdapterState

__all__ = ["SavedModule"]


class SavedModule(Switched, nn.Module):
    """A module of the base and, for each adapter that trains it, a copy; the active adapter's copy runs.

    A copy is trained, so it is stored in float32 at least; on a half-precision base its inputs are cast up, and its
    outputs back.
    """

    def __init__(self, original_module: nn.Module, path: str, state: AdapterState) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save: ByAdapter = ByAdapter()
        self.path = path
        self.state = state

    def add(self, name: str, *, wide: bool = True, memo: dict[int, Any] | None = None) -> None:
        """Gives adapter ``name`` a copy of the module as it is in the base.

        Args:
            wide: store the copy in float32 at least.
            memo: what has been copied for the same adapter already: what was tied stays so.
        """
        with whole([*self.original_module.parameters()]):
            own = copied(self.original_module, memo)
        dtype = _dtype(own)
        if wide and dtype is not None:
            own = own.to(torch.promote_types(dtype, torch.float32))
        self.modules_to_save[name] = own.requires_grad_(True)

    def counterparts(self) -> tuple[tuple[str, str], ...]:
        return (("peft.utils.other", "ModulesToSaveWrapper"),)

    other_param_names: tuple[str, ...] = ()

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters that have a copy here."""
        return [name for name in self.state.active_at(self.path) if name in self.modules_to_save]

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        return ("modules_to_save",)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The tensors of an adapter's copy: the key that a file has for each after this module's, and that in here."""
        copy: nn.Module | None = self.modules_to_save._modules.get(adapter_name)
        keys = () if copy is None else copy.state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in keys}

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains or freezes the copies of these adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name in names:
            if name in self.modules_to_save:
                self.modules_to_save[name].requires_grad_(requires_grad)
        self.owner.trains(names, requires_grad)

    def delete(self, name: str) -> None:
        """Removes an adapter's copy."""
        del self.modules_to_save[name]

    def acting(self) -> nn.Module:
        """The module that runs now."""
        names = [name for name in self.state.active_at(self.path) if name in self.modules_to_save]
        if self.disable_adapters or not names:
            return self.original_module
        own: nn.Module = self.modules_to_save[names[0]]
        if any(parameter.is_meta for parameter in own.parameters()):
            onload(own)  # what is trained is not offloaded with the base
        return own

    def adopted(self) -> nn.Module:
        """The module that runs now, in the base's own dtype."""
        dtype = _dtype(self.original_module)
        return self.acting() if dtype is None else self.acting().to(dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or self.state.call.samples is None:
            return self._answer(self.acting(), *args, **kwargs)
        return self._forward_per_sample(*args, **kwargs)

    def _forward_per_sample(self, *given: Any, **named: Any) -> Tensor:
        """Each sample's rows through its own adapter's copy, and with them those of the other tensors of the batch."""
        copies: dict[str, Any] = self.modules_to_save._modules
        x, args, kwargs = input_of(self.original_module, given, named)

        def answer(module: nn.Module, index: Tensor) -> Any:
            rows = partial(_rows, index=index, count=len(x), module=module, path=self.path)
            own_args, own_kwargs = tree_map(rows, (args, kwargs))
            return self._answer(module, x[index], *own_args, **own_kwargs)

        parts = (
            (index, answer(copies.get(name, self.original_module), index))
            for name, index in self.state.groups(x.shape[0], x.device).items()
        )
        return scattered(parts, len(x), self.path)

    def _differs(self) -> Tensor:
        raise PeanutError(
            f"a module reads what belongs to '{self.path}', which is trained whole and differs between the samples",
            "a module that is called",
            "give all samples of a batch one adapter",
        )

    def _answer(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of ``module`` for inputs of the base's dtype, in the base's dtype."""
        base, own = _dtype(self.original_module), _dtype(module)
        if base is None or own is None or base == own:
            return module(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(lambda value: _cast(value, base, own), (args, kwargs))
        return tree_map(lambda value: _cast(value, own, base), module(*wide_args, **wide_kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save") or name.startswith("__"):  # how this is copied
                raise
            found = getattr(self.acting(), name)
            apart = isinstance(found, nn.Parameter) and self.state.call.samples is not None and in_a_forward()
            return Reading(found, self._differs, self.path) if apart else found


def _dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first floating-point parameter."""
    return next((value.dtype for value in module.parameters() if value.is_floating_point()), None)


def _rows(value: Any, index: Tensor, count: int, module: nn.Module, path: str) -> Any:
    """The rows of a tensor that has one for each of ``count`` samples.

    Raises:
        PeanutError: it may as well have one for each of the module's outputs, say.
    """
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != count:
        return value
    if value.dim() == 1 and any(len(own) == count for own in module.parameters()):
        raise PeanutError(
            f"'{path}' is given {count} numbers beside a batch of {count} samples, which differ in their adapters",
            "tensors of which one can tell whether they belong to the samples",
            "give all samples of a batch one adapter",
        )
    return value[index.to(value.device)]


def _cast(value: Any, found: torch.dtype, wanted: torch.dtype) -> Any:
    return value.to(wanted) if isinstance(value, Tensor) and value.dtype == found else value
