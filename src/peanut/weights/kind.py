"""``LayerKind``: the interface of a kind of layer, which says how its weight is stored and applied."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..operators import Delta
from .made import current, made_by
from .stored import called_onloaded, offload_hook

__all__ = ["DTYPES", "LayerKind", "as_its_class", "is_plain", "unhooked", "with_tensors"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a weight's numbers may be stored in to be read as they are."""

_CLASSES = (nn.Parameter, Tensor)


class LayerKind(ABC):
    """One kind of layer seen as a matrix W of shape (out, in).

    Laws: ``layout(m, matrix(m, m.weight))`` is ``m.weight`` bit for bit; ``respond(m, x, Δ)`` is what is
    added to the layer's output when W becomes W + Δ.
    """

    name: ClassVar[str]
    quantised: ClassVar[bool] = False
    """Whether the weight is stored as codes, which ``matrix`` turns into numbers and ``quantise`` makes of them."""
    takes_activations: ClassVar[bool] = True
    """Whether the input is activations (dropout makes sense), not ids."""
    takes_features: ClassVar[bool] = False
    """Whether the columns of the matrix are the last dimension of the input, which can be rotated and scaled."""
    dims: ClassVar[int | None] = 2
    """How many dimensions the weight has as it is stored; ``None`` for any number."""
    multiplies: ClassVar[bool] = True
    """Whether the output is the matrix applied to the input, so that changes of the matrix are changes of it."""

    @abstractmethod
    def matches(self, module: object) -> bool:
        """Whether ``module`` is a layer of this kind."""

    @abstractmethod
    def shape(self, module: Any) -> tuple[int, int]:
        """(out, in) of the matrix."""

    @abstractmethod
    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        """``weight``, as the layer stores it, seen as the matrix (out, in); a view where possible."""

    @abstractmethod
    def layout(self, module: Any, matrix: Tensor) -> Tensor:
        """The matrix (out, in) as the layer stores it."""

    def fits(self, module: Any, weight: Tensor) -> bool:
        """Whether ``weight`` has the shape of the layer's weight."""
        return (self.dims is None or weight.dim() == self.dims) and weight.numel() == math.prod(self.shape(module))

    def usual(self, module: Any) -> bool:
        """Whether the layer's class computes what is said above, without looking at what it computes."""
        return True

    def trial(self, module: Any, generator: torch.Generator) -> Tensor:
        """A small input that shows what a layer computes whose class has a forward of its own."""
        return torch.randn(2, self.shape(module)[1], generator=generator)

    def fix_storage(self, module: Any) -> None:  # noqa: B027 - most layers do nothing of the kind
        """Prevents the layer from changing how it stores its weight while adapters read it."""

    def quantise(self, module: Any, matrix: Tensor) -> nn.Parameter:
        """The parameter that stores ``matrix`` as codes, of the type that the layer has (only of quantised kinds)."""
        raise NotImplementedError

    def install(self, module: Any, weight: nn.Parameter) -> None:
        """Puts ``weight`` in place of the layer's own parameter."""
        module.weight = weight

    def called_with(self, module: Any, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The layer's output with another weight (as the layer stores it) and bias; the layer itself is unchanged."""
        return with_tensors(module, tensors, *args, **kwargs)

    @abstractmethod
    def respond(self, module: Any, x: Tensor, delta: Delta) -> Tensor:
        """What ``delta`` adds to the layer's output for the input ``x``."""

    def down_shape(self, module: Any, r: int) -> tuple[int, ...]:
        """The shape in which files keep a factor (r, in)."""
        return (r, self.shape(module)[1])

    def up_shape(self, module: Any, r: int) -> tuple[int, ...]:
        """The shape in which files keep a factor (out, r)."""
        return (self.shape(module)[0], r)

    def fused(self, module: nn.Module) -> bool:
        """Whether the layer computes just ``x Wᵀ + b``, nothing hooked in, so that a change may join its product."""
        return False

    def mixes(self, module: Any) -> bool:
        """Whether every output depends on the whole input, so that the weight can hold a matrix that mixes outputs."""
        return True

    def on_output(self, module: Any, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function``, of features in the last dimension, applied to the layer's output."""
        return function(y)

    def replaced(self, module: Any, x: Tensor, y: Tensor, changed: Tensor) -> Tensor:
        """``changed`` in the place of the output y for x, as if the weight had been changed."""
        return changed


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The output of ``module`` with other tensors in the place of its parameters.

    The module itself is left alone, as another thread may be calling it. Only a compiled graph, and a forward that was
    put on the module itself, need the tensors in the module; and where accelerate has offloaded the module's own, they
    are brought for the call.
    """
    if offload_hook(module) is not None:
        return called_onloaded(module, tensors, *args, **kwargs)
    if torch.compiler.is_compiling() or "forward" in module.__dict__:
        return torch.func.functional_call(module, dict(tensors), args, kwargs)
    # Whatever puts tensors of these names into the module otherwise stays outside: FSDP, which keeps views of its own
    # among the attributes, parametrisations, which are a class, and hooks that make them (weight_norm, pruning).
    kind = type(module)
    if "parametrizations" in module._modules:
        kind, made = parametrize.type_before_parametrizations(module), cast(nn.ModuleDict, module.parametrizations)
        tensors = {**{name: current(module, name) for name in made if name not in tensors}, **tensors}
    twin = kind.__new__(kind)
    twin.__dict__ = own = {
        **{name: value for name, value in module.__dict__.items() if name not in tensors},
        "_parameters": {**module._parameters, **tensors},
        "_forward_pre_hooks": {
            key: hook for key, hook in module._forward_pre_hooks.items() if made_by(hook) not in tensors
        },
    }
    before = dict(own)
    try:
        return twin(*args, **kwargs)
    finally:  # what the forward or a hook has set: a count of calls, an output that is looked at later
        module.__dict__.update((name, value) for name, value in own.items() if before.get(name, own) is not value)


def as_its_class(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class: not one that somebody put on it; accelerate's calls that one."""
    return "forward" not in module.__dict__ or "_hf_hook" in module.__dict__


def is_plain(weight: Any) -> bool:
    """Whether a weight is a tensor of numbers like any other."""
    return type(weight) in _CLASSES and weight.layout is torch.strided and weight.dtype in DTYPES


def unhooked(module: nn.Module, forward: Any) -> bool:
    """Whether calling ``module`` runs ``forward`` of its class and nothing else."""
    return (
        type(module).forward is forward
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "parametrizations" not in module._modules
    )
