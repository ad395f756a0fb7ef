"""``FrozenLayer``: a layer's original weight as a matrix, and merging into it, which can be undone bit for bit."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators.delta import recomputed
from .emptied import gathered, is_emptied
from .kind import LayerKind, as_its_class, is_plain
from .made import about_to_change, made_now
from .readable import unreadable
from .stored import device_of, offload_hook, some_tensor, store, stored

__all__ = ["FrozenLayer", "product"]


class FrozenLayer:
    """One frozen layer seen as y = W x + b, W of shape (out, in).

    ``matrix()`` and ``bias()`` are those before any merge, also while something is merged: a weight-aware method
    reads the weight that it was trained on. What accelerate has offloaded is read and written where it is.
    """

    def __init__(self, module: Any, kind: LayerKind) -> None:
        self.module = module
        self.kind = kind
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._shared: dict[str, nn.Parameter] = {}
        self._tied: nn.Parameter | None = None
        self._seen: tuple[Any, str | None] = None, None

    @property
    def out_features(self) -> int:
        return self.kind.shape(self.module)[0]

    @property
    def in_features(self) -> int:
        return self.kind.shape(self.module)[1]

    @property
    def features(self) -> tuple[str, int]:
        """The side that can be rotated, ``"input"`` (of an embedding, which reads ids, ``"output"``), and its width."""
        return ("input", self.in_features) if self.kind.takes_activations else ("output", self.out_features)

    @property
    def merged(self) -> bool:
        return self._weight is not None

    @property
    def untied_from(self) -> nn.Parameter | None:
        """The weight that the layer had shared with another, if a merge gave it one of its own."""
        return self._tied

    @property
    def offloaded(self) -> bool:
        """Whether the weight is offloaded."""
        own = self.module._parameters.get("weight")
        return isinstance(own, Tensor) and own.is_meta and offload_hook(self.module) is not None

    @property
    def without_storage(self) -> bool:
        """Whether the weight is nowhere."""
        own = self.module._parameters.get("weight")
        return own is not None and own.is_meta and offload_hook(self.module) is None

    @property
    def weight(self) -> Tensor:
        """The weight before any merge, as the layer stores it."""
        if self._weight is None:
            return stored(self.module, "weight")  # type: ignore[no-any-return]
        return self._weight if self.kind.quantised else self._weight.to(device_of(self.module, "weight"))

    @property
    def beside(self) -> Tensor:
        """A tensor of the layer, its weight if it has one: adapters' tensors are on its device."""
        weight: Any = self.weight
        found = weight if isinstance(weight, Tensor) else some_tensor(self.module)
        if found is None:
            raise PeanutError(f"a {type(self.module).__name__} without tensors", "a layer with a weight")
        return found

    def matrix(self) -> Tensor:
        """W before any merge, (out, in).

        Raises:
            PeanutError: the layer does not compute its output with a weight that can be read.
        """
        return self.kind.matrix(self.module, self.readable(self.weight))

    def readable(self, weight: Tensor) -> Tensor:
        """``weight``, the layer's, if its numbers are what the layer computes with; gathered, if it is emptied.

        Raises:
            PeanutError: they are not.
        """
        reason = None if torch.compiler.is_compiling() else self.unreadable(weight)
        if reason is not None:
            raise PeanutError(
                reason,
                "a weight that can be read as a matrix",
                "leave this layer out, or use a method that does not read weights (LoRA) and do not merge it",
            )
        return weight if torch.compiler.is_compiling() else gathered(weight)

    def unreadable(self, weight: Any) -> str | None:
        """Why ``weight``, the layer's, does not tell what the layer computes, ``None`` if it does."""
        kind, module = self.kind, self.module
        if about_to_change(module, "weight"):
            return (
                "the weight changes in each forward of training, by torch.nn.utils.spectral_norm (that of "
                "parametrizations, or eval() of the layer, would do)"
            )
        if is_emptied(weight):  # there is nothing to try
            return None
        if kind.quantised:
            return "codes of a quantised weight that is offloaded" if self.offloaded else None
        if is_plain(weight) and as_its_class(module) and kind.usual(module) and kind.fits(module, weight):
            return None
        seen = type(weight), *(getattr(weight, name, None) for name in ("dtype", "shape", "is_meta"))
        if self._seen[0] != seen:
            self._seen = seen, unreadable(module, kind, weight)
        return self._seen[1]

    def product(self, A: Tensor, *, transposed: bool = False) -> Tensor:
        """W Aᵀ for A (r, in), or transposed Wᵀ Aᵀ for A (r, out): (out, r) or (in, r) in A's dtype.

        W is read in its own dtype and never copied to another.
        """
        module, kind, weight = self.module, self.kind, self.readable(self.weight)

        def times(A: Tensor) -> Tensor:
            matrix = kind.matrix(module, weight)
            return product(matrix.T if transposed else matrix, A)

        return recomputed(times, A) if kind.quantised else times(A)  # the backward makes the matrix of its codes again

    def bias(self) -> Tensor | None:
        """b before any merge, (out), or ``None``."""
        bias: Tensor | None = stored(self.module, "bias")
        return bias if bias is None or self._bias is None else self._bias.to(bias.device)

    def down_shape(self, r: int) -> tuple[int, ...]:
        """The shape in which files keep a factor (r, in)."""
        return self.kind.down_shape(self.module, r)

    def up_shape(self, r: int) -> tuple[int, ...]:
        """The shape in which files keep a factor (out, r)."""
        return self.kind.up_shape(self.module, r)

    @torch.no_grad()
    def write(self, matrix: Tensor, bias: Tensor | None, *, shared: Collection[str] = ()) -> None:
        """Puts a merged matrix (out, in) and bias (out) in place; the first time, saves the originals on the CPU.

        Args:
            bias: the new b, or ``None`` to leave it.
            shared: which of ``weight`` and ``bias`` others use too (a tied head) and must not see change.

        Raises:
            PeanutError: a value is not finite, or there is a bias to write and the layer has none.
        """
        weight = stored(self.module, "weight")
        if is_emptied(weight):
            raise PeanutError(
                "a weight that DeepSpeed's third stage has emptied",
                "one that can be written",
                "save the adapter, and merge it into a base in one process",
            )
        self._seen = None, None  # what the layer computes may have changed since it was tried
        self.readable(weight)
        merged = self.kind.layout(self.module, matrix)
        merged = merged if self.kind.quantised else merged.to(weight.dtype)
        if not torch.isfinite(merged).all() or (bias is not None and not torch.isfinite(bias).all()):
            raise PeanutError(
                "the merged weight holds values that are not finite", "finite values", "check the adapter's training"
            )
        own_bias = self.bias()
        if bias is not None and own_bias is None:
            raise PeanutError(
                "the adapter changes the bias of a layer that has none", "a layer with a bias", "use it unmerged"
            )
        if self._weight is None:
            # Codes are small and stay where they are; another parameter takes their place.
            self._weight = weight if self.kind.quantised else weight.detach().to("cpu", copy=True)
            if self.kind.quantised:
                self._shared["weight"] = weight
            elif "weight" in shared:
                self._tied = self.module.weight
                self._share_no_more("weight")
        if self.kind.quantised:
            self.kind.install(self.module, self.kind.quantise(self.module, merged))
        else:
            store(self.module, "weight", merged)
        if bias is not None and own_bias is not None:
            if self._bias is None:
                self._bias = own_bias.detach().to("cpu", copy=True)
                if "bias" in shared:
                    self._share_no_more("bias")
            store(self.module, "bias", bias)

    def output(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        module = self.module
        made = made_now(module) if "parametrizations" in module._modules else {}
        return self.kind.called_with(module, made, x, *args, **kwargs) if made else module(x, *args, **kwargs)

    def original(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with its original weight, bit for bit; the merged weight stays where others read it."""
        if not self.merged:
            return self.output(x, *args, **kwargs)
        own, bias = {"weight": self.weight}, self.bias()
        return self.kind.called_with(self.module, own if bias is None else {**own, "bias": bias}, x, *args, **kwargs)

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes every merge, bit for bit."""
        if self._weight is None:
            return
        for name, own in () if self.kind.quantised else self._shared.items():
            now = self.module._parameters[name]
            if now is not None and not now.is_meta:  # the module may have been moved or cast meanwhile
                own.data = own.data.to(now.device, now.dtype)
        if "weight" in self._shared:
            self.kind.install(self.module, self._shared["weight"])
        else:
            store(self.module, "weight", self._weight)
        if "bias" in self._shared:
            self.module.bias = self._shared["bias"]
        elif self._bias is not None:
            store(self.module, "bias", self._bias)
        self.forget()

    def forget(self) -> None:
        """Makes the merge permanent: the saved originals are discarded."""
        self._weight = self._bias = self._tied = None
        self._shared = {}

    def _share_no_more(self, name: str) -> None:
        """Puts a tensor of the layer's own in the place of one that others use; what is offloaded is one anyway."""
        own = self.module._parameters.get(name)
        if own is not None and not self.offloaded:
            self._shared[name] = own
            setattr(self.module, name, nn.Parameter(own.detach().clone(), own.requires_grad))


def product(matrix: Tensor, A: Tensor) -> Tensor:
    """M Aᵀ for M (e, d), read in its own dtype and never copied to another, and A (r, d): (e, r), in A's dtype."""
    return (matrix @ A.to(matrix.dtype).T).to(A.dtype)
