"""What a fine-tuning method is: a config, and a change of a layer written as operators."""

from .change import Change
from .config import FORMAT_VERSION, PeftConfig, PeftType, TaskType
from .method import Values, WeightMethod
from .registry import METHODS, get_peft_config, method_of, register

__all__ = [
    "FORMAT_VERSION",
    "METHODS",
    "Change",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "Values",
    "WeightMethod",
    "get_peft_config",
    "method_of",
    "register",
]
