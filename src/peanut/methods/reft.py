"""What LoReFT and DiReFT share: the token positions where they act, and matrices with orthonormal rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators.delta import transformed
from ..protocols import Call, PeftConfig, Site, Values
from ..protocols.values import Count, Probability
from .peanut import activation, check_activation

__all__ = ["ReftFields", "at_the_ends", "basis", "orthonormal", "random_start"]

R, W, B = "reft_R", "reft_W", "reft_b"


@dataclass(kw_only=True)
class ReftFields(PeftConfig):
    """What the configs of LoReFT and DiReFT have in common.

    Args:
        r: the dimension of the subspace in which hidden states are changed.
        positions: p; the first and the last min(p, n // 2) of a prompt's n tokens are changed.
        tied: the same R, W and b at both ends; else each end has its own.
        act_fn: f, a key of transformers' ACT2FN, or ``"sine"``.
        dropout: probability with which, in training, an entry of what is added is zeroed.
        init_weights: a new adapter changes nothing; else W and b start at random, as published.
        orthogonality: the rows of R are kept orthonormal.
        target_modules: the modules whose output is changed, if not the blocks.

    Raises:
        PeanutError: a value is out of range, or with this f no start changes nothing.
    """

    r: Count = 8
    positions: Count = 7
    tied: bool = False
    act_fn: str = "linear"
    dropout: Probability = 0.0
    init_weights: bool = True
    orthogonality: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.act_fn)
        if self.init_weights and not self.can_start_silent():
            raise PeanutError(
                f"init_weights=True with act_fn={self.act_fn!r}, with which a new {self.method} adapter cannot "
                "change nothing",
                "act_fn='linear'",
                "set init_weights=False for a random start",
            )

    def can_start_silent(self) -> bool:
        """Whether there are tensors with which nothing is changed."""
        return self.act_fn == "linear"

    def check(self, site: Site) -> None:
        """Refuses an r that is larger than the width."""
        if self.r > site.width:
            raise PeanutError(f"r={self.r} at '{site.path}', whose output is {site.width} wide", "less", "lower r")


def random_start(config: ReftFields, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
    """R with orthonormal rows, W and b as in a new linear layer."""
    ends, wide = 1 if config.tied else 2, torch.promote_types(site.dtype, torch.float32)
    rows = orthonormal(torch.randn(ends, config.r, site.width, generator=generator))
    weight, bias = torch.empty(ends, config.r, site.width), torch.empty(ends, config.r)
    bound = 1 / math.sqrt(site.width)
    nn.init.uniform_(weight, -bound, bound, generator=generator)
    nn.init.uniform_(bias, -bound, bound, generator=generator)
    return {R: rows.to(site.dtype).to(wide), W: weight, B: bias}


def orthonormal(rows: Tensor) -> Tensor:
    """The orthonormal rows that Gram and Schmidt make of (…, r, d), in the same dtype; those that are stay."""
    if rows.is_meta:  # torch has no decomposition there
        return torch.empty_like(rows)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    Q, T = torch.linalg.qr(wide.mT)
    signs = torch.where(T.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(wide.dtype)
    found: Tensor = (Q * signs[..., None, :]).mT.to(rows.dtype)
    return found


def basis(config: ReftFields, parameters: Values) -> Tensor:
    """R, (ends, r, d)."""
    return orthonormal(parameters[R]) if config.orthogonality else parameters[R]


def applied(config: ReftFields, h: Tensor) -> Tensor:
    """f(h)."""
    return activation(config.act_fn, h.device)(h)


def at_the_ends(config: ReftFields, y: Tensor, call: Call, change: Callable[[Tensor], Tensor]) -> Tensor:
    """y with ``change`` added at the ends of the prompt.

    Args:
        config: the method's config.
        y: (batch, tokens, d).
        call: what is known of the tokens; all are the prompt if nothing is.
        change: from hidden states (batch, 2, p, d), first tokens then last, to what is added to them.

    Raises:
        PeanutError: y has no tokens, or others than the prompt.
    """
    prompt = call.prompt
    if y.dim() != 3 or (prompt is not None and prompt.shape != y.shape[:2]):
        known = "" if prompt is None else f", in a batch of {tuple(prompt.shape)} tokens"
        raise PeanutError(
            f"{config.method} at a {type(call.module).__name__} with an output of shape {tuple(y.shape)}{known}",
            "(batch, tokens, width), the tokens that the model reads",
            "name other modules",
        )
    if prompt is None:
        prompt = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
    places, there = ends_of(prompt.to(y.device), config.positions)
    index = places.flatten(1)[..., None].expand(-1, -1, y.shape[2])
    h = y.gather(1, index).unflatten(1, places.shape[1:])
    added = F.dropout(change(h), config.dropout, call.training)
    added = torch.where(there[:, None, :, None], added, 0).flatten(1, 2)
    return y.scatter_add(1, index, added.to(y.dtype))


def ends_of(prompt: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Where the first and the last p of each row's tokens are, and which of them there are.

    Args:
        prompt: (batch, tokens), which tokens count.
        p: at most half of the tokens of a row are at each end.

    Returns:
        (batch, 2, p) positions, counted from both ends, and (batch, p), whether the row has that many.
    """
    count = prompt.sum(1, keepdim=True)
    order = torch.argsort(prompt.logical_not().int(), dim=1, stable=True)  # those that count first, left to right
    most = p if transformed() else min(p, prompt.shape[1] // 2)  # a trace serves longer rows too
    steps = torch.arange(most, device=prompt.device).expand(prompt.shape[0], -1)
    there = steps < count // 2
    first, last = torch.where(there, steps, 0), (count - 1 - steps).clamp(min=0)
    return torch.stack([order.gather(1, first), order.gather(1, last)], dim=1), there
