"""One call of an adapted model: adapters and tasks per sample, and whether evaluation may cache values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import PeanutError
from ...weights.stored import check_by_layer
from ..layers.calls import BASE, Cache, Context
from ..layers.state import AdapterState
from ..prompts.replay import restore_in_checkpoints
from .adapter_set import AdapterSet

__all__ = ["Inference", "called"]

R = TypeVar("R")


def called(
    adapters: AdapterSet,
    function: Callable[..., R],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    samples: Sequence[str] | None = None,
    tasks: Tensor | Sequence[int] | None = None,
    *,
    keep: bool = False,
) -> R:
    """Calls a function of the model; what is given here holds for this call, in this thread alone.

    Args:
        adapters: the model's adapters.
        function: the model, or its ``generate``.
        args, kwargs: what it is given.
        samples: for each sample of the batch the adapter that it goes through.
        tasks: for each sample its task.
        keep: evaluation may cache what it computes until the function returns.

    Raises:
        PeanutError: a name is unknown, adapters are merged, or there are not as many names or tasks as samples; another
            thread changes the adapters meanwhile; or names are given within ``torch.jit.trace``.
    """
    state = adapters.state
    changes: dict[str, Any] = {}
    if samples is not None or tasks is not None:
        changes["samples"] = None if samples is None else list(samples)
        # On the CPU each layer may look at the tasks without waiting for a device.
        changes["tasks"] = None if tasks is None else torch.as_tensor(tasks).cpu()
        function = partial(_checked, adapters, function, samples, tasks)
    if torch.compiler.is_compiling():
        with state.during(**changes) if changes else nullcontext():
            return function(*args, **kwargs)
    if torch._C._is_tracing() and not (samples is None and (tasks is None or isinstance(tasks, Tensor))):
        raise PeanutError(
            "adapter_names or a list of task_ids within torch.jit.trace, which would keep them for other batches",
            "one adapter for all samples",
            "call set_adapter before tracing, or use torch.compile",
        )
    if torch.is_grad_enabled() and adapters.model.training:
        _refuse_offloaded_parameters(adapters)
        restore_in_checkpoints(adapters.model, state)
    if state.disabled:
        changes["off"] = True  # also if a generator leaves the context meanwhile
    if keep and state.call.cache is None:
        with Inference(state):
            return state.called(function, args, kwargs, changes)
    return state.called(function, args, kwargs, changes)


def _refuse_offloaded_parameters(adapters: AdapterSet) -> None:
    """Refuses to train what a hook of accelerate takes out of the model after each forward: no step would reach it."""
    place = next(adapters.places(), None)
    if place is not None and any(value.is_meta for own in place.adapters.values() for value in own):
        check_by_layer(adapters.model)


def _checked(
    adapters: AdapterSet,
    function: Callable[..., R],
    samples: Sequence[str] | None,
    tasks: Tensor | Sequence[int] | None,
    /,
    *args: Any,
    **kwargs: Any,
) -> R:
    """Calls the function, once names and tasks fit: within the call, where a change by another thread is noticed."""
    rows = _rows(args, kwargs)
    # Layers may see a multiple of the samples (beams), so they do not notice every wrong number.
    for what, of, given in (("adapter_names", "name", samples), ("task_ids", "task", tasks)):
        if given is not None and rows is not None and len(given) != rows:
            raise PeanutError(
                f"{what} has {len(given)} {of}s and a layer sees a batch of {rows}",
                f"one {of} for each sample",
                f"give one {of} a sample",
            )
    if samples is not None:
        adapters.known([name for name in samples if name != BASE])
        if adapters.state.merged:
            raise PeanutError(
                f"adapter_names given while {adapters.state.merged[0]!r} is merged",
                "an unmerged model",
                "call unmerge_adapter() first",
            )
    return function(*args, **kwargs)


def _rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many samples a model is called with, if the call tells."""
    names = ("input_ids", "inputs", "inputs_embeds")
    given = next((kwargs[name] for name in names if kwargs.get(name) is not None), args[0] if args else None)
    return len(given) if isinstance(given, Tensor) and given.dim() else None


class Inference(AbstractContextManager["Inference"]):
    """Within the context evaluation caches what it computes from the adapters and the base.

    It may be entered again, and in several threads, which then share the cache. It is closed when the last one leaves.
    """

    def __init__(self, state: AdapterState) -> None:
        self._state, self._lock = state, threading.Lock()
        self._entered: list[Context] = []
        self._cache = Cache()

    def __enter__(self) -> Inference:
        with self._lock:
            self._cache = self._cache if self._entered else Cache()
            self._entered.append(Context(cache=self._cache))
            self._state.enter(self._entered[-1])
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if not self._entered:  # it was left already
                return
            own = [context for context in self._state.call.contexts if context in self._entered]
            # Left in another thread than entered: nobody knows which entry is meant, so all end; that is only slower.
            for context in own[-1:] or list(self._entered):
                self._entered.remove(context)
                self._state.leave(context)
            if not self._entered:
                self._cache.close()
