"""Whether a layer's output is what its weight, read as a matrix, says: the rest can be adapted, but not read or merged.

torchao's tensors, sparse ones, 8-bit floats, layers that keep their weight packed or quantise it in their forward: an
adapter that only adds to the output or turns the input is right on all of them, since the layer itself is called.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from ..errors import PeanutError
from ..operators import Dense
from .attention import InProjection
from .kind import DTYPES, LayerKind, as_its_class, is_plain
from .made import current
from .stored import stored

__all__ = ["check_layer", "unreadable"]


def check_layer(module: Any) -> None:
    """Refuses a layer that no adapter can act on.

    Raises:
        PeanutError: its weight has no shape yet, is complex, or is spread over several processes.
    """
    weight = current(module, "weight")
    distributed = sys.modules.get("torch.distributed.tensor")
    if isinstance(module, InProjection) and weight is None:
        raise PeanutError(
            "a MultiheadAttention whose query, key and value have different sizes",
            "one in_proj_weight for all three",
            "leave this layer out",
        )
    if isinstance(weight, UninitializedParameter):
        raise PeanutError(
            f"a {type(module).__name__} whose weight has no shape yet", "a layer that knows its sizes", "call it once"
        )
    if isinstance(weight, Tensor) and weight.is_complex():
        raise PeanutError(f"a weight of {weight.dtype}", "real numbers", "leave this layer out")
    if distributed is not None and isinstance(weight, distributed.DTensor):
        raise PeanutError(
            f"a weight that is a DTensor over {weight.device_mesh.size()} processes",
            "a whole weight in each process",
            "add adapters first, and shard the adapted model (fully_shard)",
        )


def unreadable(module: Any, kind: LayerKind, weight: Any) -> str | None:
    """Why ``weight`` does not tell what the layer computes, ``None`` if it does."""
    if not isinstance(weight, Tensor):
        return f"a {type(module).__name__} has no tensor called weight"
    if not kind.fits(module, weight):
        return f"the weight of a {type(module).__name__} has the shape {tuple(weight.shape)}"
    valueless = weight.is_meta or type(weight).__name__ == "FakeTensor"  # there is nothing to try
    if not is_plain(weight) and not (valueless or _behaves(kind.matrix(module, weight))):
        layout = "" if weight.layout is torch.strided else f" ({weight.layout})"
        return f"the weight is a {type(weight).__name__} of {weight.dtype}{layout}, not a plain tensor"
    if not (valueless or (as_its_class(module) and kind.usual(module)) or _computes(module, kind)):
        return f"a {type(module).__name__} computes something else than the product with its weight"
    return None


@torch.no_grad()
def _behaves(matrix: Tensor) -> bool:
    """Whether a tensor of another class answers and takes numbers as plain ones do, whatever is done with it."""
    if matrix.dtype not in DTYPES:
        return False
    try:
        plain = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device).copy_(matrix)
        factor = torch.ones(matrix.shape[1], 1, dtype=matrix.dtype, device=matrix.device)
        for found, expected in (
            (matrix @ factor, plain @ factor),
            (matrix.T.reshape(-1), plain.T.reshape(-1)),
            (matrix.to(torch.float64)[:1] * 2, plain.to(torch.float64)[:1] * 2),
            (matrix.clone().copy_(plain + plain), plain + plain),
            (torch.addmm(matrix, factor.new_ones(len(matrix), 1), factor.T), plain + 1),
        ):
            if not torch.equal(torch.empty_like(expected).copy_(found), expected):
                return False
    except Exception:  # whatever such a class raises where it has no answer
        return False
    return True


@torch.no_grad()
def _computes(module: Any, kind: LayerKind) -> bool:
    """Whether a layer with a forward of its own computes the product with its weight, tried on a small input.

    The weight is the one that the layer has now, also while something is merged into it.
    """
    weight = stored(module, "weight")
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # adapters may be being made on the meta device
        x = kind.trial(module, generator)
    x = x.to(weight.device)
    x = x.to(weight.dtype) if x.is_floating_point() else x
    before = [(value, value.clone()) for value in module.buffers()]  # a forward may count in them
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            found = module.forward(x)
        expected = kind.respond(module, x, Dense(kind.matrix(module, weight)))
        bias = getattr(module, "bias", None)
        expected = expected if bias is None else kind.on_output(module, expected, lambda y: y + bias)
        tolerance = max(1e-4, 4 * torch.finfo(weight.dtype).eps)
        return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
    except Exception:  # it takes other inputs, or this machine cannot run it
        return False
    finally:
        for value, own in before:
            value.copy_(own)
