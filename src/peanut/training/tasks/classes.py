"""What classification tasks share: mapping of labels to class ids, and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from torch import Tensor

from ...errors import PeanutError, nearest
from ..data import check_column
from ..metrics import classification_metrics
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedConfig

__all__ = ["ClassTask", "class_ids", "class_names", "learn_classes"]


class ClassTask(Task):
    """A task whose answer is a class: accuracy, F1, and for two classes Matthews' correlation."""

    metric_names = ("accuracy", "f1", "matthews", "loss")
    has_classes = True

    @property
    def trains_head(self) -> bool:
        return True

    def learn(self, rows: Dataset, source: str) -> None:
        self.check(rows, source)
        self.labels = learn_classes(rows, self.data.label, source)

    def targets(self, rows: Dataset, source: str) -> list[Any]:
        """Every row's class: its id, or its name while the classes are not learned yet."""
        if not self.labels:
            return class_names(rows, self.data.label, source)
        return class_ids(rows, self.data.label, self.labels, source)

    def fit(self, config: PreTrainedConfig, processor: Any) -> None:
        super().fit(config, processor)
        # A model that knows these classes already keeps their order, and so its trained head.
        known = [str(name) for _, name in sorted((config.id2label or {}).items())]
        if sorted(known) == sorted(self.labels):
            self.labels = known
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
        return scores.argmax(-1)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return classification_metrics(prediction.predictions, prediction.label_ids, len(self.labels))


_CLASS_KINDS = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)


def class_names(rows: Dataset, column: str, source: str) -> list[str]:
    """The name of every row's class: the value itself, or what the dataset's own feature calls it.

    Raises:
        PeanutError: the column is missing, has gaps, or holds something that is no class.
    """
    check_column(rows, column, "data.label", source)
    feature, kind, values = rows.features[column], rows.data.column(column).type, rows[column][:]
    names = getattr(feature, "names", None)
    if names:
        for row, value in enumerate(values, start=1):
            if not 0 <= value < len(names):
                raise PeanutError(
                    f"row {row} of '{source}' has the label {value}", "a labelled row", "use a split with labels"
                )
        return [names[value] for value in values]
    if not any(fits(kind) for fits in _CLASS_KINDS):
        raise PeanutError(
            f"column {column!r} of '{source}' holds {kind}, for instance {values[0]!r}",
            "classes: whole numbers or names",
            "set data.label, or task: text-regression for numbers",
        )
    return [str(value) for value in values]


def learn_classes(rows: Dataset, column: str, source: str) -> list[str]:
    """The classes that occur in ``rows``, in the dataset's own order, by number, or by name.

    Raises:
        PeanutError: there are fewer than two.
    """
    seen = set(class_names(rows, column, source))
    own = getattr(rows.features[column], "names", None)
    if own:
        classes = [name for name in own if name in seen]
    elif pa.types.is_integer(rows.data.column(column).type):
        classes = sorted(seen, key=int)
    else:
        classes = sorted(seen)
    if len(classes) < 2:
        raise PeanutError(
            f"every row of '{source}' has the label {classes[0]!r}", "at least two classes", "check data.label"
        )
    return classes


def class_ids(rows: Dataset, column: str, classes: Sequence[str], source: str) -> list[int]:
    """The id of every row's class.

    Raises:
        PeanutError: a class that is not among ``classes``; names it and the first row that has it.
    """
    ids = {name: index for index, name in enumerate(classes)}
    result = []
    for row, name in enumerate(class_names(rows, column, source), start=1):
        if name not in ids:
            raise PeanutError(
                f"row {row} of '{source}' has the label {name!r}, which training has not seen",
                f"one of {', '.join(map(repr, classes[:10]))}{', …' if len(classes) > 10 else ''}",
                f"correct the row or add such rows to the training data (nearest: {nearest(name, classes, 1)})",
            )
        result.append(ids[name])
    return result
