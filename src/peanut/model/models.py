"""A model class for each method, for scripts that name one: ``LoraModel`` belongs to ``LoraConfig``."""

from __future__ import annotations

from typing import Any

from ..protocols import METHODS, Method
from .injection import AdaptedModel, get_peft_model_state_dict
from .xlora_model import XLoraModel

__all__ = ["AdaLoraModel", "VBLoRAModel", "XLoraModel", "model_of"]


class AdaLoraModel(AdaptedModel):
    """A model adapted by ADALORA."""

    method = "ADALORA"

    def update_and_allocate(self, global_step: int) -> None:
        """Accepted for scripts of Hugging Face PEFT: here the schedule follows the optimizer's steps by itself."""


class VBLoRAModel(AdaptedModel):
    """A model adapted by VBLORA."""

    method = "VBLORA"
    also = "VARIATIONAL_LORA"  # which VBLoRAConfig makes of vb_r, vb_pi, vb_beta

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """How many numbers of four bytes a file holds of the logits and the bank, and how many others are trained."""
        saved = get_peft_model_state_dict(self, adapter_name=adapter)
        own = sum(value.nbytes for key, value in saved.items() if "vblora_" in key)
        others = (value for name, value in self.named_parameters() if "vblora_" not in name and value.requires_grad)
        return own // 4, sum(value.numel() for value in others)

    def print_savable_parameters(self) -> None:
        """Prints them."""
        own, others = self.get_nb_savable_parameters()
        print(f"VB-LoRA: {own:,d} numbers of four bytes are saved; with others that are trained, {own + others:,d}")


def model_of(method: Method[Any]) -> type[AdaptedModel]:
    """The class of the models that a method adapts: a subclass that names the method, or one made here.

    It is ``AdaptedModel`` itself for input methods, and where another method's class is called the same.
    """
    own = [each for each in AdaptedModel.__subclasses__() if each.method == method.name]
    if own:
        return own[-1]
    name = method.model_name
    if name is None or _adapting(name) != method:
        return AdaptedModel
    parts = {"method": method.name, "__module__": __name__, "__doc__": f"A model adapted by {method.name}."}
    globals()[name] = made = type(name, (AdaptedModel,), parts)
    return made


def _adapting(name: str) -> Method[Any] | None:
    """The first method whose class of models has a name."""
    return next((method for method in METHODS.values() if method.model_name == name), None)


def __getattr__(name: str) -> type[AdaptedModel]:
    """A class that was not made yet: by its name, as pickle asks for it."""
    method = _adapting(name)
    if method is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_of(method)
