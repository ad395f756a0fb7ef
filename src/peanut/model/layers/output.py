"""``AdaptedOutput``: applies adapters to the output of a module, by forward hooks."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...protocols import Call, OutputMethod, PeftConfig
from ...weights import kind_of
from .adapted import Adapted
from .calls import BASE
from .hooks import Hooking, names_of
from .parameters import Parameters
from .state import AdapterState

__all__ = ["AdaptedOutput", "Listener"]


class Listener(Hooking):
    """Saves the input of a module until another one, later in the same block, has run.

    Args:
        source: the path of the module.
        path: that of the other one.
    """

    def __init__(self, source: str, path: str) -> None:
        self.source = source
        self.path = path
        self._of_thread = threading.local()

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before ``source``."""
        self._of_thread.seen = _tensor_of(self.source, args[0] if args else None, kwargs)

    def heard(self) -> Tensor:
        """The saved input."""
        seen: Tensor | None = getattr(self._of_thread, "seen", None)
        if seen is None:
            raise PeanutError(
                f"'{self.path}' answered before '{self.source}' was called", "a block that runs both in this order"
            )
        return seen

    def forget(self) -> None:
        """Discards the saved input."""
        self._of_thread.seen = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class AdaptedOutput(Adapted, Hooking):
    """The adapters that change the output of one module, y' = adapt(x, y), one after the other as they were activated.

    It is a child of the module, so that it moves and trains with it, and acts by hooks on it.
    """

    called = told = False

    def __init__(self, module: nn.Module, path: str, state: AdapterState) -> None:
        super().__init__(path, state)
        self.listeners: dict[str, Listener] = {}
        self._listener_of: dict[str, Listener | None] = {}
        self._names = names_of(module)
        kind = kind_of(module)
        self._kind = None if kind is None else kind.name

    def put(
        self,
        name: str,
        method: OutputMethod[Any],
        config: PeftConfig,
        parameters: Parameters,
        listener: Listener | None,
    ) -> None:
        """Adds an adapter that reads x where ``listener`` hears it, ``None`` for what the module itself is given."""
        self.add(name, method, config, parameters)
        self._listener_of[name] = listener

    def delete(self, name: str) -> None:
        super().delete(name)
        del self._listener_of[name]

    def change(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook after the module: its output, changed by the adapters that act."""
        self.called = True
        changed = None if self.disable_adapters else self._changed(module, args, kwargs, output)
        for listener in self.listeners.values():
            listener.forget()
        return changed

    def missed(self, around: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook after the module that holds this one: says once if that has never called it."""
        # It stays, as another thread may be about to call it.
        if self.called or self.told or torch.compiler.is_compiling():
            return
        if not self.disable_adapters and self.acting_here():
            self.told = True
            warnings.warn(
                f"a {type(around).__name__} ran and did not call '{self.path}' (it may read its weight, or call its "
                "forward): an adapter that changes what is answered did nothing there; name modules that are called, "
                "or use a method that changes weights",
                stacklevel=2,
            )

    def _changed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(y, Tensor):
            raise PeanutError(
                f"'{self.path}' answered with {type(y).__name__}",
                "a module that answers with a tensor, or with a tuple that begins with one",
                "name a module inside it",
            )
        acting = self._acting(y.shape[0])
        if not acting:
            return None
        call = self._call(module, args, kwargs, y)
        given, answer = _tensor_of(self.path, args[0] if args else None, kwargs), y
        for name, rows in acting:
            method, config = self.method_of(name)
            listener = self._listener_of[name]
            x = given if listener is None else listener.heard()
            changed = method.adapt(config, self.values(name), x, y, call)
            if method.changes_input(config, self._kind):
                given = _where(rows, changed.to(given.dtype), given)
                before, answer = answer, module.forward(given)
                y = answer if y is before else y + (answer - before)
            else:
                y = _where(rows, changed.to(y.dtype), y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _acting(self, count: int) -> list[tuple[str, Tensor | None]]:
        """The adapters that act, each with which of ``count`` rows go through it, ``None`` for all."""
        answering = self.state.call.running.answering
        if self.state.call.samples is None:
            there = self.acting_here()
            return [(name, None) for name in there if not (answering and self.method_of(name)[0].reads_prompt)]
        found: list[tuple[str, Tensor | None]] = []
        for name, rows in self.state.groups(count).items():
            if name == BASE or name not in self.adapters or (answering and self.method_of(name)[0].reads_prompt):
                continue
            mask = torch.zeros(count, dtype=torch.bool)
            mask[rows] = True
            found.append((name, mask))
        return found

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Call:
        state, rows = self.state, y.shape[0]
        arguments = dict(zip(self._names, args, strict=False)) | kwargs

        def apart(layer: nn.Module, vectors: Tensor) -> Tensor:
            given = vectors[None].to(y.dtype)
            if state.call.samples is not None or state.call.tasks is not None:
                given = given.repeat(rows, 1, 1)
            if not state.call.running.gates:
                return layer.forward(given)  # type: ignore[no-any-return]
            with state.during(running=replace(state.call.running, gates={})):
                return layer.forward(given)  # type: ignore[no-any-return]

        return Call(module, arguments, state.call.running.prompt, self.training, self._kind, apart)


def _where(rows: Tensor | None, changed: Tensor, kept: Tensor) -> Tensor:
    """Some rows of a batch changed, ``None`` for all, the others unchanged bit for bit."""
    if rows is None:
        return changed
    return torch.where(rows.to(kept.device).view(-1, *[1] * (kept.dim() - 1)), changed, kept)


def _tensor_of(path: str, first: Any, kwargs: dict[str, Any]) -> Tensor:
    """The activations among a module's arguments: the first of them, or those called ``hidden_states``."""
    given = kwargs.get("hidden_states", next(iter(kwargs.values()), None)) if first is None else first
    if not isinstance(given, Tensor):
        raise PeanutError(f"'{path}' was called without a tensor", "a module that is given hidden states")
    return given
