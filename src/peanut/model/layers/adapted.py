"""``Adapted``: base class of all modules that hold and apply adapters; and a function that finds them in a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from ...errors import PeanutError
from ...protocols import PeftConfig
from .by_adapter import ByAdapter, TokenHolder
from .live import Live, initial_scale
from .parameters import Parameters
from .plain_keys import layer_keys
from .state import AdapterState

__all__ = ["Adapted", "refuse_symbolic", "walk"]


class Adapted(Live, nn.Module):
    """The tensors of the adapters that act in one place; subclasses define what they do there."""

    # copy (and before Python 3.11 pickle) asks the object, and some answer with what their base layer has: a
    # parametrised one would copy itself alone.
    __deepcopy__: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __init__(self, path: str, state: AdapterState) -> None:
        super().__init__()
        self.adapters: dict[str, Parameters] = {}
        self.banks: dict[str, Parameters] = {}
        self.path = path
        self.state = state
        self.scaling: dict[str, float] = {}
        self._methods: dict[str, tuple[Any, Any]] = {}
        self._shared: dict[str, tuple[Parameters, ...]] = {}

    def add(
        self,
        name: str,
        method: Any,
        config: PeftConfig,
        parameters: Parameters,
        shared: Parameters | None = None,
        holds: bool = False,
    ) -> None:
        """Adds an adapter that ``method`` and ``config`` (patterns resolved) describe.

        Args:
            shared: those that it shares with other places.
            holds: whether this place, the first of them, is where the model keeps them.
        """
        if shared is not None and holds:
            self.banks[name] = shared
            shared.put(self, name)
        self.adapters[name] = parameters
        parameters.put(self, name)
        self._methods[name] = (method, config)
        self.scaling[name] = initial_scale(config)
        self._shared[name] = () if shared is None else (shared,)

    def configure(self, name: str, config: PeftConfig) -> None:
        """Gives an adapter another config of its method."""
        factor = self.factor(name)
        self._methods[name] = (self._methods[name][0], config)
        self.scaling[name] = factor * initial_scale(config)

    def delete(self, name: str) -> None:
        """Removes an adapter."""
        for held in (self.adapters, self.banks):
            if name in held:
                held.pop(name).take_out(self, name)
        for kept in (self._methods, self._shared, self.scaling):  # what adding was cut off at may lack
            kept.pop(name, None)
        self.state.scales.pop((self.path, name), None)

    def acting_here(self) -> list[str]:
        """Names of the active adapters that are here."""
        return [name for name in self.state.active_at(self.path) if name in self.adapters]

    @property
    def _external_params(self) -> dict[int, nn.Parameter]:
        """What DeepSpeed's third stage gathers for a call beside the module's own parameters, by ``id``."""
        held = (*self.adapters.values(), *(shared for each in self._shared.values() for shared in each))
        own = (value for each in held for value in each)
        return {id(value): value for value in own if isinstance(value, nn.Parameter)}

    def ds_external_parameters(self) -> Iterable[tuple[int, nn.Parameter]]:
        """The same, as DeepSpeed asks for it."""
        return self._external_params.items()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with self.state.changing():  # what is cached of the tensors that were there is let go of
            layer_keys(self, state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> Any:
        """Refuses torch.nn.DataParallel: a copy of a module there would go on reading the tensors of the original.

        Raises:
            PeanutError: always.
        """
        raise PeanutError(
            f"torch.nn.DataParallel, and adapters at '{self.path}'",
            "one process for each device (DistributedDataParallel)",
            "start the script with torchrun or accelerate launch, or show it one device: CUDA_VISIBLE_DEVICES=0",
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses torch.jit.script, which would compile the code of this library.

        Raises:
            PeanutError: always.
        """
        raise PeanutError(
            f"torch.jit.script, and adapters at '{self.path}'",
            "a graph of what is computed",
            "use torch.jit.trace, torch.export or torch.compile, or script what merge_and_unload() returns",
        )

    def _get_name(self) -> str:  # lora.Linear, as Hugging Face PEFT shows it
        own = {method.name.lower() for method, _ in self._methods.values()}
        base = self._modules.get("base_layer")
        return f"{own.pop()}.{type(base).__name__}" if base is not None and len(own) == 1 else type(self).__name__

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {method.name}" for name, (method, _) in self._methods.items())


def refuse_symbolic(x: object, path: str = "") -> None:
    """Refuses torch.fx.symbolic_trace, in which tensors have no sizes.

    Raises:
        PeanutError: ``x`` stands for a tensor and is none.
    """
    if isinstance(x, torch.fx.Proxy):
        raise PeanutError(
            f"torch.fx.symbolic_trace, and adapters{path and f' at {path!r}'}",
            "a graph of what is computed",
            "use torch.export or make_fx, a Tracer in which this module is a leaf, or what merge_and_unload() returns",
        )


def walk(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of ``model`` once, in the order of ``modules()``, but for those that hold adapters' tensors.

    Loading an adapter asks some twenty times where adapters are; ``modules()`` would take half of its time.
    """
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        inside = module._modules
        if isinstance(module, Adapted):
            inside = {name: child for name, child in inside.items() if not isinstance(child, (ByAdapter, TokenHolder))}
        waiting += [child for child in reversed(inside.values()) if child is not None]
