"""What scripts of Hugging Face PEFT look up by name: tables by method and task, and names of classes that we have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import torch

from ..methods.trainable_tokens import TokenAdapter
from ..model.injection import AdaptedModel
from ..model.layers.adapted import Adapted
from ..model.layers.saved_modules import SavedModule
from ..model.models import model_of
from ..model.targets.architectures import ARCHITECTURES
from ..model.tuner import Tuner
from ..protocols import PeftConfig, WeightMethod
from ..protocols.input_method import PromptConfig
from ..protocols.registry import PeftType, registered

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "UPCAST_DTYPES",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "MixedModel",
    "ModulesToSaveWrapper",
    "PromptLearningConfig",
    "TrainableTokensWrapper",
    "layer_class",
    "targets_mapping",
]

V = TypeVar("V")

WEIGHTS_NAME = "adapter_model.bin"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)

PromptLearningConfig = PromptConfig
BaseTunerLayer = Adapted
BaseTuner = Tuner
AuxiliaryTrainingWrapper = ModulesToSaveWrapper = SavedModule
MixedModel = AdaptedModel


class _ByMethod(Mapping[PeftType, V]):
    """A table of the methods that are registered when one looks, but for those for which a function has ``None``."""

    def __init__(self, of: Callable[[Any], V | None]) -> None:
        self._of = of

    def __getitem__(self, name: object) -> V:
        value = self._of(registered()[name]) if name in registered() else None
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[PeftType]:
        return (PeftType(name) for name, method in registered().items() if self._of(method) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


_PREFIXES = {
    **dict.fromkeys(("ADALORA", "VARIATIONAL_LORA"), "lora_"),
    **dict.fromkeys(("LOREFT", "DIREFT"), "reft_"),
    "BITFIT": "trained_bias",
    "DIFF_PRUNING": "diff_",
    "VERA": "vera_lambda_",
}

PEFT_TYPE_TO_CONFIG_MAPPING: _ByMethod[type[PeftConfig]] = _ByMethod(lambda method: method.config_class)
PEFT_TYPE_TO_PREFIX_MAPPING: _ByMethod[str] = _ByMethod(lambda own: _PREFIXES.get(own.name, f"{own.name.lower()}_"))
PEFT_TYPE_TO_TUNER_MAPPING = _ByMethod(
    lambda method: None if issubclass(method.config_class, PromptConfig) else model_of(method)
)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = _ByMethod(
    lambda method: model_of(method) if isinstance(method, WeightMethod) else None
)


class _WithAdapter(type):
    """The class of classes whose instances are the layers that have an adapter of one method."""

    config_class: type[Any]

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Adapted) and any(
            isinstance(instance.method_of(name)[1], cls.config_class) for name in instance.adapters
        )


@cache
def layer_class(name: str) -> type:
    """``LoraLayer`` and the like, to be asked for with ``isinstance``; no layer is made of it.

    Raises:
        KeyError: no method's config class has that name.
    """
    config = {each.config_class.__name__: each.config_class for each in registered().values()}[
        f"{name.removesuffix('Layer')}Config"
    ]
    doc = f"A layer that has an adapter with a ``{config.__name__}``."
    return _WithAdapter(name, (), {"__module__": __name__, "__doc__": doc, "config_class": config})


class _BesideTokens(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Adapted) and any(
            isinstance(instance.method_of(name)[0], TokenAdapter) for name in instance.adapters
        )


class TrainableTokensWrapper(metaclass=_BesideTokens):
    """A layer of which tokens are trained beside another method, to be asked for with ``isinstance``."""


def targets_mapping(name: str) -> dict[str, Any]:
    """``TRANSFORMERS_MODELS_TO_…_MAPPING``: default layers by ``model_type``, read off the table of architectures."""
    field = {"IA3_TARGET_MODULES": "scaled_outputs", "IA3_FEEDFORWARD_MODULES": "scaled_inputs"}.get(name, "attention")
    found = {kind: getattr(known, field) for kind, known in ARCHITECTURES.items()}
    return {kind: each if isinstance(each, str) else list(each) for kind, each in found.items() if each}
