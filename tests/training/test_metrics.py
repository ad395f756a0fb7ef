"""Metrics against values computed by hand and against the model's own loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peanut.training.metrics import classification_metrics, language_metrics, reduce_language, regression_metrics


def test_two_classes() -> None:
    # tp 2, fp 1, fn 1, tn 1
    metrics = classification_metrics([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2)
    assert metrics == pytest.approx(
        {"accuracy": 3 / 5, "f1": 2 / 3, "matthews": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)}
    )


def test_three_classes_take_the_mean_over_classes() -> None:
    metrics = classification_metrics([0, 0, 1, 2], [0, 1, 1, 2], 3)
    assert metrics == pytest.approx({"accuracy": 3 / 4, "f1": (2 / 3 + 2 / 3 + 1) / 3})


def test_regression() -> None:
    metrics = regression_metrics([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert metrics == pytest.approx({"mse": (1 + 4 + 16) / 3, "pearson": 1.0, "spearman": 1.0})
    assert regression_metrics([1.0, 1.0], [0.0, 2.0]) == {"mse": 1.0, "pearson": 0.0, "spearman": 0.0}


def test_perplexity_is_that_of_all_tokens_however_they_are_batched() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator)
    labels = torch.randint(11, (3, 6), generator=generator)
    labels[0, 3:] = -100
    labels[2, :] = -100
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum() / (labels[:, 1:] != -100).sum()
    whole = reduce_language(logits, labels)
    assert whole.shape == (3, 3)
    parts = torch.cat([reduce_language(logits[i : i + 1], labels[i : i + 1]) for i in range(3)])
    for rows in (whole, parts):
        metrics = language_metrics(rows.numpy())
        assert metrics["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
        assert metrics["token_accuracy"] == pytest.approx(hits.item())


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert language_metrics(np.array([[1e6, 0, 2]]))["perplexity"] == math.inf
