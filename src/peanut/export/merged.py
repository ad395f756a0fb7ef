"""A model folder with the adapter merged into its weights, which loads without this library."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import PeanutError
from ..files import make_folder, told
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
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PeanutError(f"'{path}' holds something already", "a new or empty folder", "choose another")
    make_folder(path.parent)
    merged = model.merge_and_unload()
    with told(f"cannot write the model to '{path}'"):
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            merged.save_pretrained(staged)  # type: ignore[operator]
            if processor is not None:
                processor.save_pretrained(staged)
            staged.chmod(0o755)
            if path.exists():
                path.rmdir()
            os.replace(staged, path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return path
