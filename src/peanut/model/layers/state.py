"""Which adapters act: set for the model, or for one call of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from .calls import BASE, PLAIN, Cache, CallState, Context, share, tensors_in
from .hooks import Hooking

__all__ = ["AdapterState"]

R = TypeVar("R")


class _OfThread(threading.local):
    """A thread's call where a compiled graph finds it, as it knows no context variables; whether one put it there.

    And the versions of the adapters when the forwards of the model that the thread is in began.
    """

    def __init__(self) -> None:
        self.call = PLAIN
        self.compiled = False
        self.begun: list[int] = []
        self.scaled = False


@dataclass(frozen=True, eq=False)
class _Graph:
    """What held when a graph was made; the graph holds it, so that it lives as long."""

    plain: bool
    acting: tuple[Any, ...]


_CALLS: ContextVar[dict[AdapterState, CallState]] = ContextVar("peanut_calls", default={})  # noqa: B039 - never written to
"""The calls that are being made, by the state of the model: a thread and an asyncio task have their own."""


class AdapterState(Hooking):
    """What acts in a model; one object that all of its places share.

    What a user sets (``active``, ``merged``) lies here and holds for everyone until it is set again. What holds for
    one call lies in ``call``, which each thread has for itself.
    """

    __slots__ = (
        "__weakref__",
        "_active",
        "_changer",
        "_graphs",
        "_lock",
        "_thread",
        "caches",
        "enabled",
        "local",
        "merged",
        "off",
        "owner",
        "scales",
        "version",
    )

    def __init__(self) -> None:
        self._active: list[str] = []
        self.merged: list[str] = []
        self.enabled = True
        self.off: set[str] = set()  # paths of places that are switched off alone
        self.local: dict[str, tuple[list[str], bool]] = {}  # by path, what is active there alone, and whether trained
        self.scales: dict[tuple[str, str], float] = {}
        self.owner: weakref.ref[Any] | None = None
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

    def active_at(self, path: str) -> list[str]:
        """Names of the adapters that are active in one place."""
        return self.local[path][0] if path in self.local and self.call.active is None else self.active

    @property
    def disabled(self) -> bool:
        """Whether the model computes what its base does: in the call that is made now, or until it is enabled."""
        return not self.enabled or self.call.disabled

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

    def called(
        self, function: Callable[..., R], args: Sequence[Any], kwargs: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> R:
        """Calls a function of the model with other values of some fields of ``CallState``.

        It is one function without a context manager: what a call costs is felt where a model generates.

        Raises:
            PeanutError: another thread has changed the adapters: the call may have seen some of both.
        """
        before, version = self.call, self._version_at_rest()
        if changes:
            self.call = replace(before, **{"indices": {}, **changes})
        try:
            answer = function(*args, **kwargs)
        except Exception as error:
            self._check_version(version, error)
            raise
        finally:
            if self.call is not before:  # a hook may have been broken off, too
                self.call = before
        self._check_version(version, None)
        return answer

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook before the model's forward, however it is called."""
        if not torch.compiler.is_compiling():
            del self._thread.begun[:-16]  # those of forwards that were broken off
            self._thread.begun.append(self._version_at_rest())

    def end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook after it: refuses what was computed while another thread changed the adapters; remembers the graph."""
        if torch.compiler.is_compiling():
            return
        if self._thread.begun:  # a compiled graph may have begun the forward
            self._check_version(self._thread.begun.pop(), None)
        if torch.is_grad_enabled():
            graph = _Graph(self.call.plain and not self._thread.scaled, self.acting_now())
            self._thread.scaled = False
            for value in tensors_in(output):
                node: Any = value.grad_fn
                if node is not None:
                    node.metadata[self] = graph
                    with self._lock:
                        self._graphs.add(graph)

    def acting_now(self) -> tuple[Any, ...]:
        """What a block that is run again has to find as it was: which adapters are active, merged, enabled, scaled."""
        own = tuple(sorted(self.off)), tuple((path, *names) for path, (names, _) in self.local.items())
        return tuple(self._active), tuple(self.merged), self.enabled, own, tuple(self.scales.items())

    def scale(self, path: str, name: str, scale: float | None) -> None:
        """Notes what scale an adapter has in a place, ``None`` for the first one; also that a forward changes it."""
        self.scales.pop((path, name), None)
        if scale is not None:
            self.scales[path, name] = scale
        self._thread.scaled = bool(self._thread.begun)  # diffusers' do, for the one forward

    def _version_at_rest(self) -> int:
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
            now = self.acting_now()
            known = call.plain and all(then.plain and then.acting == now for then in self._graphs)
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
            with self._lock:
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
        each = share(count, len(samples), "adapter_names", "name", f"give one name a sample ({BASE!r} for none)")
        rows: dict[str, list[int]] = {} if samples else {BASE: []}  # of an empty batch
        for index, name in enumerate(samples):
            rows.setdefault(name, []).extend(range(index * each, (index + 1) * each))
        call.indices[key] = {name: torch.tensor(own, dtype=torch.long, device=device) for name, own in rows.items()}
        return call.indices[key]

    def tasks_of(self, count: int) -> Tensor | None:
        """The task of each row of a batch of ``count``, or ``None`` if no tasks are given."""
        tasks = self.call.tasks
        if tasks is None:
            return None
        tasks = tasks.reshape(-1)
        each = share(count, len(tasks), "task_ids", "task", "give one task a sample")
        return tasks if each == 1 else torch.repeat_interleave(tasks, each)

    def __getstate__(self) -> tuple[Any, ...]:
        """Copies and files take along what holds in the model, and no call."""
        return self._active, self.merged, self.enabled, self.off, self.local, self.scales

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__()  # type: ignore[misc]
        self._active, self.merged, self.enabled, self.off, self.local, self.scales = state
