"""The model card (``README.md``) in an adapter's folder: what the hub reads of it, and who made it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import warn
from ...hub import CARD_NAME
from ...protocols import PeftConfig
from ..adapters.adapter_set import AdapterSet

__all__ = ["card_text"]

_VERSIONS = "### Framework versions"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_THEIRS = re.compile(
    "ADALORA|ADAPTION_PROMPT|BOFT|C3A|CPT|FOURIERFT|HRA|IA3|LN_TUNING|LOKR|LORA|MISS|OFT|PEANUT|POLY|PREFIX_TUNING|"
    "PROMPT_TUNING|P_TUNING|RANDLORA|ROAD|SHIRA|TRAINABLE_TOKENS|VBLORA|VERA|XLORA"
)
"""The methods whose files Hugging Face PEFT reads."""
_PIPELINES = {"CAUSAL_LM": "text-generation"}
"""Tasks of which one knows what the hub calls them."""


def card_text(adapters: AdapterSet, config: PeftConfig, folder: Path, tags: Iterable[str] = ()) -> str | None:
    """The card of an adapter for a folder: one that is there keeps its text, its tags and what else it says.

    ``None`` if the one that is there cannot be read: it stays as it is, with a warning.
    """
    from huggingface_hub import ModelCard

    path, base = folder / CARD_NAME, _on_the_hub(adapters, config)
    try:
        card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else _blank(config, base))
    except Exception as error:  # it may be anybody's, and YAML has many errors
        warn(f"'{path}' is left as it is, as it cannot be read: {' '.join(str(error).split())[:200]}")
        return None
    card.data["library_name"] = _library(config)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *_tags(adapters, config, base), *tags})
    if base:
        card.data["base_model"] = base
    task = str(getattr(config.task_type, "value", config.task_type))
    if not card.data.get("pipeline_tag") and task in _PIPELINES:
        card.data["pipeline_tag"] = _PIPELINES[task]
    version = f"- PEANuT {__version__}"
    lines = card.text.splitlines()
    if version not in lines:
        place = lines.index(_VERSIONS) + 2 if _VERSIONS in lines else len(lines) + 3
        lines[place:place] = [version] if _VERSIONS in lines else ["", _VERSIONS, "", version]
        card.text = "\n".join(lines)
    return f"{str(card).rstrip()}\n"


def _blank(config: PeftConfig, base: str) -> str:
    of = f" for [{base}](https://huggingface.co/{base})" if base else ""
    return "\n".join(
        (
            "---\n{}\n---",
            f"# Adapter{of}",
            "",
            f"Method: {config.method}. It is loaded onto its base model:",
            "",
            "```python",
            f"from {_library(config)} import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "this folder or repository")',
            "```",
        )
    )


def _library(config: PeftConfig) -> str:
    """The library that the hub names for loading: Hugging Face PEFT where it has the method, as files are its own."""
    return "peft" if _THEIRS.fullmatch(config.method) else __package__.partition(".")[0]


def _tags(adapters: AdapterSet, config: PeftConfig, base: str) -> set[str]:
    from transformers import PreTrainedModel

    model: Any = adapters.model
    tags = set(getattr(model, "model_tags", None) or ()) | {"peanut"}
    if isinstance(model, PreTrainedModel):
        tags.add("transformers")
    if config.method == "LORA":
        tags.add("lora")
    if base:
        tags.add(f"base_model:adapter:{base}")
    return tags


def _on_the_hub(adapters: AdapterSet, config: PeftConfig) -> str:
    """The base's name there; nothing of a model that has no config, or where it is a folder, which the hub refuses."""
    name = str(config.base_model_name_or_path or "") if hasattr(adapters.model, "config") else ""
    return name if _HUB_ID.fullmatch(name) and not os.path.isdir(name) else ""
