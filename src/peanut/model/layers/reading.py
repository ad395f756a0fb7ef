"""``Reading``: the weight of an adapted layer where another module reads it instead of calling the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ...errors import PeanutError
from ...operators.delta import captured
from ...stack import called_by, in_a_function
from ...weights.memory import storage_of

__all__ = ["Reading"]

_TOLD = frozenset(
    [
        *("__len__", "device", "dim", "dim_order", "dtype", "element_size", "get_device", "is_complex", "is_conj"),
        *("is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_inference", "is_ipu", "is_leaf", "is_maia"),
        *("is_meta", "is_mkldnn", "is_mps", "is_mtia", "is_neg", "is_nested", "is_quantized", "is_signed", "is_sparse"),
        *("is_sparse_csr", "is_vulkan", "is_xla", "is_xpu", "itemsize", "layout", "name", "names", "nbytes", "ndim"),
        *("ndimension", "nelement", "numel", "shape", "size", "storage_offset", "stride", "type"),
    ]
)
"""What can be told of a weight without its values; ``self.wo.weight.dtype`` is read by many models in each forward.

Not ``requires_grad``, which the adapters decide.
"""

_WRITING = frozenset(["__set__", "__setitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"])


class Reading(Tensor):
    """A weight W⁰ that stands for W': it has no values of its own, and W' is made once some function wants them.

    So a module that computes with the weight of an adapted layer computes with the adapters (and is no faster than
    W' can be written out), one that asks for a dtype costs nothing, and what cannot be given W' is an error: it never
    gets the weight without the adapters. torch's own fast paths (of ``nn.TransformerEncoderLayer``) call the layer
    when they see one.

    Args:
        weight: W⁰, whose shape, dtype and other attributes are told.
        values: makes W'.
        path: where the layer is.
    """

    weight: Tensor
    values: Callable[[], Tensor]
    path: str
    trains: bool

    @staticmethod
    def __new__(cls, weight: Tensor, values: Callable[[], Tensor], path: str) -> Reading:
        made: Reading = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device, layout=weight.layout
        )
        made.weight, made.values, made.path, made.trains = weight, values, path, torch.is_grad_enabled()
        made._is_param = True  # isinstance(…, torch.nn.Parameter)
        return made

    def __init__(self, weight: Tensor, values: Callable[[], Tensor], path: str) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, first = _name(func), args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            if name in _TOLD and not (name == "type" and (args[1:] or kwargs)):  # of another dtype
                return func(*args, **kwargs)
        if name == "grad_fn" and isinstance(first, Reading) and called_by(nn.Module.register_parameter):
            raise _refusal(first.path, "made a parameter of a module in a forward")
        _refuse_writing(name, args, kwargs)
        if isinstance(first, Reading) and name in ("data", "detach"):
            return Reading(first.weight, lambda: first.values().detach(), first.path)
        given = tree_map_only(Reading, Reading._made, (args, kwargs))
        return _Values.__torch_function__(func, types, *given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, Reading))
        raise _refusal(found.path, f"read by {func}")

    def _made(self) -> _Values:
        """W'."""
        if self.trains and in_a_function():
            raise _refusal(self.path, "read in a torch.autograd.Function, which would give the adapters no gradient")
        self.made = self.values()  # held, as a kernel may ask for its address
        return _Values.of(self.made, self.path)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "values", "path", "trains"):
            raise AttributeError(name)
        return getattr(self.weight, name)  # what others have hung on the parameter


class _Values(Tensor):
    """W' as it was made for one function, or a part of it: what is written to it would be lost."""

    path: str

    @staticmethod
    def of(values: Tensor, path: str) -> _Values:
        made = values.as_subclass(_Values)
        made.path = path
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_writing(_name(func), args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            answer = func(*args, **kwargs)
            read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, _Values)]
            if captured() or not read:
                return answer
            paths = {storage_of(each): each.path for each in read}
            return tree_map_only(
                Tensor, lambda y: _Values.of(y, paths[storage_of(y)]) if storage_of(y) in paths else y, answer
            )


def _refuse_writing(name: str, args: Any, kwargs: Any) -> None:
    """Refuses functions that write to a tensor that is read.

    Raises:
        PeanutError: it is one.
    """
    written: Any = ()
    if name in _WRITING or (name[-1:] == "_" != name[-2:-1]):
        written = args[:1] or [*kwargs.values()][:1]  # torch.nn.init gives it by name
    elif kwargs.get("inplace"):
        written = args
    for each in tree_leaves((written, kwargs.get("out"))):
        if isinstance(each, (Reading, _Values)):
            raise _refusal(each.path, "written in a forward")


def _refusal(path: str, what: str) -> PeanutError:
    return PeanutError(
        f"the weight of '{path}', which adapters change, is {what}",
        "a module that calls the layer, or reads its weight in functions of torch",
        "switch off what does so, or leave the layer out of target_modules (exclude_modules)",
    )


def _name(func: Any) -> str:
    """The name of a function of torch, or of the attribute that it reads."""
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name
