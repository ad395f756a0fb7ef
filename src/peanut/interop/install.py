"""``install``: functions of Hugging Face PEFT that are given a model or a config of ours do what ours do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ..model.adapters.adapter_set import AdapterSet
from ..protocols import PeftConfig

__all__ = ["dispatched", "install", "installed", "uninstall"]

_MAPPING = "peft.utils.transformers_weight_conversion"
_MODULES = {
    "peft.mapping": ("inject_adapter_in_model",),
    "peft.mapping_func": ("get_peft_model",),
    "peft.utils.save_and_load": (
        "get_peft_model_state_dict",
        "set_peft_model_state_dict",
        "get_base_model_state_dict",
        "set_base_model_state_dict",
    ),
    "peft.tuners.tuners_utils": ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"),
    "peft.peft_model": ("get_layer_status", "get_model_status"),
    "peft.helpers": ("rescale_adapter_scale",),
    "peft.utils.hotswap": (
        "check_hotswap_configs_compatible",
        "hotswap_adapter",
        "hotswap_adapter_from_state_dict",
        "prepare_model_for_compiled_hotswap",
    ),
    "peft.utils.other": ("fsdp_auto_wrap_policy",),
    "peft.tuners.lora.conversion": ("convert_to_lora", "save_as_lora"),
    "peft.optimizers.lorafa": ("create_lorafa_optimizer",),
    "peft.optimizers.loraplus": ("create_loraplus_optimizer",),
    "peft.optimizers.riemannian": ("create_riemannian_optimizer",),
    _MAPPING: ("build_peft_weight_mapping",),
}
"""The functions of Hugging Face PEFT that look into models, by the module that defines them; ours have their names."""
_HOMES = {
    "peft.tuners.tuners_utils": "functional",
    "peft.helpers": "helpers",
    "peft.utils.hotswap": "utils.hotswap",
    "peft.utils.other": "utils",
    "peft.optimizers.lorafa": "optimizers",
    "peft.optimizers.loraplus": "optimizers",
    "peft.optimizers.riemannian": "optimizers",
}
"""Where ours are, if not among the public names of this package."""
_ORIGINALS: dict[str, FunctionType] = {}
"""What was installed, by name: the function as it was."""


def install() -> None:
    """Lets Hugging Face PEFT's functions take models and configs of ours, wherever they were imported to.

    For libraries that call them: ``SFTTrainer(peft_config=...)`` of TRL, ``model.add_adapter(config)`` of transformers.
    Objects of Hugging Face PEFT's own are treated as before. A second call does nothing; ``uninstall`` undoes it.

    Raises:
        ModuleNotFoundError: Hugging Face PEFT is not installed.
    """
    for module, names in _MODULES.items():
        for name in names:
            if name not in _ORIGINALS:
                function = getattr(import_module(module), name)
                # Whoever imported the function holds this object, so it stays, and what it does is exchanged.
                original = FunctionType(
                    function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
                )
                original.__kwdefaults__ = function.__kwdefaults__
                _ORIGINALS[name] = original
                function.__signature__ = inspect.signature(function)
                function.__code__ = _calling(module, name, function.__code__)


def installed() -> bool:
    """Whether ``install`` holds."""
    return bool(_ORIGINALS)


def uninstall() -> None:
    """Undoes ``install``."""
    for module, names in _MODULES.items():
        for name in names:
            original = _ORIGINALS.pop(name, None)
            if original is not None:
                function = getattr(import_module(module), name)
                function.__code__ = original.__code__
                del function.__signature__


def dispatched(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the function of a name: ours if an argument is ours, else Hugging Face PEFT's as it was."""
    function: Callable[..., Any] = _ORIGINALS[name]
    if module != _MAPPING and any(_is_ours(value) for value in (*args, *kwargs.values())):
        function = getattr(import_module(f"...{_HOMES.get(module, '')}", __name__), name)
    answer = function(*args, **kwargs)
    return _with_magnitudes(answer, *args, **kwargs) if module == _MAPPING else answer


def _with_magnitudes(renamings: list[Any], conversions: Any, adapter_name: str, *_: Any, **__: Any) -> list[Any]:
    """What transformers renames of an adapter's file: in a layer, the magnitudes of DoRA are the weight of a module.

    Without this, ``load_adapter`` and ``AutoModel.from_pretrained`` leave a DoRA adapter's magnitudes as they start.
    """
    from transformers.core_model_loading import WeightRenaming

    there = f"lora_magnitude_vector.{adapter_name}"
    return [*renamings, WeightRenaming(rf"{re.escape(there)}$", f"{there}.weight")] if renamings else renamings


def _is_ours(value: object) -> bool:
    if isinstance(value, nn.Module):
        value = getattr(value, "_orig_mod", value)  # of a compiled one
        return isinstance(getattr(value, "adapters", None), AdapterSet) or "_adapter_set" in value.__dict__
    return isinstance(value, PeftConfig)


def _template(*args: Any, **kwargs: Any) -> Any:
    import sys

    return sys.modules["WHERE"].dispatched("MODULE", "NAME", args, kwargs)


def _calling(module: str, name: str, replaced: CodeType) -> CodeType:
    code = _template.__code__
    given = {"NAME": name, "MODULE": module, "WHERE": __name__}
    constants = tuple(given.get(constant, constant) for constant in code.co_consts)
    return code.replace(co_name=name, co_consts=constants, co_freevars=replaced.co_freevars)
