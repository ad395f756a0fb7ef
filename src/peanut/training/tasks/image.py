"""Image classification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import PeanutError
from ..data import check_column
from ..foreign import foreign_errors
from .classes import ClassTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

__all__ = ["ImageClassification"]


class ImageClassification(ClassTask):
    """A class for an image; images are read and resized batch by batch."""

    name = "image-classification"
    model_class = "AutoModelForImageClassification"
    task_type = None
    mode = "RGB"

    def check(self, rows: Dataset, source: str) -> None:
        import datasets

        check_column(rows, self.data.image, "data.image", source)
        feature = rows.features[self.data.image]
        if not isinstance(feature, datasets.Image):
            raise PeanutError(
                f"column {self.data.image!r} of '{source}' holds {feature}", "images", "set data.image, or use a folder"
            )
        self.targets(rows, source)

    def fit(self, config: PreTrainedConfig, processor: Any) -> None:
        super().fit(config, processor)
        self.mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        self.processor = processor

    def load_processor(self, path: str | Path, revision: str | None = None) -> Any:
        from transformers import AutoImageProcessor

        with foreign_errors(
            f"'{path}' has no image processor", "a model's folder with one", "copy preprocessor_config.json"
        ):
            # One backend, so that training and evaluation resize alike on every machine.
            return AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil")

    def encode(self, rows: Dataset, processor: Any, source: str) -> Dataset:
        targets = self.targets(rows, source)
        return rows.select_columns([self.data.image]).add_column("labels", targets)

    def example(self, config: PreTrainedConfig, batch_size: int) -> dict[str, Tensor]:
        from PIL import Image

        image = Image.new(self.mode, (512, 512))
        pixels = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        return {
            "pixel_values": torch.zeros(batch_size, *pixels.shape[1:]),
            "labels": torch.zeros(batch_size, dtype=torch.long),
        }

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            images = [row[self.data.image].convert(self.mode) for row in rows]
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate
