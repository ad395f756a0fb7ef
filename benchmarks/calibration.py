"""Calibration (is confidence equal to accuracy?) of LoRA and of variational LoRA with one sample and with several."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peanut.model.predictive import predictive
from peanut.training.metrics import expected_calibration_error
from peanut.training.model import load_trained

__all__ = ["Calibration", "calibration", "compare_calibration", "print_calibration"]


@dataclass(frozen=True)
class Calibration:
    """What the answers of a model are worth.

    Args:
        accuracy: share of right answers.
        confidence: mean probability of the answer given.
        error: expected calibration error, 15 bins.
        likelihood: mean negative log-likelihood of the labels.
        deviation: mean standard deviation of the answer's probability over the draws; 0 without draws.
    """

    accuracy: float
    confidence: float
    error: float
    likelihood: float
    deviation: float


@torch.no_grad()
def calibration(adapter: Path, rows: Path, samples: int = 0, max_length: int = 40) -> Calibration:
    """Calibration of a trained classifier on rows with the columns ``text`` and ``label``.

    Args:
        adapter: the adapter's folder, or the run's.
        rows: a CSV file.
        samples: draws to average over; 0 for one certain answer.
        max_length: tokens read of a text.
    """
    trained = load_trained(adapter)
    model = trained.model.eval()
    with rows.open(encoding="utf-8", newline="") as file:
        texts, names = zip(*[(row["text"], row["label"]) for row in csv.DictReader(file)], strict=True)
    ids = {str(label): int(index) for index, label in model.config.id2label.items()}
    labels = torch.tensor([ids[name] for name in names])
    chances, spreads = [], []
    torch.manual_seed(0)
    for start in range(0, len(texts), 50):
        batch = trained.processor(
            list(texts[start : start + 50]), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
        )
        if samples:
            found = predictive(model, samples=samples, **batch)
            chances.append(found.mean)
            spreads.append(found.deviation)
        else:
            chances.append(model(**batch).logits.softmax(-1))
    return _judged(torch.cat(chances), labels, torch.cat(spreads) if spreads else None)


def compare_calibration(output: Path, samples: int = 16) -> dict[str, Any]:
    """Calibration of the LoRA and the variational LoRA that ``every_method`` left in ``output``."""
    rows = output / "data" / "test.csv"
    return {
        "samples": samples,
        "LoRA": asdict(calibration(output / "lora", rows)),
        "variational LoRA, mean": asdict(calibration(output / "variational-lora", rows)),
        "variational LoRA, averaged": asdict(calibration(output / "variational-lora", rows, samples)),
    }


def print_calibration(found: dict[str, Any]) -> None:
    """Prints what ``compare_calibration`` found."""
    from rich.console import Console
    from rich.table import Table

    rows = {name: values for name, values in found.items() if isinstance(values, dict)}
    columns = list(next(iter(rows.values())))
    table = Table("calibration", *columns, title=f"averaged over {found['samples']} draws")
    for name, values in rows.items():
        table.add_row(name, *(f"{values[column]:.3f}" for column in columns))
    Console().print(table)


def _judged(chances: Tensor, labels: Tensor, spreads: Tensor | None) -> Calibration:
    confidence, answers = chances.max(-1)
    own = chances.gather(-1, labels[:, None]).clamp_min(1e-12)
    return Calibration(
        accuracy=float((answers == labels).float().mean()),
        confidence=float(confidence.mean()),
        error=expected_calibration_error(chances, labels),
        likelihood=float(-own.log().mean()),
        deviation=0.0 if spreads is None else float(spreads.gather(-1, answers[:, None]).mean()),
    )
