"""``CallState``: what holds for one call of the model: adapters per sample, disabled adapters, what may be cached."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ...errors import PeanutError

__all__ = [
    "BASE",
    "EVERYWHERE",
    "PLAIN",
    "Cache",
    "CallState",
    "Context",
    "Running",
    "scattered",
    "share",
    "tensors_in",
]

BASE = "__base__"
"""The name that stands for "no adapter" among per-sample names."""


@dataclass(frozen=True)
class Running:
    """What is known of the batch that runs through the model now.

    Args:
        prompt: (batch, tokens), which of the tokens that layers see belong to the user's prompt.
        answering: whether they are generated text, of which no token belongs to the prompt.
        prefix: keys and values that attention modules are to see first, where the model's own cache does not reach
            them (under gradient checkpointing).
        gates: for each mixture, its gates by the path of a layer, as (expert, gate (batch, tokens, 1)) pairs.
    """

    prompt: Tensor | None = None
    answering: bool = False
    prefix: Any = None
    gates: dict[str, dict[str, list[tuple[str, Tensor]]]] = field(default_factory=dict)


class Cache:
    """What evaluation computes once for each layer, until the adapters change or the cache is closed."""

    def __init__(self) -> None:
        self._values: dict[int, dict[Hashable, Any]] | None = {}

    def of(self, layer: object) -> dict[Hashable, Any] | None:
        """The values of a layer, to be looked up before others are computed; ``None`` once the cache is closed."""
        values = self._values  # read once: other threads use the cache too
        return None if values is None else values.setdefault(id(layer), {})

    def clear(self) -> None:
        """Lets go of all values. What a call that runs now computes goes into the old dictionary, which nobody has."""
        self._values = None if self._values is None else {}

    def close(self) -> None:
        """Lets go of all values; a task that was begun inside the context and outlives it caches nothing any more."""
        self._values = None


_HERE: ContextVar[bool | None] = ContextVar("peanut_everywhere", default=None)


class Everywhere:
    """What evaluation computes once for each layer of any model, while that is switched on.

    By the state of a model, for each layer: what tells that its tensors were written to, and the values.
    """

    def __init__(self) -> None:
        self.used = self._always = False
        self._values: WeakKeyDictionary[Any, dict[int, tuple[Hashable, dict[Hashable, Any]]]] = WeakKeyDictionary()

    @property
    def on(self) -> bool:
        here = _HERE.get()
        return self._always if here is None else here

    def switch(self, on: bool) -> None:
        """For good, in every thread."""
        self.used, self._always = True, on
        self._values.clear()

    def switch_here(self, on: bool | None) -> bool | None:
        """In this thread or task, ``None`` as everywhere; what held before."""
        before = _HERE.get()
        self.used = True
        _HERE.set(on)
        self._values.clear()
        return before

    def of(self, layer: Any) -> dict[Hashable, Any]:
        """The values of a layer, none once its tensors have changed."""
        layers, now = self._values.setdefault(layer.state, {}), _versions(layer)
        if layers.get(id(layer), (None, {}))[0] != now:
            layers[id(layer)] = now, {}
        return layers[id(layer)][1]

    def forget(self, state: object) -> None:
        """Lets go of a model's values: it is in training."""
        self._values.pop(state, None)


def _versions(layer: Any) -> tuple[int, ...]:
    """Numbers that change when the adapters of a layer do, or what is written in its tensors."""
    own = (*layer.adapters.values(), *(shared for each in layer._shared.values() for shared in each))
    tensors = (*layer.base_layer.parameters(), *(value for parameters in own for value in parameters))
    return layer.state.version, *(0 if value.is_inference() else value._version for value in tensors)


EVERYWHERE = Everywhere()


class Context:
    """What a ``with`` of the user's says of the calls in it, in every thread and task that has it, until it is left.

    It may be left in another thread, or after one that was entered later, as generators do: it then ends there, and
    what other threads have of it says nothing any more.
    """

    def __init__(self, *, disables: bool = False, cache: Cache | None = None) -> None:
        self.disables, self.cache, self.open = disables, cache, True


@dataclass(frozen=True, eq=False)
class CallState:
    """What holds for one call of the model, in the thread (or asyncio task) that makes it.

    Args:
        active: names of the adapters that act instead of the model's active ones.
        off: whether the model computes what its base does, whatever ``contexts`` say.
        sampling: whether methods with randomness of their own draw it outside training too.
        penalising: whether penalties enter the loss that the model returns (else the caller adds them).
        samples: for each sample of the batch the one adapter that it goes through, or ``None`` if all go the same way.
        tasks: (batch,), the task of each sample, for mixtures by task.
        running: what is known of the batch that runs now.
        contexts: the user's contexts that the call is made in.
        again: whether a block runs again in the backward, under what held when it ran first.
        indices: the rows of each adapter's samples, made once for all layers.
    """

    active: list[str] | None = None
    off: bool = False
    sampling: bool = False
    penalising: bool = True
    samples: list[str] | None = None
    tasks: Tensor | None = None
    running: Running = field(default_factory=Running)
    contexts: tuple[Context, ...] = ()
    again: bool = False
    indices: dict[Any, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def disabled(self) -> bool:
        """Whether the model computes what its base does."""
        for context in self.contexts:  # not any(): every layer asks, for every token
            if context.disables and context.open:
                return True
        return self.off

    @property
    def cache(self) -> Cache | None:
        """Where evaluation may cache what it computes."""
        for context in reversed(self.contexts):
            if context.open and context.cache is not None:
                return context.cache
        return None

    @property
    def plain(self) -> bool:
        """Whether the call asks for nothing but what is set on the model."""
        return not self.disabled and self.active is None and self.samples is None and self.tasks is None


PLAIN = CallState()
"""What holds where nobody has asked for anything."""


def scattered(parts: Iterable[tuple[Tensor, Tensor]], rows: int, path: str) -> Tensor:
    """The rows of a batch put together from parts of it, each with its rows' numbers.

    Raises:
        PeanutError: the parts have different shapes.
    """
    y: Tensor | None = None
    for index, part in parts:
        y = part.new_empty(rows, *part.shape[1:]) if y is None else y
        if part.shape[1:] != y.shape[1:]:
            raise PeanutError(
                f"the adapters at '{path}' give shapes {tuple(y.shape[1:])} and {tuple(part.shape[1:])}",
                "the same shape for every sample of a batch",
                "run adapters with different heads in different batches",
            )
        y = y.index_copy(0, index, part)
    assert y is not None  # groups() has rows of the base in an empty batch
    return y


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: in lists, tuples, mappings and dataclasses."""
    waiting, seen = [output], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif is_dataclass(value):
            waiting += vars(value).values()


def share(count: int, samples: int, what: str, one: str, do: str) -> int:
    """How many of ``count`` rows belong to each of ``samples``."""
    if count % samples if samples else count:
        found = f"{what} has {samples} {one}s and a layer sees a batch of {count}"
        raise PeanutError(found, f"one {one} for each sample", do)
    return count // max(samples, 1)
