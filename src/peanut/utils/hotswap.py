"""Hot-swapping, where Hugging Face PEFT has it; see ``export/hotswap.py``."""

from ..export.holding import check_hotswap_configs_compatible, prepare_model_for_compiled_hotswap
from ..export.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]
