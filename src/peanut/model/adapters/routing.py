"""Adapters and tasks per sample of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...errors import PeanutError
from ..layers.state import BASE
from ..prompts.replay import put_back, replayed
from .adapter_set import AdapterSet

__all__ = ["per_sample"]


@contextmanager
def per_sample(
    adapters: AdapterSet,
    samples: Sequence[str] | None,
    tasks: Tensor | Sequence[int] | None = None,
    rows: int | None = None,
) -> Iterator[None]:
    """Within the context each sample of a batch goes through the adapter, or is of the task, named for it.

    Args:
        adapters: the model's adapters.
        samples: a name for each sample.
        tasks: a task for each sample.
        rows: how many samples the user gave, if that is known.

    Raises:
        PeanutError: a name is unknown, adapters are merged, or there are not as many names or tasks as samples.
    """
    if samples is None and tasks is None:
        yield
        return
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
    restored = replayed(adapters.model, adapters.state) if torch.is_grad_enabled() else []
    try:
        # On the CPU, where each layer may look at them without waiting for a device.
        with adapters.state.during(samples, None if tasks is None else torch.as_tensor(tasks).cpu()):
            yield
    finally:
        put_back(restored)
