"""Parameter-efficient fine-tuning: every method a page of mathematics, PEANuT at the cost of LoRA.

>>> from peanut import PeanutConfig, get_peft_model
>>> model = get_peft_model(model, PeanutConfig(r=16, task_type="CAUSAL_LM"))  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "errors": ("PeanutError",),
    "export": ("from_lora", "to_lora"),
    "methods.linear_probing": ("LinearProbingConfig",),
    "methods.lora": ("LoraConfig",),
    "methods.peanut": ("PeanutConfig",),
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
        "LoraModel",
        "PeanutModel",
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "set_peft_model_state_dict",
    ),
    "model.peft_model": ("PeftModel", "get_peft_model"),
    "protocols": ("PeftConfig", "PeftType", "TaskType", "get_peft_config"),
    "training.trainer": ("Trainer",),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604 - they are strings

if TYPE_CHECKING:
    from .errors import PeanutError as PeanutError
    from .export import from_lora as from_lora
    from .export import to_lora as to_lora
    from .methods.linear_probing import LinearProbingConfig as LinearProbingConfig
    from .methods.lora import LoraConfig as LoraConfig
    from .methods.peanut import PeanutConfig as PeanutConfig
    from .model.auto import AutoPeftModel as AutoPeftModel
    from .model.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .model.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .model.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .model.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .model.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from .model.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from .model.injection import LoraModel as LoraModel
    from .model.injection import PeanutModel as PeanutModel
    from .model.injection import get_peft_model_state_dict as get_peft_model_state_dict
    from .model.injection import inject_adapter_in_model as inject_adapter_in_model
    from .model.injection import set_peft_model_state_dict as set_peft_model_state_dict
    from .model.peft_model import PeftModel as PeftModel
    from .model.peft_model import get_peft_model as get_peft_model
    from .protocols import PeftConfig as PeftConfig
    from .protocols import PeftType as PeftType
    from .protocols import TaskType as TaskType
    from .protocols import get_peft_config as get_peft_config
    from .training.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``import peanut`` itself costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'peanut' has no attribute {name!r}")
    import_module(".methods", __name__)
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
