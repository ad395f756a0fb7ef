"""Metrics of the tasks: accuracy, F1, correlations, calibration error, perplexity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = [
    "classification_metrics",
    "expected_calibration_error",
    "language_metrics",
    "reduce_language",
    "regression_metrics",
]

LOWER_IS_BETTER = ("loss", "perplexity", "mse")


def classification_metrics(predictions: Any, labels: Any, classes: int) -> dict[str, float]:
    """Accuracy; F1 (of class 1 where there are two, else the mean over the classes); Matthews' correlation for two.

    Args:
        predictions, labels: class ids, (rows,).
        classes: how many classes there are.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    average = "binary" if classes == 2 else "macro"
    metrics = {
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1": float(f1_score(labels, predictions, average=average, zero_division=0.0)),
    }
    if classes == 2:
        metrics["matthews"] = float(matthews_corrcoef(labels, predictions))
    return metrics


def regression_metrics(predictions: Any, labels: Any) -> dict[str, float]:
    """Mean squared error, and Pearson's and Spearman's correlation (0 where one side is constant).

    Args:
        predictions, labels: numbers, (rows,).
    """
    from scipy.stats import pearsonr, spearmanr

    x, y = np.asarray(predictions, dtype=np.float64).reshape(-1), np.asarray(labels, dtype=np.float64).reshape(-1)
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return {
        "mse": float(np.mean((x - y) ** 2)),
        "pearson": float(pearsonr(x, y).statistic) if varies else 0.0,
        "spearman": float(spearmanr(x, y).statistic) if varies else 0.0,
    }


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Σ share of bin · |accuracy − confidence| over bins of equal width (Guo et al. 2017, arXiv 1706.04599).

    Args:
        probabilities: (rows, classes).
        labels: class ids, (rows,).
        bins: how many.
    """
    confidence, answers = probabilities.double().max(-1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidence - (answers == labels).double())
    return float(gap.abs().sum() / len(labels))


def reduce_language(logits: Tensor, labels: Tensor) -> Tensor:
    """What perplexity needs of a batch: per row, the summed negative log-likelihood, the tokens hit, and the tokens.

    Args:
        logits: (B, T, V).
        labels: (B, T), -100 where nothing is to be predicted.

    Returns:
        (B, 3).
    """
    rows = []
    for row, targets in zip(
        logits[:, :-1], labels[:, 1:], strict=True
    ):  # row by row: one float32 copy of (T, V) at a time
        counted = targets != -100
        nll = cross_entropy(row.float(), targets, ignore_index=-100, reduction="sum")
        hits = (row.argmax(-1) == targets)[counted].sum()
        rows.append(torch.stack([nll, hits.float(), counted.sum().float()]))
    return torch.stack(rows)


def language_metrics(rows: Any) -> dict[str, float]:
    """Perplexity exp(Σ nll / tokens) and the part of tokens predicted exactly.

    Args:
        rows: what ``reduce_language`` gave, (rows, 3).
    """
    nll, hits, tokens = np.asarray(rows, dtype=np.float64).sum(axis=0)
    mean = nll / max(tokens, 1.0)
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "token_accuracy": float(hits / max(tokens, 1.0)),
    }
