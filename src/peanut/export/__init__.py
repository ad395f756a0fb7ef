"""An adapter in other forms: an exact LoRA, a merged model, a live model of the peer; checked against its source."""

from .lora import LoraExport, from_lora, to_lora
from .merged import save_merged
from .peer_in import from_peft
from .peer_out import to_peft

__all__ = ["LoraExport", "from_lora", "from_peft", "save_merged", "to_lora", "to_peft"]
