"""Writes a model with the adapter merged into its weights; the folder loads without this library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..files import check_new, write_folder
from ..model.peft_model import PeftModel

__all__ = ["save_merged"]


def save_merged(model: PeftModel, folder: str | os.PathLike[str], processor: Any = None) -> Path:
    """Merges the active adapters for good and writes the model, whole or not at all.

    Args:
        model: the adapted model; it is used up, its base model holds the merged weights afterwards.
        folder: where to; must not exist yet or be empty.
        processor: a tokenizer or image processor to save along.

    Raises:
        PeanutError: the folder holds something already or cannot be written.
    """
    path = Path(folder)
    check_new(path)

    def write(staged: Path) -> None:
        model.merge_and_unload().save_pretrained(staged)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(staged)

    write_folder(path, write)
    return path
