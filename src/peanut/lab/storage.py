"""Times of adding an adapter to a model, saving it and loading it."""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ..model.checkpoints.stored_adapter import TRAINING_NAME
from .measure import now
from .variants import Life, Variant

__all__ = ["file_bytes", "life_probe"]


def life_probe(variant: Variant, life: Life, device: torch.device) -> Callable[[], dict[str, float]]:
    """A probe of the seconds of injection into a fresh base, of saving what was trained, and of loading it."""

    def probe() -> dict[str, float]:
        bases = [life.base() for _ in range(2)]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hugging Face PEFT's, about settings that are measured as they are
            start = now(device)
            model = life.inject(bases[0])
            injected = now(device)
            del model
            before_save = now(device)
            variant.model.save_pretrained(folder)  # type: ignore[operator]
            saved = now(device)
            model = life.read(bases[1], Path(folder))
            loaded = now(device)
        del model, bases
        gc.collect()  # outside the clock: models are cycles, and one more at a time is enough
        return {"inject": injected - start, "save": saved - before_save, "load": loaded - saved}

    return probe


def file_bytes(variant: Variant) -> int:
    """The size of the adapter's files; what is written beside them for going on with training is not counted."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variant.model.save_pretrained(folder)  # type: ignore[operator]
        files = [file for file in Path(folder).rglob("*.safetensors") if file.name != TRAINING_NAME]
        return sum(file.stat().st_size for file in files)
