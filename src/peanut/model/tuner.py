"""``Tuner``: what scripts call on ``model.base_model``, as on the tuners of Hugging Face PEFT."""

from __future__ import annotations

from itertools import takewhile
from typing import Any, ClassVar

from torch import nn

from ..errors import PeanutError
from .adapters.adapter_set import AdapterSet
from .commands import AdapterCommands
from .layers.adapted import Adapted
from .layers.input import AdaptedInput
from .layers.output import AdaptedOutput
from .layers.plain_keys import output_keys, tuner_keys

__all__ = ["Tuner", "prefix_of"]


class Tuner(AdapterCommands, nn.Module):
    """The adapters of a base model, ``.model``: which act, which are merged, which are trained."""

    model: nn.Module
    uses_shared_state: ClassVar[bool] = False
    """Whether adapters can be put in by ``get_peft_model`` alone: here each can also be injected."""
    tuner_layer_cls: ClassVar[type[Adapted]] = Adapted

    @property
    def adapters(self) -> AdapterSet:
        """The adapters in the model."""
        return AdapterSet.of(self.model)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules where adapters act."""
        return [place.path for place in self.adapters.places()]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of parameters that adapters change apart from layers: none."""
        return []

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's config as a dictionary; without one, that it has no ``model_type``."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for place in self.adapters.places():
            tuner_keys(place, state_dict, prefix)
            if isinstance(place, AdaptedOutput):
                output_keys(place, state_dict, f"{prefix}model.{place.path}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``convert_to_lora`` takes an adapter; of all of them, if there is none of that name."""
        places = list(self.adapters.places(adapter_name if adapter_name in self.peft_config else None))
        return bool(places) and all(place.supports_lora_conversion(adapter_name) for place in places)

    # Which act

    def disable_adapter_layers(self) -> None:
        """From now on the model computes exactly what its base does, also if merged; all adapters are frozen."""
        self.adapters.enable(False)

    def enable_adapter_layers(self) -> None:
        """Undoes ``disable_adapter_layers``: what was active and trained is so again."""
        self.adapters.enable(True)


class _NoPrefixError(PeanutError, AttributeError):
    """There is no prefix; also a missing attribute, for what asks a model for all that it has."""


def prefix_of(adapters: AdapterSet) -> str:
    """What the names of all adapters' parameters have in them and no name of the base's: ``lora_``, ``peanut_``.

    Raises:
        PeanutError: there is no such word, as adapters are of several methods, or train biases too.
    """
    parts = {
        part
        for place in adapters.places()
        for part, held in _held_in(place)
        if not part.startswith("token_adapter.")  # rows of an embedding, beside any method
        and any(True for _ in held.parameters())  # no buffer is among a model's parameters
    }
    common = "".join(letters[0] for letters in takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))
    found = common if common in parts else common[: common.rfind("_") + 1]
    inside = {id(value) for name in adapters.configs for _, value in adapters.parameters(name)}
    taken = [name for name, value in adapters.model.named_parameters() if found in name and id(value) not in inside]
    if not found or taken:
        raise _NoPrefixError(
            f"adapters whose tensors are {', '.join(sorted(parts)) or 'none'}",
            "names that begin with one word, which the base's have not",
            "give the model adapters of one method, without trained biases",
        )
    return found


def _held_in(place: Adapted) -> list[tuple[str, nn.Module]]:
    """What adapters have in a place, by the name that it has there; of prompts the place as a whole."""
    if isinstance(place, AdaptedInput):
        return [(place.name, place)]
    return [(part, place.get_submodule(part)) for part in place.adapter_layer_names]
