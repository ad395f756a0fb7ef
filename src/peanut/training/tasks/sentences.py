"""Classification or regression of a sentence or a pair of sentences."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from ...errors import PeanutError
from ...protocols import TaskType
from ..data import check_column
from ..metrics import regression_metrics
from .classes import ClassTask
from .task import TextTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedConfig

__all__ = ["TextClassification", "TextRegression"]


class SentenceTask(TextTask):
    """A task that reads ``data.text`` and, if given, ``data.text_pair``."""

    model_class = "AutoModelForSequenceClassification"
    task_type = TaskType.SEQ_CLS

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.data.text, self.data.text_pair) if self.data.text_pair else (self.data.text,)

    def check(self, rows: Dataset, source: str) -> None:
        for key, column in zip(("data.text", "data.text_pair"), self.text_columns, strict=False):
            check_column(rows, column, key, source, kind="text")
        self.targets(rows, source)

    @abstractmethod
    def targets(self, rows: Dataset, source: str) -> list[Any]:
        """What the model is to predict, row by row."""

    def encode(self, rows: Dataset, processor: Any, source: str) -> Dataset:
        targets = self.targets(rows, source)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [batch[name] for name in self.text_columns]
            return dict(processor(*texts, truncation=True, max_length=self.data.max_length))

        encoded = rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc="tokenizing")
        return encoded.add_column("labels", targets)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)

    def example(self, config: PreTrainedConfig, batch_size: int) -> dict[str, Tensor]:
        kind = torch.float32 if config.problem_type == "regression" else torch.long
        tokens = torch.ones(batch_size, self.data.max_length, dtype=torch.long)
        return {"input_ids": tokens, "labels": torch.zeros(batch_size, dtype=kind)}


class TextClassification(ClassTask, SentenceTask):
    """A class for one sentence or a pair."""

    name = "text-classification"


class TextRegression(SentenceTask):
    """A number for one sentence or a pair: mean squared error, Pearson's and Spearman's correlation."""

    name = "text-regression"
    metric_names = ("pearson", "spearman", "mse", "loss")

    @property
    def trains_head(self) -> bool:
        return True

    def targets(self, rows: Dataset, source: str) -> list[Any]:
        check_column(rows, self.data.label, "data.label", source)
        kind = rows.data.column(self.data.label).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise PeanutError(
                f"column {self.data.label!r} of '{source}' holds {kind}",
                "numbers",
                "set data.label, or task: text-classification",
            )
        numbers = [float(value) for value in rows[self.data.label]]
        for row, number in enumerate(numbers, start=1):
            if not math.isfinite(number):
                raise PeanutError(
                    f"row {row} of '{source}' has the label {number}", "a finite number", "correct the row"
                )
        return numbers

    def fit(self, config: PreTrainedConfig, processor: Any) -> None:
        super().fit(config, processor)
        config.num_labels, config.problem_type = 1, "regression"

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
        return scores.float().squeeze(-1)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return regression_metrics(prediction.predictions, prediction.label_ids)
