"""Which adapters act: set for the model, or for one call of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from .hooks import Hooking

__all__ = ["BASE", "AdapterState", "Cache", "CallState", "Context", "Running", "scattered"]

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
        return self.off or any(context.disables and context.open for context in self.contexts)

    @property
    def cache(self) -> Cache | None:
        """Where evaluation may cache what it computes."""
        return next((each.cache for each in reversed(self.contexts) if each.open and each.cache is not None), None)

    def lasting(self) -> CallState:
        """The same call, also after the user has left a context in which adapters are disabled."""
        return replace(self, off=self.disabled)

    @property
    def plain(self) -> bool:
        """Whether the call asks for nothing but what is set on the model."""
        return not self.disabled and self.active is None and self.samples is None and self.tasks is None


class _OfThread(threading.local):
    """A thread's call where a compiled graph finds it, as it knows no context variables; whether one put it there.

    And the version of the adapters when the thread's last forward of the model began.
    """

    def __init__(self) -> None:
        self.call = PLAIN
        self.compiled = False
        self.begun = 0


@dataclass(frozen=True, eq=False)
class _Graph:
    """Under what a graph was made; the graph holds it, so that it lives as long."""

    call: CallState
    version: int


PLAIN = CallState()
_CALLS: ContextVar[dict[AdapterState, CallState]] = ContextVar("peanut_calls", default={})  # noqa: B039 - never written to
"""The calls that are being made, by the state of the model: a thread and an asyncio task have their own."""


class AdapterState(Hooking):
    """What acts in a model; one object that all of its places share.

    What a user sets (``active``, ``merged``) lies here and holds for everyone until it is set again. What holds for
    one call lies in ``call``, which each thread has for itself.
    """

    __slots__ = ("_active", "_changer", "_graphs", "_lock", "_thread", "caches", "merged", "version")

    def __init__(self) -> None:
        self._active: list[str] = []
        self.merged: list[str] = []
        self.version = 0
        self._lock, self._changer = threading.RLock(), (0, 0)  # a thread, and how often it has begun a change
        self._thread = _OfThread()
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self.caches: weakref.WeakSet[Cache] = weakref.WeakSet()

    # What holds in the model

    @property
    def active(self) -> list[str]:
        """Names of the active adapters; their changes add."""
        own = self.call.active
        return self._active if own is None else own

    @active.setter
    def active(self, names: list[str]) -> None:
        self._active = names

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within the context this thread changes the adapters; a call of another thread that overlaps is an error."""
        with self._lock:
            outermost = self._changer[1] == 0
            self._changer = (threading.get_ident(), self._changer[1] + 1)
            self.version += outermost
            try:
                yield
            finally:
                for cache in list(self.caches):
                    cache.clear()
                self.version += outermost
                self._changer = (threading.get_ident(), self._changer[1] - 1)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Within the context the adapters stay what they are; a change that another thread has begun is waited for.

        Raises:
            PeanutError: another thread has changed the adapters: what was computed may be part before and part after.
        """
        version = self._settled()
        try:
            yield
        except Exception as error:
            self._check_version(version, error)
            raise
        self._check_version(version, None)

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook before the model's forward, however it is called."""
        if not torch.compiler.is_compiling():
            self._thread.begun = self._settled()

    def end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook after it: refuses what was computed while another thread changed the adapters; remembers the graph."""
        if torch.compiler.is_compiling():
            return
        self._check_version(self._thread.begun, None)
        if torch.is_grad_enabled():
            graph = _Graph(self.call.lasting(), self.version)
            for value in _tensors(output):
                node: Any = value.grad_fn
                if node is not None:
                    node.metadata[self] = graph
                    with self._lock:
                        self._graphs.add(graph)

    def _settled(self) -> int:
        """The version of the adapters, once a change that another thread has begun is done."""
        if self.version % 2:
            with self._lock:
                pass
        return self.version

    def _check_version(self, before: int, error: Exception | None) -> None:
        if self.version != before and self._changer[0] != threading.get_ident():
            self._refuse_change(error)

    def _refuse_change(self, error: Exception | None = None) -> NoReturn:
        raise PeanutError(
            "another thread changed the model's adapters (added, loaded, activated or merged one) during this call",
            "adapters that stay what they are during a call",
            "call again, or keep calls and changes apart with a lock",
        ) from error

    def check(self, call: CallState) -> None:
        """Refuses a layer's forward under a state that may not be the one that it is to have.

        Raises:
            PeanutError: another thread is changing the adapters; or the block runs again in a backward, and it is not
                known under which call it ran first.
        """
        if torch.compiler.is_compiling():
            return
        if self.version % 2 and self._changer[0] != threading.get_ident():
            self._refuse_change()
        if torch._C._current_graph_task_id() == -1 or call.again:
            return
        with self._lock:
            known = call.plain and all(then.call.plain and then.version == self.version for then in self._graphs)
        if not known:
            raise PeanutError(
                "a block is run again in a backward, and a call was under others than the adapters that act now "
                "(adapter_names, task_ids, a disabled adapter, other active ones)",
                "gradient checkpointing that restores the call: model.gradient_checkpointing_enable() of transformers",
                "use that instead of a torch.utils.checkpoint of your own",
            )

    # What holds in a call

    @property
    def call(self) -> CallState:
        """The state of the call that this thread makes now."""
        if torch.compiler.is_compiling() or self._thread.compiled:
            return self._thread.call
        return _CALLS.get().get(self, PLAIN)

    @call.setter
    def call(self, call: CallState) -> None:
        self._thread.call = call
        if torch.compiler.is_compiling():
            self._thread.compiled = call is not PLAIN
            return
        self._thread.compiled = False
        others = {key: other for key, other in _CALLS.get().items() if key is not self}
        _CALLS.set(others if call is PLAIN else {**others, self: call})

    def enter(self, context: Context) -> None:
        """From now on this thread's calls are made in ``context``."""
        if context.cache is not None:
            self.caches.add(context.cache)
        call = self.call
        self.call = replace(call, contexts=(*(each for each in call.contexts if each.open), context))

    def leave(self, context: Context) -> None:
        """Ends a context everywhere."""
        context.open, call = False, self.call
        if context in call.contexts:
            call = replace(call, contexts=tuple(each for each in call.contexts if each is not context))
            others = vars(PLAIN).keys() - {"indices", "contexts"}
            bare = not call.contexts and all(getattr(call, name) is getattr(PLAIN, name) for name in others)
            self.call = PLAIN if bare else call

    @contextmanager
    def under(self, call: CallState) -> Iterator[CallState]:
        """Within the context ``call`` holds in this thread."""
        before, self.call = self.call, call
        try:
            yield call
        finally:
            self.call = before

    def during(self, **changes: Any) -> AbstractContextManager[CallState]:
        """Within the context this thread's call has the fields of ``CallState`` that are given."""
        return self.under(replace(self.call, **{"indices": {}, **changes}))

    def acting(self) -> list[str]:
        """Names of the adapters that act on some sample of the batch now."""
        samples = self.call.samples
        return self.active if samples is None else [name for name in dict.fromkeys(samples) if name != BASE]

    def groups(self, count: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The rows of a batch of ``count`` by adapter, made once in a call for all layers that see the same batch.

        A layer may see more rows than there are samples (beams, flattened tokens): each sample then owns a run of them.

        Raises:
            PeanutError: the rows are no multiple of the samples.
        """
        call = self.call
        samples, key = call.samples or [], (tuple(call.samples or ()), count, device)
        if key in call.indices and not torch.compiler.is_compiling():
            return call.indices[key]
        share = _share(count, len(samples), "adapter_names", "name", f"give one name a sample ({BASE!r} for none)")
        rows: dict[str, list[int]] = {}
        for index, name in enumerate(samples):
            rows.setdefault(name, []).extend(range(index * share, (index + 1) * share))
        call.indices[key] = {name: torch.tensor(own, device=device) for name, own in rows.items()}
        return call.indices[key]

    def tasks_of(self, count: int) -> Tensor | None:
        """The task of each row of a batch of ``count``, or ``None`` if no tasks are given."""
        tasks = self.call.tasks
        if tasks is None:
            return None
        tasks = tasks.reshape(-1)
        share = _share(count, len(tasks), "task_ids", "task", "give one task a sample")
        return tasks if share == 1 else torch.repeat_interleave(tasks, share)

    def __getstate__(self) -> tuple[list[str], list[str]]:
        """Copies and files take along what holds in the model, and no call."""
        return self._active, self.merged

    def __setstate__(self, state: tuple[list[str], list[str]]) -> None:
        self.__init__()  # type: ignore[misc]
        self._active, self.merged = state


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, of whatever class it is."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (found for value in output.values() for found in _tensors(value))
    elif isinstance(output, (list, tuple)):
        yield from (found for value in output for found in _tensors(value))
    elif hasattr(output, "__dict__"):
        yield from _tensors(vars(output))


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
    assert y is not None  # groups() raises on an empty batch
    return y


def _share(count: int, samples: int, what: str, one: str, do: str) -> int:
    """How many of ``count`` rows belong to each of ``samples``."""
    if not samples or count % samples:
        raise PeanutError(
            f"{what} has {samples} {one}s and a layer sees a batch of {count}", f"one {one} for each sample", do
        )
    return count // samples
