"""Functions for models into which adapters were injected, under the names of ``peft.functional``."""

from .model.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from .model.injection import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
