"""``AsBase``: what Trainers know a model by, answered as the base model would."""

from __future__ import annotations

import inspect
import re
import sys
from types import FrameType
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..errors import PeanutError
from ..identity import Recognised
from ..protocols import METHODS, InputMethod, method_of
from ..stack import caller
from .layers.adapted import refuse_symbolic

__all__ = ["AsBase", "blank", "inspected"]

M = TypeVar("M", bound="AsBase")


class AsBase(Recognised, nn.Module):
    """A wrapper around a base model whose class, for each class of base, has that base's parameters of forward."""

    shown: ClassVar[tuple[type[AsBase], type[nn.Module]] | None] = None
    """This class, and the base's class whose parameters of forward it shows, where it does."""

    def show(self, base: nn.Module, task: object = None) -> None:
        """Becomes the class of its task, and shows the parameters of the forward of ``base``."""
        own = self.shown[0] if self.shown else type(self)
        self.__class__ = _shown_as(own.of_task(task), type(base))

    @classmethod
    def of_task(cls: type[M], task: object) -> type[M]:
        """The class of the models of a task."""
        return cls

    def counterparts(self) -> tuple[tuple[str, str], ...]:
        own = self.shown[0] if self.shown else type(self)
        return (("peft", own.__name__), ("peft", "PeftModel"))

    def _virtual(self) -> list[InputMethod[Any]]:
        """The methods of the active adapters that add virtual tokens."""
        own: Any = self
        methods = [method_of(own.peft_config[name].peft_type) for name in own.active_adapters]
        return [each for each in methods if isinstance(each, InputMethod) and each.prepends == "tokens"]

    @property
    def loss_type(self) -> Any:
        """The base's, by which Trainers count the labels that a loss compares.

        A causal loss has nothing that predicts the first label; behind virtual tokens it has, so all labels count.
        """
        own: Any = self
        all_count = any(not each.own_loss for each in self._virtual())
        return "" if all_count else getattr(own.get_base_model(), "loss_type", None)

    def _get_name(self) -> str:
        """The base's name, by which transformers' Trainer knows whether label smoothing has to shift the labels."""
        own: Any = self
        base = own.get_base_model()
        name: str = getattr(base, "_orig_mod", base)._get_name()
        return name

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        return made if self.shown is None else (blank, self.shown, *made[2:])


def inspected(asking: FrameType) -> bool:
    """Whether transformers' Trainer asks for a base model, to see which columns and labels the model takes.

    It does where Hugging Face PEFT is installed; this model takes task_ids and the like too, and counts other labels.
    """
    if asking.f_code.co_name == "unwrap_peft_model" and asking.f_back is not None:
        asking = asking.f_back
    return asking.f_globals.get("__name__") == "transformers.trainer"


def _check_smoothing(outputs: Any) -> None:
    """Refuses that transformers' own Trainer compares labels with more logits than there are labels."""
    if "transformers.trainer" not in sys.modules:
        return
    from transformers import Trainer
    from transformers.trainer_pt_utils import LabelSmoother

    asking = caller(Trainer.compute_loss)
    trainer, labels = (None, None) if asking is None else (asking.f_locals.get(name) for name in ("self", "labels"))
    if labels is None:
        return
    if not isinstance(getattr(trainer, "label_smoother", None), LabelSmoother):
        return
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if logits.shape[1:-1] != labels.shape[1:]:
        raise PeanutError(
            f"label smoothing in {type(trainer).__name__} of {labels.shape[1]} labels a row, and {logits.shape[1]} "
            "logits: virtual tokens have some too",
            "peanut.Trainer, which leaves the virtual tokens out",
            "use it, or set label_smoothing_factor=0",
        )


_SHOWN: dict[tuple[type[AsBase], type[nn.Module]], type[AsBase]] = {}


def _shown_as(own: type[AsBase], base: type[nn.Module]) -> type[AsBase]:
    """``own`` with the parameters of the base's forward, by which Trainers know a model's columns and labels."""
    if (own, base) in _SHOWN:
        return _SHOWN[own, base]

    def forward(self: AsBase, *args: Any, **kwargs: Any) -> Any:
        refuse_symbolic(args)
        outputs = own.forward(self, *args, **kwargs)
        if kwargs.get("labels") is None and not torch.compiler.is_compiling() and self._virtual():
            _check_smoothing(outputs)
        return outputs

    signature = inspect.signature(base.forward)
    reads = [read for method in METHODS.values() if isinstance(method, InputMethod) for read in method.reads]
    named = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("adapter_names", "task_ids", *reads)
    }
    parameters = {**signature.parameters, **named}
    order = sorted(parameters.values(), key=lambda parameter: parameter.kind)
    forward.__signature__ = signature.replace(parameters=order)  # type: ignore[attr-defined]
    forward.__doc__ = own.forward.__doc__
    parts = {"forward": forward, "shown": (own, base), "__module__": own.__module__, "__doc__": own.__doc__}
    # By what it is for Trainers know the labels of question answering.
    kind = None if "For" in own.__name__ else re.search(r"For[A-Z].*", base.__name__)
    _SHOWN[own, base] = type(own.__name__ + (kind[0] if kind else ""), (own,), parts)
    return _SHOWN[own, base]


def blank(own: type[M], base: type[nn.Module]) -> M:
    """An empty instance, for unpickling to fill."""
    return nn.Module.__new__(_shown_as(own, base))  # type: ignore[return-value]
