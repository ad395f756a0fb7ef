"""Whether several adapters that act on one layer compute the same in Hugging Face PEFT (below: PEFT) as here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import PeanutError
from ..model.layers.layer import AdaptedLayer
from ..operators import Diagonal
from ..protocols import Change, PeftConfig, PeftType, method_of
from .layers import Wrapped

__all__ = ["Acting", "acting_on", "check_together"]

Acting = Mapping[str, tuple[PeftConfig, Change]]
"""The adapters that act on a layer, in the order of activation: their configs, and what each of them changes alone."""


def acting_on(layer: object, active: Sequence[str], configs: Mapping[str, PeftConfig]) -> Acting:
    """The active adapters of one of our layers, if they are several."""
    names = [name for name in active if name in layer.adapters] if isinstance(layer, AdaptedLayer) else []
    if not isinstance(layer, AdaptedLayer) or len(names) < 2:
        return {}
    task = torch.zeros(1, dtype=torch.long)  # what may be another change for each task is of one form for all
    with torch.no_grad():
        return {name: (configs[name], layer.change(name, tasks=task)) for name in names}


def check_together(place: Wrapped, acting: Acting) -> None:
    """Refuses adapters that act together on a layer, if with two of them PEFT computes something else than we do.

    Here W' = … L₂ L₁ (W R₁ R₂ … + Σ Δ) Π S and b' = … L₂ (L₁ b + shift₁) + shift₂ …, whatever the methods. There each
    layer is a function of the one inside it: it turns that one's input (R, S), adds to its output (Δ) or turns it (L).
    """
    order, beneath = list(acting), list[tuple[str, int]]()
    for number, layer in enumerate(reversed(place.layers)):
        own = [name for name in order if place.holds(layer, name)]
        if own and acting[own[0]][0].peft_type == PeftType.OFT and acting[own[0]][1].left is None:
            own.reverse()  # there the last turns what the first has turned
        for name in own:
            for other, inside in beneath:
                ordered = order.index(other) < order.index(name)
                if _reads(acting[name][0], acting[other][0], inside == number) or not _commute(
                    acting[other], acting[name], ordered
                ):
                    raise PeanutError(
                        f"adapters {' and '.join(map(repr, order))} act together on '{place.path}', and Hugging Face "
                        f"PEFT does not add what {name!r} ({method_of(acting[name][0].peft_type).name}) and {other!r} "
                        "change, but lets one act on what the other has made",
                        "one of them, or adapters whose changes add",
                        "make one active with set_adapter",
                    )
            beneath.append((name, number))


def _reads(config: PeftConfig, other: PeftConfig, in_one_layer: bool) -> bool:
    """Whether PEFT's method computes from what another adapter beneath has made, where ours reads the layer alone."""
    if getattr(config, "use_dora", False) or getattr(config, "init_weights", None) == "bat":
        return True
    if config.peft_type == PeftType.C3A:
        return in_one_layer
    alone = (PeftType.HRA, PeftType.TRAINABLE_TOKENS, PeftType.LN_TUNING)  # they forget what lies beneath
    return config.peft_type in alone and not in_one_layer


def _commute(lower: tuple[PeftConfig, Change], upper: tuple[PeftConfig, Change], ordered: bool) -> bool:
    """Whether an adapter around another one is what both are together.

    Args:
        ordered: whether the lower one was activated first.
    """
    (config, below), (other, above) = lower, upper
    gains = isinstance(below.left, Diagonal) and isinstance(above.left, Diagonal)
    sorted_parts = [
        (below.rotation, above.rotation),
        (None if gains else below.left, above.left),
        (below.shift, above.left),
        (below.left, above.shift),
    ]
    never = [
        (below.left, above.delta),
        (below.delta, above.rotation),
        (below.in_scale, above.delta),
        (below.in_scale, above.rotation),
        # A trained bias is that of the innermost layer, which gains of the outputs then read.
        (below.left, above.shift if getattr(other, "bias", "none") != "none" else None),
        (above.left and above.shift, below.shift if getattr(config, "bias", "none") != "none" else None),
    ]
    meet = [*never, *([] if ordered else sorted_parts)]
    return not any(one is not None and two is not None for one, two in meet)
