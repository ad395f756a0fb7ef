"""The public names and the modules that define them, so that ``peanut.X`` is imported on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from enum import Enum
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .absent import absent

if TYPE_CHECKING:
    from .protocols import Method

__all__ = ["find", "homes", "make_modules", "ours", "submodule", "tuners"]

_WHERE = {
    "errors": ("NoMatchingPeftModuleError", "OutOfReachWarning", "PeanutError", "PeftError", "PeftWarning"),
    "export": ("convert_to_lora", "from_lora", "save_as_lora", "to_lora"),
    "interop.condition_numbers": ("find_kappa_target_modules",),
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
    "interop.names": (
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "PromptLearningConfig",
    ),
    "model.peft_model": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PeftMixedModel",
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "get_peft_model",
    ),
    "model.status": ("get_layer_status", "get_model_status"),
    "model.predictive": ("predictive",),
    "model.prompts.encoders": ("CPTEmbedding", "PrefixEncoder", "PromptEmbedding", "PromptEncoder"),
    "interop.utilities": (
        "LoraRuntimeConfig",
        "cast_mixed_precision_params",
        "get_base_model_state_dict",
        "load_peft_weights",
        "set_base_model_state_dict",
        "shift_tokens_right",
    ),
    "protocols": ("PeftConfig", "PeftType", "TaskType", "get_peft_config"),
    "training.trainer": ("Trainer",),
}
_HOMES = {name: module for module, names in _WHERE.items() for name in names}
"""The public names that belong to no method."""
_SUBMODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "functional": {
        "interop.functional": ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"),
        "model.injection": ("get_peft_model_state_dict", "inject_adapter_in_model", "set_peft_model_state_dict"),
    },
    "helpers": {
        "layers": ("LoraLayer",),
        "interop.condition_numbers": ("KappaTuneSelector", "find_kappa_target_modules"),
        "interop.functional": ("DoraCaching", "disable_input_dtype_casting", "rescale_adapter_scale"),
        "interop.names": ("BaseTunerLayer",),
        "interop.utilities": (
            "check_if_peft_model",
            "update_forward_signature",
            "update_generate_signature",
            "update_signature",
        ),
    },
    "tuners": {
        "export": ("convert_to_lora", "save_as_lora"),
        "interop.names": ("MixedModel",),
        "model.prompts.encoders": ("CPTEmbedding", "PrefixEncoder", "PromptEmbedding", "PromptEncoder"),
        "interop.utilities": ("LoraRuntimeConfig",),
    },
    "tuners.tuners_utils": {
        "interop.functional": ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"),
        "interop.names": ("BaseTuner", "BaseTunerLayer"),
    },
    "utils": {
        "errors": ("NoMatchingPeftModuleError", "PeftError", "PeftWarning"),
        "model.injection": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
        "model.kbit": ("prepare_model_for_gradient_checkpointing", "prepare_model_for_kbit_training"),
        "interop.names": (
            "ALLOWED_COMPUTE_DTYPES",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "UPCAST_DTYPES",
            "WEIGHTS_NAME",
            "AuxiliaryTrainingWrapper",
            "ModulesToSaveWrapper",
            "TrainableTokensWrapper",
        ),
        "interop.utilities": (
            "_freeze_adapter",
            "_get_batch_size",
            "_get_input_embeddings_name",
            "_get_submodules",
            "_is_valid_match",
            "cast_mixed_precision_params",
            "fsdp_auto_wrap_policy",
            "get_base_model_state_dict",
            "id_tensor_storage",
            "infer_device",
            "load_peft_weights",
            "set_base_model_state_dict",
            "shift_tokens_right",
            "transpose",
        ),
        "protocols": ("PeftType", "TaskType"),
        "protocols.config": ("CONFIG_NAME",),
    },
}
"""The names in the modules that Hugging Face PEFT has beside its main one, and where they are defined."""
_RENAMED = {
    "SAFETENSORS_WEIGHTS_NAME": ("model.checkpoints.stored_adapter", "WEIGHTS_NAME"),
    "_set_adapter": ("interop.functional", "set_adapter"),
}
_LAYERS = "layers"
"""In place of a module: the class that layers with an adapter of a method are of."""
_TARGETS = ("TRANSFORMERS_MODELS_TO_", "_MAPPING")
"""What the names of the tables of default layers begin and end with."""


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


def find(name: str, inside: str = "") -> Any:
    """The object that has a public name, in this package or in a module ``inside`` it.

    Raises:
        AttributeError: there is none.
        ImportError: Hugging Face PEFT has it and we have not, and it is imported by ``from``.
    """
    home = (_names_in(inside) if inside else _HOMES).get(name) or (None if inside else homes().get(name))
    if home is not None:
        module, own = _RENAMED.get(name, (home, name))
        if home == "interop.names" and name.startswith(_TARGETS[0]):
            table = import_module(".interop.names", __package__).targets_mapping
            return table(name.removeprefix(_TARGETS[0]).removesuffix(_TARGETS[1]))
        if home == _LAYERS:
            return import_module(".interop.names", __package__).layer_class(name)
        return getattr(import_module(f".{module}", __package__), own)
    if not inside and name in (*_SUBMODULES, "optimizers"):
        return import_module(f".{name}", __package__)
    place = f"{__package__}.{inside}" if inside else __package__
    reason = absent(name)
    # ``from … import`` would say "cannot import name" alone of an AttributeError.
    asked_by_from = sys._getframe(2).f_code.co_name == "_handle_fromlist"
    raise (ImportError if reason and asked_by_from else AttributeError)(
        f"module {place!r} has no attribute {name!r}" + (f": {reason}" if reason else "")
    )


def _names_in(inside: str) -> dict[str, str]:
    """The names of a submodule and where they are defined."""
    found = {name: module for module, names in _SUBMODULES.get(inside, {}).items() for name in names}
    if kind := inside.partition(".")[2]:
        found |= _names_of(kind)
    if inside == "tuners":
        found |= {
            name: home
            for name, home in homes().items()
            if home.startswith("methods.") or (name.endswith("Model") and home == "model.models")
        }
    if inside == "utils":
        types = {method.name.replace("_", "") for method in ours()}
        tables = [f"{kind}_TARGET_MODULES" for kind in types] + ["IA3_FEEDFORWARD_MODULES"]
        found |= {name.join(_TARGETS): "interop.names" for name in tables}
        found |= dict.fromkeys(_RENAMED, "interop.names")
    return found


def _names_of(kind: str) -> dict[str, str]:
    """The names of the methods in one file, with the classes of their layers."""
    every = homes()
    found: dict[str, str] = {}
    for method in ours():
        if _file_of(method) == kind:
            name = method.config_class.__name__.removesuffix("Config")
            found |= {own: home for own, home in every.items() if home == f"methods.{kind}"}
            found |= {own: every[own] for own in (f"{name}Model",) if own in every} | {f"{name}Layer": _LAYERS}
    return found


def _file_of(method: Method[Any]) -> str:
    return type(method).__module__.rpartition(".")[2]


def tuners() -> list[str]:
    """The modules in ``tuners``: one for each file of methods, and ``tuners_utils``."""
    return sorted({_file_of(method) for method in ours()} | {"tuners_utils"})


def make_modules(package: str, inside: str, names: Iterable[str]) -> None:
    """Makes modules of these names in a package, where scripts import what ``submodule(inside)`` has."""
    found = dict(zip(("__getattr__", "__dir__"), submodule(inside), strict=True))
    for name in names:
        module = ModuleType(f"{package}.{name}", "Names as Hugging Face PEFT lays them out; see ``public.py``.")
        module.__dict__.update(found, __path__=[])
        sys.modules[module.__name__] = module
        setattr(sys.modules[module.__name__.rpartition(".")[0]], name.rpartition(".")[2], module)


def submodule(inside: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a module whose names are looked up here."""

    def lookup(name: str) -> Any:
        if name == "__all__":
            return names()
        if name.startswith("__"):
            raise AttributeError(f"module '{__package__}.{inside}' has no attribute {name!r}")
        return find(name, inside)

    def names() -> list[str]:
        return sorted(_names_in(inside))

    return lookup, names
