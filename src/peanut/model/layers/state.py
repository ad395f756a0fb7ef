"""Which adapters act, in one place that all adapted layers of a model share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import PeanutError

__all__ = ["BASE", "AdapterState", "Running"]

BASE = "__base__"
"""The name that stands for "no adapter" among per-sample names."""


@dataclass(frozen=True)
class Running:
    """What is known of the batch that runs through the model now.

    Args:
        prompt: (batch, tokens), which of the tokens that layers see belong to the user's prompt.
        answering: whether they are an answer that goes on, of which no token belongs to it.
        prefix: keys and values that attention modules are to see first, where the model's own cache does not reach
            them (under gradient checkpointing).
        gates: for each mixture, its gates by the path of a layer, as (expert, gate (batch, tokens, 1)) pairs.
    """

    prompt: Tensor | None = None
    answering: bool = False
    prefix: Any = None
    gates: dict[str, dict[str, list[tuple[str, Tensor]]]] = field(default_factory=dict)


@dataclass
class AdapterState:
    """What acts in a model at this moment.

    Args:
        active: names of the active adapters; their changes add.
        merged: those of them that are merged into the weights.
        disabled: whether the model answers as its base.
        sampling: whether methods with randomness of their own draw it outside training too.
        penalising: whether penalties enter the loss that the model returns (else who computes the loss adds them).
        samples: for each sample of the batch the one adapter that it goes through, or ``None`` if all go the same way.
        tasks: (batch,), the task of each sample, for mixtures by task.
        running: what is known of the batch that runs now.
    """

    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    disabled: bool = False
    sampling: bool = False
    penalising: bool = True
    samples: list[str] | None = None
    tasks: Tensor | None = None
    running: Running = field(default_factory=Running)
    _placed: tuple[Any, dict[str, Tensor]] | None = field(default=None, repr=False)

    @contextmanager
    def during(
        self, samples: Sequence[str] | None, tasks: Tensor | None, running: Running | None = None
    ) -> Iterator[None]:
        """Within the context, sample i goes through ``samples[i]`` and is of task ``tasks[i]``."""
        before = self.samples, self.tasks, self.running
        self.samples = None if samples is None else list(samples)
        self.tasks = tasks
        self.running = self.running if running is None else running
        try:
            yield
        finally:
            self.samples, self.tasks, self.running = before

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
        """``groups`` as indices on ``device``, made once for all layers that see the same batch."""
        key = (tuple(self.samples or ()), count, device)
        known = self._placed
        if known is None or known[0] != key or torch.compiler.is_compiling():
            known = (key, {name: torch.tensor(rows, device=device) for name, rows in self.groups(count).items()})
            self._placed = known
        return known[1]

    def tasks_of(self, count: int) -> Tensor | None:
        """The task of each row of a batch of ``count``, or ``None`` if no tasks are given."""
        if self.tasks is None:
            return None
        tasks = self.tasks.reshape(-1)
        share = _share(count, len(tasks), "task_ids", "task", "give one task a sample")
        return tasks if share == 1 else torch.repeat_interleave(tasks, share)


def _share(count: int, samples: int, what: str, one: str, do: str) -> int:
    """How many of ``count`` rows belong to each of ``samples``."""
    if not samples or count % samples:
        raise PeanutError(
            f"{what} has {samples} {one}s and a layer sees a batch of {count}", f"one {one} for each sample", do
        )
    return count // samples
