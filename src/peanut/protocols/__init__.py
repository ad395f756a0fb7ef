"""The interfaces of fine-tuning methods: configs, changes of weights, outputs or inputs, and mixtures of adapters."""

from .architecture import Architecture, PlaceName, Stack
from .change import Change
from .config import FORMAT_VERSION, PeftConfig, TaskType, get_peft_config
from .input_method import InputMethod, ModelShape, PromptConfig
from .method import Method, Trial, Values, WeightMethod
from .mixture_method import MixtureMethod
from .output_method import Call, OutputMethod, Site
from .registry import METHODS, PeftType, method_of, register

__all__ = [
    "FORMAT_VERSION",
    "METHODS",
    "Architecture",
    "Call",
    "Change",
    "InputMethod",
    "Method",
    "MixtureMethod",
    "ModelShape",
    "OutputMethod",
    "PeftConfig",
    "PeftType",
    "PlaceName",
    "PromptConfig",
    "Site",
    "Stack",
    "TaskType",
    "Trial",
    "Values",
    "WeightMethod",
    "get_peft_config",
    "method_of",
    "register",
]
