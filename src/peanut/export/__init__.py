"""An adapter in other forms, each checked against its source: an exact LoRA, a merged model."""

from .lora import LoraExport, from_lora, to_lora
from .merged import save_merged

__all__ = ["LoraExport", "from_lora", "save_merged", "to_lora"]
