"""The protocol of a weight method: the parameters it trains in a layer, and the change they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..weights import FrozenLayer
from .change import Change
from .config import PeftConfig

__all__ = ["WeightMethod"]

C = TypeVar("C", bound=PeftConfig)


class WeightMethod(ABC, Generic[C]):
    """A method that changes a layer's weight or bias.

    Laws, checked for every registered method on every kind of layer it names: see ``tests/test_laws.py``. A method
    keeps no state: all it knows is in its arguments, so that one instance serves every layer of every model.
    """

    config_class: ClassVar[type[PeftConfig]]
    kinds: ClassVar[tuple[str, ...]]
    """Names of the kinds of layer (``LayerKind.name``) on which the mathematics makes sense."""

    @abstractmethod
    def start(self, config: C, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        """The parameters' first values, by the suffix under which files keep them.

        Args:
            config: the method's config, with its patterns resolved for this layer.
            layer: the layer to be changed.
            generator: the source of all randomness.
        """

    @abstractmethod
    def change(self, config: C, parameters: Mapping[str, Tensor], layer: FrozenLayer) -> Change:
        """The change that ``parameters`` make of ``layer``."""

    @property
    def name(self) -> str:
        """The method's name in ``adapter_config.json``."""
        return self.config_class.method.value

    def check(self, config: C, layer: FrozenLayer, path: str) -> None:
        """Refuses a config that does not fit the ``layer`` at ``path``, naming both.

        Raises:
            PeanutError: for instance a block size that does not divide the layer's width.
        """
