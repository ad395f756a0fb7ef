"""One call of an adapted model: adapters and tasks per sample, and whether evaluation may cache values."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import PeanutError
from ..layers.state import BASE, AdapterState, CallState
from ..prompts.replay import restore_in_checkpoints
from .adapter_set import AdapterSet

__all__ = ["Inference", "calling"]


@contextmanager
def calling(
    adapters: AdapterSet,
    samples: Sequence[str] | None = None,
    tasks: Tensor | Sequence[int] | None = None,
    rows: int | None = None,
    *,
    keep: bool = False,
) -> Iterator[None]:
    """Within the context this thread calls the model: all that is said here is for this call alone.

    Args:
        samples: for each sample of the batch the adapter that it goes through.
        rows: how many samples the user gave, if that is known.
        keep: evaluation may cache what it computes until the context is left.

    Raises:
        PeanutError: a name is unknown, adapters are merged, or there are not as many names or tasks as samples; another
            thread changes the adapters meanwhile.
    """
    state, asked = adapters.state, samples is not None or tasks is not None
    if asked:
        _check(adapters, samples, tasks, rows)
    if torch.compiler.is_compiling():
        if not asked:
            yield
            return
        with state.during(samples=_names(samples), tasks=_on_cpu(tasks)):
            yield
        return
    if adapters.model.training and torch.is_grad_enabled():
        restore_in_checkpoints(adapters.model, state)
    values = {} if keep and state.call.values is None else state.call.values
    given: dict[str, Any] = {"samples": _names(samples), "tasks": _on_cpu(tasks)} if asked else {}
    with state.unchanged(), state.during(values=values, **given):
        yield


def _check(
    adapters: AdapterSet, samples: Sequence[str] | None, tasks: Tensor | Sequence[int] | None, rows: int | None
) -> None:
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


def _names(samples: Sequence[str] | None) -> list[str] | None:
    return None if samples is None else list(samples)


def _on_cpu(tasks: Tensor | Sequence[int] | None) -> Tensor | None:
    """On the CPU, where each layer may look at them without waiting for a device."""
    return None if tasks is None else torch.as_tensor(tasks).cpu()


class Inference(AbstractContextManager["Inference"]):
    """Within the context evaluation caches what it computes from the adapters and the base.

    It may be entered again, and in several threads, which then share the cache. It is freed when the last one leaves.
    """

    def __init__(self, state: AdapterState) -> None:
        self._state = state
        self._lock, self._inside = threading.Lock(), 0
        self._values: dict[Any, Any] = {}
        self._before: dict[int, list[CallState]] = {}

    def __enter__(self) -> Inference:
        with self._lock:
            self._inside += 1
            self._before.setdefault(threading.get_ident(), []).append(self._state.call)
        self._state.call = replace(self._state.call, values=self._values)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            own = self._before[threading.get_ident()]
            self._state.call = own.pop()
            if not own:
                del self._before[threading.get_ident()]
            if not self._inside:
                self._values = {}
