"""``OutputMethod``: the interface of methods that change the output of a module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .architecture import PlaceName
from .method import C, Method, Values

__all__ = ["Call", "OutputMethod", "Site"]


@dataclass(frozen=True)
class Site:
    """A module whose output a method changes.

    Args:
        width: the size of its output's last dimension.
        reads: the size of the last dimension of x.
        module: the module itself, without adapters around it.
        block: the number of the block that it lies in, counted from 0, and how many there are.
        source: the path of the module whose input is x, ``None`` if it is this one.
        settings: the model's own config, ``None`` for a plain module.
    """

    path: str
    width: int
    reads: int
    module: nn.Module
    block: tuple[int, int]
    source: str | None = None
    settings: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's weights; float32 if they are no numbers."""
        dtypes = (weight.dtype for weight in self.module.parameters() if weight.is_floating_point())
        return next(dtypes, torch.float32)


@dataclass(frozen=True)
class Call:
    """One call of a module whose output is changed.

    Args:
        module: the module, with the adapters that change its weights.
        arguments: what it was called with, by name.
        prompt: (batch, tokens), which of the tokens that it sees belong to the prompt that the user gave: no padding,
            no virtual token, no answer; ``None`` if nothing is known of the tokens. False everywhere while text is
            generated token by token.
        kind: the kind of layer that the module is, as for ``changes_input``.
        apart: ``apart(layer, rows)`` is what a layer inside the module makes of rows (n, in) that are no tokens of the
            batch, of shape (1 or batch, n, out): as adapters of weights change it, and none of outputs.
    """

    module: nn.Module
    arguments: Mapping[str, Any]
    prompt: Tensor | None
    training: bool
    kind: str | None
    apart: Callable[[nn.Module, Tensor], Tensor]


class OutputMethod(Method[C]):
    """A method that changes the output y of a module: y' = adapt(x, y).

    Laws, checked for every registered method: see ``tests/test_output_laws.py``. It is no change of a weight, so it
    does not merge.
    """

    reads_prompt: ClassVar[bool] = False
    """Whether ``adapt`` needs ``Call.prompt``; it then acts where the user's tokens are read, not in a decoder that
    only writes, and not while text is generated token by token."""

    @abstractmethod
    def places(self, config: C) -> tuple[PlaceName, ...]:
        """The places that it changes where the config names no modules."""

    def source(self, config: C) -> Literal["feed_forward_input"] | None:
        """Where x is read, if it is not what the changed module itself is given."""
        return None

    def chosen(self, config: C, block: int, blocks: int) -> bool:
        """Whether the block number ``block`` of ``blocks`` is among those that are changed."""
        return True

    @abstractmethod
    def start(self, config: C, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors' first values at ``site``, by the suffix under which files keep them."""

    @abstractmethod
    def adapt(self, config: C, parameters: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """The changed output. The parameters are in the dtype of y or a wider one.

        Args:
            x: (…, in), the activations that the module (or ``source``) was given.
            y: (…, width), what the module returned, the first if it returns several values.
        """

    def changes_input(self, config: C, kind: str | None) -> bool:
        """Whether ``adapt`` returns x' instead, which the module is then given once more, so that y' = module(x').

        ``kind`` is the kind of layer that the module is (``LayerKind.name``), ``None`` if it is no layer by itself.
        """
        return False

    def check(self, config: C, site: Site) -> None:
        """Refuses a config that does not fit a site, naming both."""
