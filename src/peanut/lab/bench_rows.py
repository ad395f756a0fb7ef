"""The benchmark's results for each variant, and their ratios to reference variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .measure import ratio
from .variants import By

__all__ = ["BYTES", "Row", "references"]

BYTES = ("saved_bytes", "peak_bytes", "evaluation_bytes", "file_bytes")


@dataclass
class Row:
    """What was found of one variant; the figures are those of the JSON file (``lab/bench.py`` tells each).

    Args:
        method: as tables name it; empty for the frozen stack.
        by: whose implementation it is.
        trained_parameters: how many.
        saved_bytes: what a forward keeps for the backward, as ``measure.saved_bytes`` counts it, beyond the frozen.
        peak_bytes, evaluation_bytes: the most memory of a training step and of the first forward in evaluation, as
            ``measure.peak_bytes`` counts it.
        file_bytes: of the saved tensors.
        difference: of Hugging Face PEFT's output from this library's, relative to the largest entry.
        note: why something is missing.
        seconds: one value a round, by quantity.
    """

    method: str
    by: By
    trained_parameters: int
    saved_bytes: int = 0
    peak_bytes: int = 0
    evaluation_bytes: int = 0
    file_bytes: int | None = None
    difference: float | None = None
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row's name in tables."""
        return f"{self.method} {self.by}" if self.method else self.by

    def to(self, other: Row) -> dict[str, Any]:
        """Ratios to another row: a spread for each time, a number for bytes, ``None`` where the other has none."""
        both = {name: (own, other.seconds[name]) for name, own in self.seconds.items() if name in other.seconds}
        ratios: dict[str, Any] = {name: asdict(ratio(*values)) for name, values in both.items()}
        for name in BYTES:
            own, others = getattr(self, name), getattr(other, name)
            ratios[name] = own / others if own is not None and others else None
        return ratios


def references(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """What a row is compared with, as far as it is there: the frozen stack, PEFT's same method, PEFT's LoRA."""
    wanted = {"frozen": ("", "frozen"), "peer": (row.method, "peft"), "peer_lora": ("LORA", "peft")}
    known = {(each.method, each.by): each for each in rows if each is not row}
    return {name: known[key] for name, key in wanted.items() if key in known and row.method}
