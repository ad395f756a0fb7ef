"""``ChangedWeight``: what adapters make of a layer's weight, and merging it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...operators import Diagonal, LowRank
from ...protocols import METHODS, Change, PeftConfig, Values, WeightMethod
from ...weights import FrozenLayer, kind_of
from ...weights.emptied import is_emptied
from ...weights.made import is_made
from .adapted import Adapted
from .live import Live
from .parameters import NoParameters
from .state import AdapterState

__all__ = ["BIAS", "ChangedWeight"]

BIAS = "base_layer.bias"
"""The suffix of an adapted layer's own bias where it is trained beside the method."""


class ChangedWeight(Adapted):
    """A frozen layer and what adapters make of its weight and bias: W' and b', as ``Change.together`` says."""

    reads: ClassVar[dict[str, str]] = {"weight": "weight", "bias": "bias"}
    """The names under which others read W' and b' here."""

    def __init__(self, base_layer: nn.Module, frozen: FrozenLayer, path: str, state: AdapterState) -> None:
        super().__init__(path, state)
        self._parameters: dict[str, Any] = NoParameters()
        self.base_layer = base_layer
        self._frozen = frozen
        self.written: dict[str, float] = {}
        self.register_state_dict_post_hook(_save_unmerged)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]

    @property
    def frozen(self) -> FrozenLayer:
        """The layer as a frozen matrix: of the module that is there now, which somebody may have replaced.

        Raises:
            PeanutError: what is there now is no layer that can be adapted.
        """
        if self._frozen.module is not self._modules["base_layer"]:
            kind = kind_of(self.base_layer)
            if kind is None or self._frozen.merged:
                raise PeanutError(
                    f"the layer at '{self.path}' was replaced by a {type(self.base_layer).__name__}",
                    "an unmerged layer that can be adapted",
                    "replace layers before adapters are added, or call unload() first",
                )
            self._frozen = FrozenLayer(self.base_layer, kind)
        return self._frozen

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer's weight."""
        return list(self.written)

    def factor(self, name: str) -> float:
        """What the change of adapter ``name`` is multiplied by here; that with which it was merged, while it is."""
        return self.written[name] if name in self.written else super().factor(name)

    def change(self, name: str, *, sample: bool = False, tasks: Tensor | None = None) -> Change:
        """The change that adapter ``name`` makes here, from the weight before any merge.

        Args:
            sample: draw what the method draws at random.
            tasks: the task of each row, for methods that mix by task.
        """
        method, config = self._methods[name]
        values = self.values(name)
        if method.mixes and (sample or tasks is not None):
            values = method.routed(config, values, tasks, sample)
        elif sample:
            values = method.sampled(config, values)
        return self._changed_by(method, config, values, self.factor(name))

    def _changed_by(self, method: WeightMethod[Any], config: PeftConfig, values: Values, factor: float) -> Change:
        """``factor`` times the method's change, and that of the bias where it is trained beside the method."""
        if factor != 1.0 and getattr(config, "use_dora", False):  # which scales what it normalises
            config, factor = replace(config, lora_alpha=config.lora_alpha * factor), 1.0  # type: ignore[call-arg, attr-defined]
        change = self._asked(method, config, values)
        if not isinstance(change, Change):
            raise PeanutError(f"{method.name} answered '{self.path}' with {type(change).__name__}", "a Change")
        change = change.times(factor)
        trained = values.get(BIAS)
        bias = None if trained is None else self.frozen.bias()
        if trained is None or bias is None:
            return change
        moved = trained - bias
        return replace(change, shift=moved if change.shift is None else change.shift + moved)

    def _asked(self, method: WeightMethod[Any], config: PeftConfig, values: Values) -> Any:
        if torch.compiler.is_compiling():
            return method.change(config, values, self.frozen)
        try:
            return method.change(config, values, self.frozen)
        except (RuntimeError, IndexError, ValueError) as error:
            if not any(map(is_emptied, values.values())):
                raise
            raise PeanutError(
                f"tensors of {method.name} at '{self.path}' that DeepSpeed's third stage has emptied",
                "tensors that are gathered for the layer's forward",
                "call the engine of deepspeed.initialize; a method whose layers share what they train cannot be used",
            ) from error

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(up, down) whose product is W' − W of adapter ``name`` alone, if it is given so."""
        return self.change(name).factors(self.frozen.matrix())

    def low_rank(self, name: str) -> LowRank | None:
        """The same product with its scaling, as LoRA has it; ``None`` if W' − W is not given as one."""
        change = self.change(name)
        factors = change.factors(self.frozen.matrix())
        if factors is None:
            return None
        return change.delta if change.adds and isinstance(change.delta, LowRank) else LowRank(*factors)

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """W' − W of adapter ``name`` alone written out, (out, in), in float32 or a wider dtype."""
        change, weight = self.change(name), self._wide_matrix()
        if change.adds:
            return torch.zeros_like(weight) if change.delta is None else change.delta.dense()
        return self._written(change, weight) - weight

    @torch.no_grad()
    def check_merge(self, merged: Collection[str], active: Sequence[str]) -> None:
        """Refuses a merge of some of the ``active`` adapters after which the others could not do the rest exactly.

        Raises:
            PeanutError: what is merged would be rotated, or rotated in another order than that of activation.
        """
        # What is not merged may have another change for each task: any of them tells.
        task = torch.zeros(1, dtype=torch.long)
        changes = {
            name: self.change(name, tasks=None if name in merged else task) for name in active if name in self.adapters
        }
        inside = [name for name in changes if name in merged]
        outside = [name for name in changes if name not in merged]
        if not inside or not outside:
            return
        for side, operators in (
            ("input", {name: changes[name].rotation for name in changes}),
            ("output", {name: changes[name].left for name in changes}),
        ):
            turning = [name for name, operator in operators.items() if operator is not None]
            gains = all(isinstance(operators[name], Diagonal) for name in turning)
            if not gains and turning != sorted(turning, key=lambda name: name in outside):
                raise PeanutError(
                    f"adapters {turning[0]!r} and {turning[1]!r} rotate the {side} of '{self.path}' in this order, and "
                    "a later one would be merged before an earlier one",
                    "a merge in the order of activation",
                    "merge the earlier one too",
                )
        inner = Change.together([changes[name] for name in inside])
        Change.after([changes[name] for name in outside], inner, Change.together(list(changes.values())))

    @torch.no_grad()
    def write(self, names: Sequence[str], shared: Collection[str]) -> None:
        """Writes W' and b' of the adapters ``names``, in this order, all from the weight before any merge."""
        names = [name for name in names if name in self.adapters]
        if not names:
            return
        change = Change.together([self.change(name) for name in names])
        moves_bias = change.shift is not None or change.left is not None
        offset = change.offset(self.frozen.bias()) if moves_bias else None
        for name in ("weight", "bias") if offset is not None else ("weight",):
            if is_made(self.frozen.module, name):
                raise PeanutError(
                    f"'{self.path}' makes its {name} anew in each forward, so what is merged into it would be lost",
                    "a parameter",
                    f"use it unmerged, or make it one first: parametrize.remove_parametrizations(layer, {name!r}), "
                    "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils, or register_parameter",
                )
        try:
            self.frozen.write(self._written(change, self._wide_matrix()), offset, shared=shared)
        except PeanutError as error:
            raise PeanutError(f"'{self.path}': {error}") from None
        self.written = {name: self.factor(name) for name in names}

    def _written(self, change: Change, weight: Tensor) -> Tensor:
        """W' as a matrix."""
        if not (change.left is None or isinstance(change.left, Diagonal) or self.frozen.kind.mixes(self.frozen.module)):
            raise PeanutError(
                f"an adapter that mixes the outputs of {self.base_layer}",
                "a convolution in one group",
                "use it unmerged",
            )
        return change.matrix(weight)

    def _wide_matrix(self) -> Tensor:
        matrix = self.frozen.matrix()
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.frozen.kind.name in METHODS["LORA"].kinds

    supports_lora_conversion.__doc__ = Live.supports_lora_conversion.__doc__

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        self.owner.merge_layer(self, adapter_names)

    merge.__doc__ = Live.merge.__doc__

    def unmerge(self) -> None:
        self.owner.unmerge_layer(self)

    unmerge.__doc__ = Live.unmerge.__doc__

    def _check_scale(self, name: str) -> None:
        if not (getattr(self._methods[name][1], "use_dora", False) or self.change(name).adds):
            super()._check_scale(name)

    def restore(self) -> None:
        """Restores the weight bit for bit."""
        self.frozen.restore()
        self.written = {}


def _save_unmerged(layer: ChangedWeight, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A state dict taken while merged holds the weight before the merge, so that loading it applies nothing twice."""
    if layer.frozen.merged:
        before = {"weight": layer.frozen.weight, "bias": layer.frozen.bias()}
        for name, own in layer.reads.items():
            key, value = f"{prefix}base_layer.{name}", before[own]
            if value is not None and key in state:
                state[key] = value


def _refuse_merged(layer: ChangedWeight, *_: Any) -> None:
    """A state dict holds weights without adapters, and would put them where the merged ones are."""
    if layer.merged:
        raise PeanutError(
            f"a state dict for a model in which adapter {layer.merged_adapters[0]!r} is merged",
            "an unmerged model",
            "call unmerge_adapter() first",
        )
