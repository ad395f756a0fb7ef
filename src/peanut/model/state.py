"""Which adapters act, in one place that all adapted layers of a model share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import PeanutError

__all__ = ["BASE", "AdapterState"]

BASE = "__base__"
"""The name that stands for "no adapter" among per-sample names."""


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
    """

    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    disabled: bool = False
    sampling: bool = False
    penalising: bool = True
    samples: list[str] | None = None

    @contextmanager
    def per_sample(self, samples: Sequence[str] | None) -> Iterator[None]:
        """Within the context, sample i goes through ``samples[i]``."""
        before, self.samples = self.samples, None if samples is None else list(samples)
        try:
            yield
        finally:
            self.samples = before

    def groups(self, count: int) -> dict[str, list[int]]:
        """The rows of a batch of ``count`` by adapter.

        A layer may see more rows than there are samples (beams, flattened tokens): each sample then owns a run of them.

        Raises:
            PeanutError: the rows are no multiple of the samples.
        """
        samples = self.samples or []
        if not samples or count % len(samples):
            raise PeanutError(
                f"adapter_names has {len(samples)} names and a layer sees a batch of {count}",
                "one name for each sample",
                f"give one name a sample ({BASE!r} for none)",
            )
        share = count // len(samples)
        rows: dict[str, list[int]] = {}
        for index, name in enumerate(samples):
            rows.setdefault(name, []).extend(range(index * share, (index + 1) * share))
        return rows
