"""``Reading``: the weight of an adapted layer where another module reads it instead of calling the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...errors import PeanutError
from ...stack import in_a_function

__all__ = ["Reading"]

_TOLD = frozenset(
    [
        *("__len__", "device", "dim", "dtype", "element_size", "get_device", "is_complex", "is_contiguous", "is_cpu"),
        *("is_cuda", "is_floating_point", "is_leaf", "is_meta", "is_quantized", "is_sparse", "itemsize", "layout"),
        *("nbytes", "ndim", "ndimension", "nelement", "numel", "shape", "size", "stride"),
    ]
)
"""What can be told of a weight without its values; ``self.wo.weight.dtype`` is read by many models in each forward."""


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
        name = _name(func)
        with torch._C.DisableTorchFunctionSubclass():
            if name in _TOLD:
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, Reading):
            if name in ("__set__", "__setitem__") or name[:1] != "_" == name[-1:]:
                raise first._refusal("written in a forward")
            if name in ("data", "detach"):  # what is done to them is done to the weight
                return Reading(first.weight, lambda: first.values().detach(), first.path)
        given = tree_map_only(Reading, Reading._made, (args, kwargs))
        return func(*given[0], **given[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = next(each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, Reading))
        raise found._refusal(f"read by {func}")

    def _made(self) -> Tensor:
        """W'."""
        if self.trains and in_a_function():
            raise self._refusal("read in a torch.autograd.Function, which would give the adapters no gradient")
        self.made = self.values()  # held, as a kernel may ask for its address
        return self.made

    def _refusal(self, what: str) -> PeanutError:
        return PeanutError(
            f"the weight of '{self.path}', which adapters change, is {what}",
            "a module that calls the layer, or reads its weight in functions of torch",
            "switch the kernel off that does so, or leave the layer out of target_modules (exclude_modules)",
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "values", "path", "trains"):
            raise AttributeError(name)
        return getattr(self.weight, name)  # what others have hung on the parameter


def _name(func: Any) -> str:
    """The name of a function of torch, or of the attribute that it reads."""
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name
