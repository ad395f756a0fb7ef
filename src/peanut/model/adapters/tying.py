"""Which layers of an adapter have one set of tensors, as the base has one weight for them, and in which form."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import PeanutError
from ...protocols import PeftConfig, WeightMethod
from ...weights.stored import same_tensor
from ..layers.mirrored import Mirrored
from ..layers.parameters import Parameters
from ..targets.paths import modules_by_path
from ..targets.ties import are_to_be_tied, one_weight, tied_to
from .starting import Target

__all__ = ["named_apart", "seen_from", "source_of"]


def named_apart(
    model: nn.Module, config: PeftConfig, parts: list[tuple[WeightMethod[Any], PeftConfig]], named: list[list[str]]
) -> dict[str, PeftConfig]:
    """The layers of one weight for which the user names different tokens, each with its config: they do not follow.

    Raises:
        PeanutError: they are to be tied.
    """
    modules, found = modules_by_path(model), dict[str, PeftConfig]()
    every = {path: own for (part, own), paths in zip(parts, named, strict=True) if part.follows_ties for path in paths}
    for path, own in every.items() if len(parts) > 2 else ():
        for other in one_weight(modules, path):
            if other in every and every[other] is not own:
                found |= {path: own, other: every[other]}
                if are_to_be_tied(config) and other in tied_to(model, modules, path):
                    raise PeanutError(
                        f"ensure_weight_tying=True with different tokens of '{path}' and '{other}', which are tied",
                        "the same tokens",
                        "give both the same, name one of them, or leave ensure_weight_tying out",
                    )
    return found


def source_of(target: Target, targets: list[Target]) -> Target:
    """The target of which a tied one has the tensors: the first embedding with its weight, or else the first layer."""
    if not target.tied:
        return target
    group = [
        other
        for other in targets
        if other.tied
        and other.method == target.method
        and (other.config == target.config or not target.method.follows_ties)
        and (other is target or same_tensor(other.frozen.module, target.frozen.module))
    ]
    return next((other for other in group if other.frozen.kind.name == "embedding"), group[0])


def seen_from(target: Target, source: Target, made: Parameters) -> Parameters:
    """The tensors of ``source`` as those of ``target``, which is tied to it.

    Raises:
        PeanutError: they have no form there, or the two have different configs, or biases that are trained.
    """
    if target.config != source.config:
        raise PeanutError(
            f"'{target.path}' and '{source.path}', which are tied, with different entries in rank_pattern or "
            "alpha_pattern",
            "the same",
            "change the patterns, or leave ensure_weight_tying out",
        )
    trained = "bias" if getattr(target.config, "bias", "none") != "none" and target.frozen.bias() is not None else ""
    if (
        target is source
        or target.method.follows_ties
        or (not trained and target.frozen.kind.name == source.frozen.kind.name)
    ):
        return made
    names, kinds = target.method.mirrored, (source.frozen.kind.name, target.frozen.kind.name)
    rest = (set(made.suffixes) - set(names.values())) | ({trained} - {""})
    if rest or kinds != ("embedding", "linear"):
        what = f"{target.method.name} ({min(rest)})" if rest else f"a {type(target.frozen.module).__name__}"
        raise PeanutError(
            f"ensure_weight_tying=True with '{target.path}', which is tied to '{source.path}', and {what}",
            "a plain LORA (no use_dora, lora_bias or bias) on an embedding and a linear head",
            "leave ensure_weight_tying out, or both layers",
        )
    return Mirrored(made, source.path, names)
