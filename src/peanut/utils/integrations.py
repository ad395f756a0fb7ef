"""What has to do with other libraries, where Hugging Face PEFT has it; see ``interop/empty_weights.py``."""

from ..interop.empty_weights import init_empty_weights, skip_init_on_device

__all__ = ["init_empty_weights", "skip_init_on_device"]
