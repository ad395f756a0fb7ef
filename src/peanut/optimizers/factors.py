"""Which trained parameters are the factors A and B of a low-rank change."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..model.layers.adapted import walk
from ..model.layers.layer import AdaptedLayer

__all__ = ["in_embeddings", "is_last_factor", "pairs"]


def is_last_factor(name: str) -> bool:
    """Whether a parameter is the B of its method, the factor that starts at zero: ``lora_B``, ``peanut_B``, ….

    PEANuT's B is the projection behind its network, also for ``side="in"``, where B is on the side of the input.
    """
    return "lora_B" in name or "peanut_B" in name


def pairs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """LoRA's matrices A (r, in) and B (out, r) with the name of A, of each layer and adapter; no kernels."""
    named = dict(model.named_parameters())
    for name, a in named.items():
        b = named.get(name.replace(".lora_A.", ".lora_B.")) if ".lora_A." in name else None
        if b is not None and a.dim() == b.dim() == 2:
            yield name, a, b


def in_embeddings(model: nn.Module) -> set[int]:
    """The ids of the adapters' tensors in embeddings."""
    layers = [layer for layer in walk(model) if isinstance(layer, AdaptedLayer)]
    held: list[Tensor] = []
    for layer in layers:
        if layer.frozen.kind.name == "embedding":
            held += [value for own in layer.adapters.values() for value in own]
    return {id(value) for value in held}
