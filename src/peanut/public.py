"""The public names and the modules that define them, so that ``peanut.X`` is imported on first use."""

from __future__ import annotations

import sys
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .protocols import Method

__all__ = ["find", "homes", "ours"]

_WHERE = {
    "errors": ("OutOfReachWarning", "PeanutError"),
    "export": ("convert_to_lora", "from_lora", "save_as_lora", "to_lora"),
    "interop.from_peft": ("from_peft",),
    "interop.install": ("install", "uninstall"),
    "interop.to_peft": ("to_peft",),
    "model.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "model.injection": (
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "penalty",
        "set_peft_model_state_dict",
    ),
    "model.kbit": ("prepare_model_for_kbit_training",),
    "model.peft_model": ("PeftModel", "get_peft_model"),
    "model.status": ("get_layer_status", "get_model_status"),
    "model.predictive": ("predictive",),
    "protocols": ("PeftConfig", "PeftType", "TaskType", "get_peft_config"),
    "training.trainer": ("Trainer",),
}
_HOMES = {name: module for module, names in _WHERE.items() for name in names}
"""The public names that belong to no method."""


def ours() -> list[Method[Any]]:
    """The registered methods that are this package's own."""
    from .protocols.registry import registered

    return [each for each in registered().values() if type(each).__module__.startswith(f"{__package__}.methods.")]


def homes() -> dict[str, str]:
    """Every public name and the module that it is in, as seen from this package.

    A method brings its config class, the Enums in its module's ``__all__``, and the class of the models it adapts.
    Methods of other packages bring nothing: their names are public there.
    """
    found = dict(_HOMES)
    for method in ours():
        module = sys.modules[type(method).__module__]
        public = {name: getattr(module, name) for name in module.__all__}
        enums = [name for name, value in public.items() if isinstance(value, type) and issubclass(value, Enum)]
        found |= dict.fromkeys([method.config_class.__name__, *enums], module.__name__.partition(".")[2])
        if method.model_name is not None:
            found[method.model_name] = "model.models"
    return found


def find(name: str) -> Any:
    """The object that has a public name.

    Raises:
        AttributeError: there is none.
    """
    home = _HOMES.get(name) or homes().get(name)
    if home is None:
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __package__), name)
