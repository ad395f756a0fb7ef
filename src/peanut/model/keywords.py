"""Keywords that scripts give to Hugging Face PEFT, and that have no effect here."""

from __future__ import annotations

from typing import Any

from ..hub import HUB_WITHOUT_EFFECT

__all__ = ["LOADING", "SAVING"]

SAVING: dict[str, tuple[Any, ...] | None] = {
    "max_shard_size": None,
    "push_to_hub": (False, None),
    "save_function": None,
    "token": None,
    "variant": (None,),
}
"""What ``save_pretrained`` has no use for, each with the values of which that is so (``None``: any)."""
LOADING: dict[str, tuple[Any, ...] | None] = HUB_WITHOUT_EFFECT | {
    "adapters": (None,),
    "device_map": None,
    "dtype": None,
    "max_memory": None,
    "offload_dir": None,
    "offload_folder": None,
    "offload_index": None,
    "torch_device": None,
    "torch_dtype": None,
    "trust_remote_code": None,
    "use_safetensors": None,
}
"""The same for ``from_pretrained`` and ``load_adapter``: an adapter's tensors follow the base's devices."""
