"""What a fine-tuning method is: a config, and a change of a weight, of an output, of the input, or a mixture."""

from .architecture import Architecture, PlaceName, Stack
from .change import Change
from .config import FORMAT_VERSION, PeftConfig, PeftType, TaskType
from .input_method import InputMethod, ModelShape, PromptConfig
from .method import Method, Values, WeightMethod
from .mixture_method import MixtureMethod
from .output_method import Call, OutputMethod, Site
from .registry import METHODS, get_peft_config, method_of, register

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
    "Values",
    "WeightMethod",
    "get_peft_config",
    "method_of",
    "register",
]
