"""PEANuT: the update is a small network of the frozen weight itself (Zhong et al. 2024, arXiv 2410.01870)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PeanutError, nearest
from ..operators import LowRank
from ..protocols import Change, PeftConfig, WeightMethod, register
from ..protocols.values import Count, Depth, Probability, Scale
from ..weights import FrozenLayer

__all__ = ["Peanut", "PeanutConfig", "activation", "check_activation", "tweak"]


@dataclass(kw_only=True)
class PeanutConfig(PeftConfig):
    """Config of PEANuT.

    Args:
        r: hidden width of the network, the rank of ΔW.
        depth: number of encoder/decoder pairs; 0 is A and B alone. (The paper counts layers: its 2, 4, 6 are 0, 1, 2.)
        act_fn: the activation, a key of transformers' ``ACT2FN`` or ``"sine"``, sin 2πx.
        scaling: s.
        init_weights: start with B = 0, so that nothing changes at first; else B is random like the rest.
        side: which dimension of W⁰ A reads: ``"out"`` (A: r × out, the published code), ``"in"`` (A: r × in, the
            paper's equations), ``"auto"`` the smaller of the two.
        dropout: dropout of the change's input.
        rank_pattern: r for particular layers, by name or regular expression.
    """

    method = "PEANUT"
    only_here = frozenset({"side", "dropout", "rank_pattern"})
    by_layer = (("r", "rank_pattern"),)

    r: Count = 32
    depth: Depth = 0
    act_fn: str = "relu"
    scaling: Scale = 1.0
    init_weights: bool = True
    side: Literal["out", "in", "auto"] = "out"
    dropout: Probability = 0.0
    rank_pattern: dict[str, Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.act_fn)


@register
class Peanut(WeightMethod[PeanutConfig]):
    """ΔW = s · B · Hᵀ with H = f(W⁰ᵀAᵀ); for side "in", ΔW = s · H · Bᵀ with H = f(W⁰Aᵀ).

    With d the side that A reads and e the other: A (r, d), B (d, r), encoders and decoders (r, r), H (e, r). f works
    row by row and ends before B, so ΔW has rank r at any depth and is never built.
    """

    config_class = PeanutConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "2 * r * d_out + 2 * depth * r**2"

    def start(self, config: PeanutConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        activation(config.act_fn, layer.beside.device)  # made now, as torch.compile cannot make one with parameters
        width = layer.out_features if reads_out(config, layer) else layer.in_features
        shapes = {"peanut_A.weight": (config.r, width), "peanut_B.weight": (width, config.r)}
        for level in range(config.depth):
            shapes[f"peanut_encoders.{level}.weight"] = (config.r, config.r)
            shapes[f"peanut_decoders.{level}.weight"] = (config.r, config.r)
        values = {
            suffix: nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
            for suffix, shape in shapes.items()
        }
        if config.init_weights:
            values["peanut_B.weight"].zero_()
        return values

    def change(self, config: PeanutConfig, parameters: Mapping[str, Tensor], layer: FrozenLayer) -> Change:
        A, B = parameters["peanut_A.weight"], parameters["peanut_B.weight"]
        encoders = [parameters[f"peanut_encoders.{level}.weight"] for level in range(config.depth)]
        decoders = [parameters[f"peanut_decoders.{level}.weight"] for level in range(config.depth)]
        out = reads_out(config, layer)
        H = tweak(layer.product(A, transposed=out), encoders, decoders, activation(config.act_fn, A.device))
        delta = LowRank(B, H.T, config.scaling) if out else LowRank(H, B.T, config.scaling)
        return Change(delta=delta, dropout=config.dropout)


def tweak(product: Tensor, encoders: list[Tensor], decoders: list[Tensor], sigma: Callable[[Tensor], Tensor]) -> Tensor:
    """H = f of the product W Aᵀ, the neural tweaker up to its output projection.

    h₀ = σ(W Aᵀ);  hᵢ = σ(hᵢ₋₁ Eᵢᵀ) for each encoder;  then for each decoder h ← σ(h Dᵢᵀ) + the state before the encoder
    that mirrors it.

    Args:
        product: W Aᵀ, (e, r).
        encoders, decoders: each (r, r).
        sigma: the activation.

    Returns:
        H, (e, r).
    """
    h = sigma(product)
    states = []
    for encoder in encoders:
        states.append(h)
        h = sigma(h @ encoder.T)
    for decoder in decoders:
        h = sigma(h @ decoder.T) + states.pop()
    return h


def reads_out(config: PeanutConfig, layer: FrozenLayer) -> bool:
    """Whether A acts on the output dimension of W⁰."""
    return config.side == "out" or (config.side == "auto" and layer.out_features <= layer.in_features)


def check_activation(name: str) -> None:
    """Refuses what is no activation.

    Raises:
        PeanutError: it is neither a key of ``ACT2FN`` nor ``"sine"``.
    """
    if name in _WRITTEN_HERE:
        return
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise PeanutError(
            f"act_fn={name!r}",
            "a key of transformers' ACT2FN or 'sine'",
            f"nearest: {nearest(name, [*ACT2FN, 'sine'])}",
        )


def activation(name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The activation called ``name``; one with parameters of its own keeps their initial values."""
    if name in _WRITTEN_HERE:
        return _WRITTEN_HERE[name]
    if (name, device) not in _ACTIVATIONS:
        from transformers.activations import ACT2FN

        _ACTIVATIONS[name, device] = ACT2FN[name].requires_grad_(False).to(device)
    return _ACTIVATIONS[name, device]


def sine(x: Tensor) -> Tensor:
    """sin 2πx."""
    return torch.sin(2 * math.pi * x)


def untrained_prelu(x: Tensor) -> Tensor:
    """What a PReLU computes at its initial slope; unlike ``nn.PReLU`` it takes any dtype."""
    return F.leaky_relu(x, 0.25)


_WRITTEN_HERE = {"sine": sine, "prelu": untrained_prelu}
_ACTIVATIONS: dict[tuple[str, torch.device], nn.Module] = {}
"""Kept in a dictionary that torch.compile can look into; it warns of ``functools.cache``."""
