"""Which adapters act: set for the model, or for one call of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...errors import PeanutError

__all__ = ["BASE", "AdapterState", "CallState", "Running"]

R = TypeVar("R")

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


@dataclass(frozen=True, eq=False)
class CallState:
    """What holds for one call of the model, in the thread (or asyncio task) that makes it.

    Args:
        active: names of the adapters that act instead of the model's active ones.
        disabled: whether the model computes what its base does.
        sampling: whether methods with randomness of their own draw it outside training too.
        penalising: whether penalties enter the loss that the model returns (else the caller adds them).
        samples: for each sample of the batch the one adapter that it goes through, or ``None`` if all go the same way.
        tasks: (batch,), the task of each sample, for mixtures by task.
        running: what is known of the batch that runs now.
        values: cache of evaluation until its context is left, by owner; ``None`` to cache nothing.
        again: whether a block runs again in the backward, under the state of its first run.
        indices: the rows of each adapter's samples, made once for all layers.
    """

    active: list[str] | None = None
    disabled: bool = False
    sampling: bool = False
    penalising: bool = True
    samples: list[str] | None = None
    tasks: Tensor | None = None
    running: Running = field(default_factory=Running)
    values: dict[Any, Any] | None = None
    again: bool = False
    indices: dict[Any, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether the call asks for nothing but what is set on the model."""
        return not self.disabled and self.active is None and self.samples is None and self.tasks is None


class _OfThread(threading.local):
    """A thread's call for compiled graphs, which cannot read context variables; and whether one has set it."""

    def __init__(self) -> None:
        self.call = PLAIN
        self.compiled = False


PLAIN = CallState()
_CALLS: ContextVar[dict[int, CallState]] = ContextVar("peanut_calls", default={})  # noqa: B039 - never written to
"""The calls that are being made, by the identity of the model's state: a thread and an asyncio task have their own."""


class AdapterState:
    """What acts in a model; one object that all of its places share.

    What a user sets (``active``, ``merged``) lies here and holds for everyone until it is set again. What holds for
    one call lies in ``call``, which each thread has for itself.
    """

    __slots__ = ("_active", "_changer", "_graphs", "_lock", "_thread", "merged", "version")

    def __init__(self) -> None:
        self._active: list[str] = []
        self.merged: list[str] = []
        self.version = 0
        self._lock, self._changer = threading.RLock(), (0, 0)  # a thread, and how often it has begun a change
        self._thread = _OfThread()
        self._graphs: weakref.WeakKeyDictionary[CallState, int] = weakref.WeakKeyDictionary()

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
                self.version += outermost
                self._changer = (threading.get_ident(), self._changer[1] - 1)

    def called(
        self, function: Callable[..., R], args: Sequence[Any], kwargs: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> R:
        """Calls a function of the model under other values of some fields of ``CallState``.

        Raises:
            PeanutError: another thread has changed the adapters: the call may have seen some of both.
        """
        before = self.call
        if self.version % 2:  # a change that another thread has begun is waited for
            with self._lock:
                pass
        version = self.version
        if changes or torch.is_grad_enabled():  # a graph remembers a call of its own
            self.call = replace(before, **{"indices": {}, **changes})
        try:
            answer = function(*args, **kwargs)
            if torch.is_grad_enabled():
                self._remember(answer)
        except Exception as error:
            self._check_version(version, error)
            raise
        finally:
            if self.call is not before:  # a hook may have been broken off, too
                self.call = before
        self._check_version(version, None)
        return answer

    def _check_version(self, before: int, error: Exception | None) -> None:
        if self.version != before and self._changer[0] != threading.get_ident():
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
        if self.version % 2:
            self._check_version(-1, None)
        if torch._C._current_graph_task_id() == -1 or call.again:
            return
        with self._lock:
            known = call.plain and all(then.plain and at == self.version for then, at in self._graphs.items())
        if not known:
            raise PeanutError(
                "a block is run again in a backward, and a call was under others than the adapters that act now "
                "(adapter_names, task_ids, a disabled adapter, other active ones)",
                "gradient checkpointing that restores the call: model.gradient_checkpointing_enable() of transformers",
                "use that instead of a torch.utils.checkpoint of your own",
            )

    def _remember(self, output: Any) -> None:
        """Remembers the call that ends with ``output`` as long as the graph that it has made."""
        call = self.call
        for value in tree_leaves(dict(output) if isinstance(output, dict) else output):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                node: Any = value.grad_fn
                node.metadata[self] = call
                with self._lock:
                    self._graphs[call] = self.version

    # What holds in a call

    @property
    def call(self) -> CallState:
        """The state of the call that this thread makes now."""
        if torch.compiler.is_compiling() or self._thread.compiled:
            return self._thread.call
        return _CALLS.get().get(id(self), PLAIN)

    @call.setter
    def call(self, call: CallState) -> None:
        self._thread.call = call
        if torch.compiler.is_compiling():
            self._thread.compiled = call is not PLAIN
            return
        self._thread.compiled = False
        others = {key: other for key, other in _CALLS.get().items() if key != id(self)}
        _CALLS.set(others if call is PLAIN else {**others, id(self): call})

    @property
    def disabled(self) -> bool:
        return self.call.disabled

    @property
    def samples(self) -> list[str] | None:
        return self.call.samples

    @property
    def tasks(self) -> Tensor | None:
        return self.call.tasks

    @property
    def running(self) -> Running:
        return self.call.running

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

    def groups(self, count: int) -> dict[str, list[int]]:
        """The rows of a batch of ``count`` by adapter.

        A layer may see more rows than there are samples (beams, flattened tokens): each sample then owns a run of them.

        Raises:
            PeanutError: the rows are no multiple of the samples.
        """
        samples = self.samples or []
        share = _share(count, len(samples), "adapter_names", "name", f"give one name a sample ({BASE!r} for none)")
        rows: dict[str, list[int]] = {}
        for index, name in enumerate(samples):
            rows.setdefault(name, []).extend(range(index * share, (index + 1) * share))
        return rows

    def placed(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """``groups`` as indices on ``device``, made once in a call for all layers that see the same batch."""
        known, key = self.call.indices, (tuple(self.samples or ()), count, device)
        if torch.compiler.is_compiling() or key not in known:
            known[key] = {name: torch.tensor(rows, device=device) for name, rows in self.groups(count).items()}
        return known[key]

    def tasks_of(self, count: int) -> Tensor | None:
        """The task of each row of a batch of ``count``, or ``None`` if no tasks are given."""
        tasks = self.tasks
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


def _share(count: int, samples: int, what: str, one: str, do: str) -> int:
    """How many of ``count`` rows belong to each of ``samples``."""
    if not samples or count % samples:
        raise PeanutError(
            f"{what} has {samples} {one}s and a layer sees a batch of {count}", f"one {one} for each sample", do
        )
    return count // samples
