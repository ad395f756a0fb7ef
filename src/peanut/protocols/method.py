"""``Method``, the interface of every method, and ``WeightMethod``, that of methods that change a weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from ..weights import FrozenLayer
from .architecture import Architecture
from .change import Change
from .config import PeftConfig

__all__ = ["Method", "Trial", "Values", "WeightMethod"]

C = TypeVar("C", bound=PeftConfig)

Values = Mapping[str, Tensor]
"""An adapter's tensors in one place by suffix, those that places share among them."""


class Method(ABC, Generic[C]):
    """What all methods have in common: a config, tensors by suffix, and how files keep them.

    A method has no state: all it knows is in its arguments, so that one instance serves every model. Where it acts
    and what it computes there, its kind says: ``WeightMethod``, ``OutputMethod``, ``InputMethod``, ``MixtureMethod``.

    In all functions ``config`` is the method's config, with its patterns resolved for the layer where there is one;
    ``parameters`` are the adapter's tensors there, by suffix; ``generator`` is the source of all randomness that the
    config does not seed itself; ``training`` is whether the model is being trained.
    """

    config_class: ClassVar[type[PeftConfig]]
    size: ClassVar[str] = ""
    """How many parameters it trains in one place: an expression of sizes and the config's fields, or words."""
    styles: ClassVar[tuple[tuple[str, str, Any], ...]] = ()
    """Entries of the benchmark that are this method with an option: name, field, value."""
    kinds: ClassVar[tuple[str, ...]] = ()
    """Names of the kinds of layer (``LayerKind.name``) whose weight it changes."""
    trains: ClassVar[Literal["layers", "named", "all"]] = "layers"
    """What it trains: tensors of its own; the modules that ``target_modules`` names, whole; or the whole model."""

    def tried(self, on: Trial) -> dict[str, Any] | None:
        """The config values, beyond defaults, with which it is benchmarked ``on`` a model; ``None``: it cannot be."""
        return {}

    def companions(self, config: C) -> list[tuple[WeightMethod[Any], PeftConfig]]:
        """Methods of other layers that belong to the same adapter, each with its config."""
        return []

    def completed(self, config: C, architecture: Architecture) -> C:
        """The config with what it leaves open filled in for an architecture."""
        return config

    def fixed(self, config: C) -> frozenset[str]:
        """Suffixes of tensors that are saved but not trained."""
        return frozenset()

    def rebuilt(self, config: C) -> frozenset[str]:
        """Suffixes of tensors that are neither trained nor saved: they are made again."""
        return frozenset()

    def passing(self, config: C) -> frozenset[str]:
        """Suffixes of tensors that only training needs: not trained, saved in a file of their own for resuming."""
        return frozenset()

    def scaffold(self, config: C) -> frozenset[str]:
        """Suffixes of trained tensors of which files hold the result (``stored``), as of a network that makes a prompt.

        They are saved in that file too, for resuming.
        """
        return frozenset()

    def unsaved(self, config: C) -> frozenset[str]:
        """Suffixes of tensors that are not in an adapter's file: rebuilt, or for training only."""
        return self.rebuilt(config) | self.passing(config) | self.scaffold(config)

    def without_scaffold(self, config: C) -> C:
        """The config of the same adapter once it is trained on without its scaffold."""
        return config

    def planned(self, config: C, steps: int, rows: int) -> C:
        """The config with what it leaves open about training filled in: optimizer steps, and rows trained on."""
        return config

    def penalty(self, config: C, layers: Sequence[Values]) -> Tensor | None:
        """What is added to the loss in training, a number, over all places of an adapter."""
        return None

    def after_step(self, config: C, layers: Sequence[Values]) -> None:
        """Runs after each optimizer step, gradients still there: for schedules that change tensors in place."""

    def stored(self, config: C, layers: Mapping[str, Values]) -> tuple[C, dict[str, dict[str, Tensor]]]:
        """What files hold: the config and, by path, the tensors by suffix (all but what only training needs)."""
        left_out = self.unsaved(config)
        return config, {
            path: {suffix: value for suffix, value in values.items() if suffix not in left_out}
            for path, values in layers.items()
        }

    def restored(self, config: C, layers: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
        """The tensors of an adapter with ``config`` from those that a file holds: the inverse of ``stored``."""
        return {path: dict(values) for path, values in layers.items()}

    def __eq__(self, other: object) -> bool:
        """Methods keep no state, so any two of one class are the same: a copied model brings copies of them."""
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @property
    def name(self) -> str:
        """The method's name in ``adapter_config.json``."""
        return self.config_class.method

    @property
    def model_name(self) -> str | None:
        """The name of the class of the models that it adapts: ``LoraModel``, as its config is ``LoraConfig``."""
        return self.config_class.__name__.removesuffix("Config") + "Model"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The model, or stack of layers, that a method is measured on: what ``Method.tried`` may have to know of it.

    Args:
        shapes: (out, in) of the weights that may be changed.
        feed_forward: names of the layers among them that end a feed-forward part.
        tokens: how many virtual tokens to add, or tokens to train.
        biases: whether its layers have biases.
        head: whether it has a head that is trained whole.
    """

    shapes: Sequence[Sequence[int]] = ()
    feed_forward: Sequence[str] = ()
    blocks: int = 1
    tokens: int = 16
    causal: bool = False
    biases: bool = True
    head: bool = False

    def divisor(self, size: int) -> int:
        """The largest divisor of ``size`` that divides every width too."""
        return math.gcd(size, *(width for shape in self.shapes for width in shape))


class WeightMethod(Method[C]):
    """A method that changes a layer's weight or bias.

    Laws, checked for every registered method on every kind of layer it names: see ``tests/test_laws.py``.
    """

    targets: ClassVar[Literal["attention", "norms", "biases", "embedding", "outputs"]] = "attention"
    """Which layers it changes where the config names none: see ``model/targets/architectures.py``."""
    follows_ties: ClassVar[bool] = False
    """Whether a layer that shares its weight with a target (a tied head) is changed with it."""
    mirrored: ClassVar[Mapping[str, str]] = {}
    """Suffixes on a head that is tied to an embedding, each with that of the same tensor, transposed, on the embedding.

    Where they are all that an adapter has there, ``ensure_weight_tying`` gives both one set of tensors.
    """
    mixes: ClassVar[bool] = False
    """Whether each sample has a change of its own, by its task (``routed``)."""

    @abstractmethod
    def start(self, config: C, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors' first values in ``layer``, by the suffix under which files store them."""

    @abstractmethod
    def change(self, config: C, parameters: Values, layer: FrozenLayer) -> Change:
        """The change that ``parameters`` (the layer's own and the shared ones) make of ``layer``."""

    # What some methods need beyond that

    def shared(self, config: C, layers: Sequence[FrozenLayer], generator: torch.Generator) -> dict[str, Tensor]:
        """Tensors that all layers of an adapter share, by suffix; stored once on the model."""
        return {}

    def sampled(self, config: C, parameters: Values) -> Values:
        """The tensors used for ``parameters`` in one forward of training, for methods that draw random numbers."""
        return parameters

    def routed(self, config: C, parameters: Values, tasks: Tensor | None, training: bool) -> Values:
        """The tensors used for ``parameters`` where each sample has a task, for methods that mix by task.

        ``tasks`` is the task of each sample, (batch,), or ``None`` if the caller names none.
        """
        return parameters

    def check(self, config: C, layer: FrozenLayer, path: str) -> None:
        """Refuses a config that does not fit the ``layer`` at ``path``, naming both.

        Raises:
            PeanutError: for instance a block size that does not divide the layer's width.
        """

    def check_read(self, config: C, layer: FrozenLayer, values: Values, path: str) -> None:
        """Refuses tensors of a file, of the right shapes, that are not for the ``layer`` at ``path``.

        Raises:
            PeanutError: for instance a place outside of its weight.
        """
