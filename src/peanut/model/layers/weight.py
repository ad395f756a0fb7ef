"""``AdaptedWeight``: the weight that adapters make of a layer's: what changes, what is merged, what others read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...operators import Diagonal
from ...protocols import METHODS, Change, PeftConfig, Values, WeightMethod
from ...stack import in_a_forward
from ...weights import FrozenLayer, kind_of
from ...weights.emptied import is_emptied
from ...weights.made import is_made
from .adapted import Adapted
from .calls import CallState
from .live import Live
from .parameters import NoParameters
from .reading import Reading
from .state import AdapterState

__all__ = ["BIAS", "AdaptedWeight"]

BIAS = "base_layer.bias"
"""The suffix of an adapted layer's own bias where it is trained beside the method."""


class AdaptedWeight(Adapted):
    """A frozen layer and what adapters make of its weight and bias: W' and b', as ``Change.together`` says."""

    _told_undropped = False

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
    def weight(self) -> Any:
        """As the layer's: properties, since torch.compile finds those of the class that ``__class__`` answers."""
        return self.__getattr__("weight")

    @property
    def bias(self) -> Any:
        return self.__getattr__("bias")

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

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("_modules", {}).get(name)
        if module is not None:  # nine times in a forward, and torch takes longer
            return module
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return self._read(self.reads[name]) if name in self.reads else self._fallen(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            plain = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            if plain and name in self.base_layer._parameters:
                raise PeanutError(
                    f"a tensor in the place of the {name} of '{self.path}', which adapters change",
                    f"one in the place of base_layer.{name}, which they then change",
                    f"give torch.func.functional_call 'base_layer.{name}'",
                )
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _read(self, name: str) -> Any:
        """The layer's weight or bias; where another module reads it in its forward, W' or b'."""
        compiled = torch.compiler.is_compiling()
        if not (compiled or in_a_forward()):
            return getattr(self.frozen.module, name)
        if name == "bias" or compiled or self.state.disabled or not self._read_with(self.state.call):
            return self._effective(name)
        return Reading(self.frozen.module.weight, partial(self._effective, name), self.path)

    def _effective(self, name: str) -> Any:
        """The weight or bias that the layer has in the call that is made now."""
        call = self.state.call
        self.state.check(call)
        if self.state.disabled:
            return self.frozen.weight if name == "weight" else self.frozen.bias()
        names = self._read_with(call)
        if not names:
            return getattr(self.frozen.module, name)
        if name == "weight":
            return self._weight(call, names)
        return self._combined(call, names, sample=False).offset(self.frozen.bias())  # no method draws a bias

    def _read_with(self, call: CallState) -> list[str]:
        """The adapters that change what is read; none where all of them are merged."""
        experts = {each for gates in call.running.gates.values() for each, _ in gates.get(self.path, [])}
        names = [each for each in (*self.state.acting(), *experts) if each in self.adapters]
        return [] if self.written.keys() >= set(names) else names

    def _weight(self, call: CallState, names: Sequence[str]) -> Tensor:
        """W', as the layer stores it."""
        change, kind = self._combined(call, names, sample=self.training or call.sampling), self.frozen.kind
        if kind.quantised:
            raise self._unread("it is quantised: its weight is codes")
        return kind.layout(self.frozen.module, self._written(change, self._wide_matrix())).to(self.frozen.weight.dtype)

    def _combined(self, call: CallState, names: Sequence[str], *, sample: bool) -> Change:
        """What the adapters ``names`` make of the layer, whatever its input.

        Raises:
            PeanutError: they do not make the same of all of its input.
        """
        mixes = call.tasks is not None and any(self.method_of(name)[0].mixes for name in names)
        if call.samples is not None or call.running.gates or mixes:
            raise self._unread("adapters that differ between the samples or tokens of a batch act there")
        changes = [self.change(name, sample=sample) for name in names]
        drops = sample and self.training and self.frozen.kind.takes_activations
        if drops and any(change.dropout for change in changes) and not self._told_undropped:
            _warn_undropped(self.path)  # a compiled graph cannot tell who asks for a dtype only
            if not torch.compiler.is_compiling():
                self._told_undropped = True
        return Change.together(changes)

    def _unread(self, why: str) -> PeanutError:
        return PeanutError(
            f"a module or hook reads the weight of '{self.path}' in a forward, and {why}",
            "a layer that is called and not read",
            "read base_layer.weight for the base's own, or leave the layer out of target_modules (exclude_modules)",
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # it runs when the graph is made
def _warn_undropped(path: str) -> None:
    warnings.warn(
        f"a module or hook reads the weight of '{path}' in training; if an output is computed with it, and not by "
        "calling the layer, the dropout of the adapters there is not applied: leave the layer out of target_modules, "
        "or set the dropout to 0",
        stacklevel=2,
    )


def _save_unmerged(layer: AdaptedWeight, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A state dict taken while merged holds the weight before the merge, so that loading it applies nothing twice."""
    if layer.frozen.merged:
        before = {"weight": layer.frozen.weight, "bias": layer.frozen.bias()}
        for name, own in layer.reads.items():
            key, value = f"{prefix}base_layer.{name}", before[own]
            if value is not None and key in state:
                state[key] = value


def _refuse_merged(layer: AdaptedWeight, *_: Any) -> None:
    """A state dict holds weights without adapters, and would put them where the merged ones are."""
    if layer.merged:
        raise PeanutError(
            f"a state dict for a model in which adapter {layer.merged_adapters[0]!r} is merged",
            "an unmerged model",
            "call unmerge_adapter() first",
        )
