"""Initial tensors of a new adapter: one seed gives the same on every device and in every order of layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import PeanutError
from ...protocols import Method, PeftConfig, WeightMethod
from ...weights import FrozenLayer
from ...weights.emptied import gathered
from ..layers.changed import BIAS
from ..layers.parameters import Parameters
from .size_limits import Limited, SizeLimit

__all__ = ["New", "Target", "naming"]

Values = dict[str, Tensor]


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Within the context an error says where it happened."""
    try:
        yield
    except PeanutError as error:
        raise PeanutError(f"{where}: {error}") from None
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise PeanutError(f"{where}: {error}", "sizes that a tensor can have", "lower its sizes") from None


@dataclass(frozen=True)
class Target:
    """A layer that an adapter is to change, the method that does, and its config there.

    Args:
        tied: whether it is to have one set of tensors with the layers that have its weight.
    """

    path: str
    frozen: FrozenLayer
    method: WeightMethod[Any]
    config: PeftConfig
    tied: bool = False


@dataclass(frozen=True)
class New:
    """A new adapter.

    Args:
        seed: where its randomness comes from: a number drawn from torch's generator.
        meta: leave its parameters without storage, to be filled by loading.
        wide: store them in float32 at least, also on a half-precision base.
        limit: what it may make.
    """

    name: str
    seed: str
    meta: bool
    wide: bool
    limit: SizeLimit

    def is_filled_by_loading(self, method: Method[Any], config: PeftConfig) -> bool:
        """Whether its tensors are left without storage; where some are in no file, all have to be made."""
        return self.meta and not method.unsaved(config)

    def tensors(
        self,
        method: Method[Any],
        config: PeftConfig,
        path: str,
        beside: Tensor,
        start: Callable[[torch.Generator], Values],
    ) -> Parameters:
        """Its tensors in one place, on the device of the base's weight there and in the precision of its parameters.

        Args:
            path: where they are; with the adapter's seed it seeds the generator.
            beside: a weight of the base.
            start: makes them, with a generator.
        """
        meta = self.is_filled_by_loading(method, config)
        digest = hashlib.sha256(f"{self.seed}/{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        where = f"{method.name} at '{path}'" if path else method.name
        without = meta or beside.is_meta
        on = torch.device("meta" if without else "cpu")
        with naming(where), torch.no_grad(), on, Limited(self.limit, meta=without):
            values = start(generator)
        self.limit.charge(values)
        coded = not beside.is_floating_point() or beside.dtype.itemsize < 2  # a quantised weight
        dtype = torch.float32 if coded else beside.dtype
        dtype = torch.promote_types(dtype, torch.float32) if self.wide else dtype
        rebuilt, device = method.rebuilt(config), torch.device("meta") if meta else beside.device
        return Parameters(
            {
                suffix: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype).contiguous()
                for suffix, value in values.items()
            },
            untrained=method.fixed(config) | method.passing(config) | rebuilt,
            rebuilt=rebuilt,
        )

    def in_layer(self, target: Target, by_signature: dict[Any, Values]) -> Parameters:
        """Its tensors in a layer; without storage they are the same for layers of one signature."""
        method, config, frozen = target.method, target.config, target.frozen
        module, beside = frozen.module, frozen.beside
        signature = (method, id(config), type(module), module.extra_repr(), beside.shape, beside.dtype)

        def start(generator: torch.Generator) -> Values:
            if signature in by_signature:
                return by_signature[signature]
            values = method.start(config, frozen, generator)
            bias = frozen.bias()
            if getattr(config, "bias", "none") != "none" and bias is not None:
                values[BIAS] = gathered(bias).detach().clone()
            if self.is_filled_by_loading(method, config):
                by_signature[signature] = values
            return values

        return self.tensors(method, config, target.path, beside, start)
