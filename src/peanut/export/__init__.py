"""Exports an adapter as an exact LoRA or as a merged model, and checks the result against the adapter."""

from .conversion import convert_to_lora, save_as_lora
from .lora import LoraExport, from_lora, to_lora
from .merged import save_merged

__all__ = ["LoraExport", "convert_to_lora", "from_lora", "save_as_lora", "save_merged", "to_lora"]
