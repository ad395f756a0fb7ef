"""An adapter in other forms: an exact LoRA, a merged model; each checked against the adapted model."""

from .lora import LoraExport, from_lora, to_lora
from .merged import save_merged

__all__ = ["LoraExport", "from_lora", "save_merged", "to_lora"]
