"""The layer wrapper: one class for every method and every kind of layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators import LowRank, Operator, PerToken
from ..operators.gained import gained_product
from ..protocols import Change, PeftConfig, Values, WeightMethod
from ..weights import FrozenLayer, LayerKind
from ..weights.kind import recomputed
from .adapted import Adapted
from .kept import Beside, Kept, Settled
from .parameters import Place
from .state import BASE, AdapterState

__all__ = ["BIAS", "AdaptedLayer"]

BIAS = "base_layer.bias"
"""The suffix of an adapted layer's own bias where it is trained beside the method."""

Groups = dict[str, tuple[Tensor, list[Change]]]
"""For each adapter among a batch's samples: their rows, and its change."""


class AdaptedLayer(Adapted):
    """A frozen layer and the adapters that change it: y = W' x + b', W' and b' as ``Change.together`` says.

    It knows how adapters live (which act, which are merged, how their changes combine); what a change is, the
    methods say, and how it is applied fast, the operators.
    """

    def __init__(self, base_layer: nn.Module, kind: LayerKind, path: str, state: AdapterState) -> None:
        super().__init__(path, state)
        self.base_layer = base_layer
        self.frozen = FrozenLayer(base_layer, kind)
        self._known: dict[str, Kept[Change]] = {}
        self._kept: Kept[Settled] | None = None
        self._joint: Kept[Beside | None] | None = None
        self.register_state_dict_post_hook(_save_unmerged)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]

    def forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._kept = self._joint = None
        self.frozen.products.forget()

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer's weight."""
        return [name for name in self.state.merged if name in self.adapters]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self.state.disabled

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that looks at a layer's dtype or device."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def change(self, name: str, *, sample: bool = False, tasks: Tensor | None = None) -> Change:
        """The change that adapter ``name`` makes here, from the weight before any merge.

        Without gradients and outside training it is computed once and kept while no parameter and no weight changes,
        and autocast neither begins nor ends.

        Args:
            name: the adapter.
            sample: draw what the method draws at random.
            tasks: the task of each row, for methods that mix by task.
        """
        method, config = self._methods[name]
        values = self.values(name)
        if method.mixes and (sample or tasks is not None):
            return self._changed_by(method, config, method.routed(config, values, tasks, sample))
        if sample:
            return self._changed_by(method, config, method.sampled(config, values))
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return self._changed_by(method, config, values)
        weight = self.frozen.weight
        key, known = (_autocast_dtype(weight.device), weight.data_ptr()), self._known.get(name)
        if known is None or not known.holds(key):
            change = self._changed_by(method, config, values)
            known = self._known[name] = Kept(key, [*self.kept_at(name), ({"": weight}, "")], change)
        return known.value

    def _changed_by(self, method: WeightMethod[Any], config: PeftConfig, values: Values) -> Change:
        """The method's change, and that of the bias where it is trained beside the method."""
        change = method.change(config, values, self.frozen)
        trained, bias = values.get(BIAS), self.frozen.bias()
        if trained is None or bias is None:
            return change
        moved = trained - bias
        return replace(change, shift=moved if change.shift is None else change.shift + moved)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(up, down) whose product is W' − W of adapter ``name`` alone, if it is given so."""
        return self.change(name).factors(self.frozen.matrix())

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """W' − W of adapter ``name`` alone written out, (out, in), in float32 or a wider dtype."""
        change, weight = self.change(name), self._wide_matrix()
        if change.adds:
            return torch.zeros_like(weight) if change.delta is None else change.delta.dense()
        return change.matrix(weight) - weight

    @torch.no_grad()
    def check_merge(self, merged: Collection[str], active: Sequence[str]) -> None:
        """Refuses a merge of some of the ``active`` adapters after which the others could not do the rest exactly.

        Raises:
            PeanutError: what is merged would be turned, or turned in another order than that of activation.
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
        turning = [name for name in changes if changes[name].rotation is not None]
        if turning != sorted(turning, key=lambda name: name in outside):
            raise PeanutError(
                f"adapters {turning[0]!r} and {turning[1]!r} turn the input of '{self.path}' in this order, and "
                "a later one would be merged before an earlier one",
                "a merge in the order of activation",
                "merge the earlier one too",
            )
        Change.together([changes[name] for name in outside]).after(Change.together([changes[n] for n in inside]))

    @torch.no_grad()
    def merge(self, names: Sequence[str], shared: bool) -> None:
        """Writes W' and b' of the adapters ``names``, in this order, all from the weight before any merge."""
        names = [name for name in names if name in self.adapters]
        if not names:
            return
        change = Change.together([self.change(name) for name in names])
        moves_bias = change.shift is not None or change.bias_scale is not None
        offset = change.offset(self.frozen.bias()) if moves_bias else None
        try:
            self.frozen.write(change.matrix(self._wide_matrix()), offset, shared=shared)
        except PeanutError as error:
            raise PeanutError(f"'{self.path}': {error}") from None

    def _wide_matrix(self) -> Tensor:
        matrix = self.frozen.matrix()
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    def unmerge(self) -> None:
        """Restores the weight bit for bit."""
        self.frozen.restore()

    def train(self, mode: bool = True) -> AdaptedLayer:
        self._known.clear()
        self._kept = self._joint = None
        if not mode:
            self.frozen.products.forget()
        return super().train(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.disabled:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if not (self.training or args or kwargs or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            y = self._answer_settled(x)
            if y is not None:
                return y
        if self.state.samples is not None:
            return self._forward_per_sample(x, *args, **kwargs)
        return self._answer(x, self._acting(_rows(x)), *args, **kwargs)

    def _acting(self, count: int) -> list[Change]:
        """The changes that are still to be made of what the layer computes, in the order of activation.

        Args:
            count: how many rows the batch has.
        """
        tasks = self.state.tasks_of(count)
        changes = [
            change
            for name in self.state.active
            if name not in self.state.merged
            for change in self._changes_of(name, tasks, None)
        ]
        if changes and self.merged:
            merged = Change.together([self.change(name) for name in self.merged_adapters])
            if not merged.adds or merged.shift is not None:
                return [Change.together(changes).after(merged)]
        return changes

    def _changes_of(self, name: str, tasks: Tensor | None, index: Tensor | None) -> list[Change]:
        """The changes that adapter ``name``, or each expert of a mixture of that name, makes here.

        Args:
            name: the adapter.
            tasks: the task of each row that goes through the adapter.
            index: these rows, ``None`` for all.
        """
        sample = self.training or self.state.sampling
        if name in self.adapters:
            return [self.change(name, sample=sample, tasks=tasks)]
        gates = self.state.running.gates.get(name, {}).get(self.path, [])
        return [
            replace(self.change(expert, sample=sample), gate=gate if index is None else gate[index])
            for expert, gate in gates
            if expert in self.adapters
        ]

    def _answer(self, x: Tensor, changes: list[Change], *args: Any, **kwargs: Any) -> Tensor:
        """What the layer answers with ``changes`` together: the one place where they become a computation."""
        if not changes:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        kind, whole = self.frozen.kind, Change.together(changes)
        if not kind.multiplies() or (
            not kind.takes_features() and (whole.rotation is not None or whole.in_scale is not None)
        ):
            return self._answer_rebuilt(x, whole, *args, **kwargs)
        if not args and not kwargs and kind.fused(self.base_layer):
            delta = self._one_delta(x, changes, whole)
            if whole.rotation is None and delta is not None:
                return self._answer_joined(x, whole, delta)
            if whole.rotation is not None and whole.delta is None and whole.in_scale is None:
                return self._answer_turned(x, whole, whole.rotation)
            if (
                whole.rotation is None
                and whole.in_scale is None
                and whole.out_scale is not None
                and delta is whole.delta
            ):
                gained = self._answer_gained(x, whole, whole.out_scale)
                if gained is not None:
                    return gained
        seen = x if whole.in_scale is None else x * whole.in_scale.to(x.dtype)
        turned = seen if whole.rotation is None else whole.rotation.to(x.dtype).apply(seen)
        y: Tensor = self.base_layer(turned, *args, **kwargs)
        product = y
        for change in changes:
            if change.delta is not None:
                y = y + self._response(seen, change, product if turned is x else None).to(y.dtype)
        if whole.out_scale is not None:
            y = y * kind.along_output(whole.out_scale.to(y.dtype))
        correction = whole.correction(self.bias)
        return y if correction is None else y + kind.along_output(correction.to(y.dtype))

    def _answer_settled(self, x: Tensor) -> Tensor | None:
        """What a plain layer answers in evaluation, from what is kept while nothing changes; else ``None``."""
        state, module, kind = self.state, self.frozen.module, self.frozen.kind
        if state.sampling or state.running.gates or not kind.fused(module):
            return None
        if module._parameters.get("weight") is None:  # kept in a way of its own (sharded): nobody would see it change
            return None
        if state.samples is not None:
            return self._answer_beside(x) if state.tasks is None else None
        tasks = () if state.tasks is None else (_rows(x), *state.tasks.tolist())
        lowered = _autocast_dtype(x.device)
        dtype = lowered or x.dtype
        key = (dtype, *state.active, None, *state.merged, tasks)
        kept = self._kept
        if kept is None or not kept.holds(key):
            changes, places = self._acting(_rows(x)), self._places({*state.active, *state.merged})
            settled = Settled.of(Change.together(changes) if changes else Change(), module.bias, dtype)
            self._known.clear()  # what is settled need not be kept twice
            kept = self._kept = Kept(key, places, settled)
        weight = kind.matrix(module, module._parameters["weight"])
        if lowered is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        return kept.value.answer(x, weight)

    def _places(self, names: Collection[str]) -> list[Place]:
        """Where the tensors are kept from which this layer with the adapters ``names`` computes."""
        own = self.frozen.module._parameters
        places: list[Place] = [(own, name) for name in ("weight", "bias") if own.get(name) is not None]
        return places + [place for name in names if name in self.adapters for place in self.kept_at(name)]

    def _answer_beside(self, x: Tensor) -> Tensor | None:
        """What a plain layer answers in evaluation to a batch whose samples go through adapters of their own."""
        state = self.state
        samples = state.samples or []
        key = (x.dtype, x.shape[0], *samples, None, *state.merged)
        kept = self._joint
        if kept is None or not kept.holds(key):
            kept = self._joint = Kept(key, self._places({*samples, *state.merged}), self._beside(x, self._groups(x)))
        beside = kept.value
        if beside is None or not beside.pays(x):
            return None
        y: Tensor = self.base_layer(x)
        return y + beside.answer(x).to(y.dtype)

    def _answer_joined(self, x: Tensor, change: Change, delta: Operator) -> Tensor:
        """The frozen product and the additive change in one go."""
        x, weight, bias = self._lowered(x)
        if change.in_scale is not None:
            x = x * change.in_scale.to(x.dtype)
        if change.out_scale is None:
            offset = change.offset(bias)
            return delta.to(x.dtype).joined(x, weight, None if offset is None else offset.to(x.dtype))
        y = delta.to(x.dtype).joined(x, weight, bias) * change.out_scale.to(x.dtype)
        correction = change.correction(bias)
        return y if correction is None else y + correction.to(y.dtype)

    def _answer_turned(self, x: Tensor, change: Change, rotation: Operator) -> Tensor:
        """The frozen product of the turned input in one go."""
        x, weight, bias = self._lowered(x)
        offset = change.offset(bias)
        offset = None if offset is None else offset.to(x.dtype)
        return rotation.to(x.dtype).turned(x, weight, offset, change.out_scale)

    def _answer_gained(self, x: Tensor, change: Change, gain: Tensor) -> Tensor | None:
        """The frozen product and a gain of its output in one go, ``None`` where that does not pay."""
        x, weight, bias = self._lowered(x)
        offset = change.offset(bias)
        return gained_product(x, weight, None if offset is None else offset.to(x.dtype), gain)

    def _lowered(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input of a plain layer, its matrix (out, in) and its bias, in autocast's dtype where it is on."""
        weight, bias = self.frozen.kind.matrix(self.base_layer, self.weight), self.bias
        dtype = _autocast_dtype(x.device)
        if dtype is None:
            return x, weight, bias
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def _answer_rebuilt(self, x: Tensor, change: Change, *args: Any, **kwargs: Any) -> Tensor:
        """The layer run with W' and b' in place, for kinds on whose input a change of W is no change of the input.

        W' is made again in the backward rather than kept. (Dropout of Δ's input does not exist here.)
        """
        kind, module = self.frozen.kind, self.base_layer

        def run(x: Tensor) -> Tensor:
            weight = self.weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            matrix = kind.layout(module, change.matrix(kind.matrix(module, weight).to(wide)))
            own = {"weight": matrix.to(weight.dtype)}
            offset = change.offset(self.bias)
            if self.bias is not None and offset is not None:
                own["bias"] = offset.to(self.bias.dtype)
            y: Tensor = torch.func.functional_call(module, own, (x, *args), kwargs)
            extra = None if self.bias is not None else offset
            return y if extra is None else y + kind.along_output(extra.to(y.dtype))

        return recomputed(run, x) if kind.multiplies() else run(x)

    def _response(self, x: Tensor, change: Change, y: Tensor | None = None) -> Tensor:
        """What the Δ of a change adds to the layer's output.

        Args:
            x: the layer's input.
            change: the change.
            y: what the layer itself answers to x, if that is known.
        """
        kind = self.frozen.kind
        assert change.delta is not None  # else there is nothing to ask for
        dtype = x.dtype if kind.takes_activations() else self.weight.dtype
        if change.dropout and self.training and kind.takes_activations():
            x = nn.functional.dropout(x, change.dropout)
        elif y is not None and kind.quantised and change.gate is None:  # to read W again would be to make it of codes
            return change.delta.to(dtype).beside(x, y, self.bias)
        delta, gate = change.delta.to(dtype), change.gate
        early = gate is not None and kind.takes_features()  # else Δ has to answer before it is weighted
        response = x if early else kind.respond(self.base_layer, x, delta)
        if gate is None:
            return response
        self._check_gate(response, gate)
        gate = gate.to(response.dtype)
        return delta.weighted(x, gate) if early else response * gate

    def _one_delta(self, x: Tensor, changes: list[Change], whole: Change) -> Operator | None:
        """The Δ of all ``changes`` as one operator, ``None`` where there is none or each has to answer apart."""
        if self.training and any(change.dropout for change in changes):
            return None
        gates = tuple(change.gate for change in changes if change.gate is not None)
        if not gates:
            return whole.delta
        experts = tuple(change.delta for change in changes if isinstance(change.delta, LowRank))
        if not len(experts) == len(gates) == len(changes):
            return None
        for gate in gates:
            self._check_gate(x, gate)
        return PerToken(experts, gates)

    def _check_gate(self, x: Tensor, gate: Tensor) -> None:
        if x.dim() != 3 or x.shape[:2] != gate.shape[:2]:
            raise PeanutError(
                f"'{self.path}' deals with {tuple(x.shape)} where a mixture's gates are for (batch, tokens) = "
                f"{tuple(gate.shape[:2])}",
                "experts of layers that see every token",
                "leave this layer out of the experts",
            )

    def _forward_per_sample(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Row by row: each sample's rows with its own adapter's change."""
        groups = self._groups(x)
        if self.frozen.kind.multiplies() and all(change.adds for _, changes in groups.values() for change in changes):
            return self._added_per_sample(x, groups, *args, **kwargs)
        y: Tensor | None = None
        for index, changes in groups.values():
            part = self._answer(x[index], changes, *args, **kwargs)
            y = part.new_empty(x.shape[0], *part.shape[1:]) if y is None else y
            y = y.index_copy(0, index, part)
        assert y is not None  # groups() raises on an empty batch
        return y

    def _groups(self, x: Tensor) -> Groups:
        tasks = self.state.tasks_of(x.shape[0])
        groups: Groups = {}
        for name, index in self.state.placed(x.shape[0], x.device).items():
            own = None if tasks is None else tasks[index]
            groups[name] = (index, [] if name == BASE else self._changes_of(name, own, index))
        return groups

    def _beside(self, x: Tensor, groups: Groups) -> Beside | None:
        """What a batch's adapters add as one operator, ``None`` where they do not all add by a low-rank Δ alone."""
        changes = [(index, change) for index, own in groups.values() for change in own]
        deltas = [(index, change.delta) for index, change in changes if isinstance(change.delta, LowRank)]
        apart = any(
            not change.adds or change.shift is not None or change.gate is not None or (self.training and change.dropout)
            for _, change in changes
        )
        if len(deltas) < max(2, len(changes)) or apart or not self.frozen.kind.takes_features():
            return None
        return Beside.of(deltas, x)

    def _added_per_sample(self, x: Tensor, groups: Groups, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output for all rows at once, and to each sample's rows what its adapter adds."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        beside = self._beside(x, groups)
        if beside is not None and beside.pays(x):
            y = y + beside.answer(x).to(y.dtype)
        else:
            beside = None
        for index, changes in groups.values():
            for change in changes:
                if change.delta is not None and beside is None:
                    y = y.index_add(0, index, self._response(x[index], change).to(y.dtype))
                if change.shift is not None:
                    shift = self.frozen.kind.along_output(change.shift.to(y.dtype))
                    y = y.index_add(0, index, shift.expand(len(index), *y.shape[1:]))
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files leave behind what is kept for the next forward."""
        return self.__dict__ | {"_known": {}, "_kept": None, "_joint": None}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def _rows(x: Tensor) -> int:
    return x.shape[0] if x.dim() else 1


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast has products computed on ``device`` now, or ``None``."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _save_unmerged(layer: AdaptedLayer, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A state dict taken while merged holds the weight before the merge, so that loading it applies nothing twice."""
    if layer.frozen.merged:
        for name, value in (("weight", layer.frozen.weight), ("bias", layer.frozen.bias())):
            key = f"{prefix}base_layer.{name}"
            if value is not None and key in state:
                state[key] = value


def _refuse_merged(layer: AdaptedLayer, *_: Any) -> None:
    """A state dict holds weights without adapters, and would put them where the merged ones are."""
    if layer.merged:
        raise PeanutError(
            f"a state dict for a model in which adapter {layer.merged_adapters[0]!r} is merged",
            "an unmerged model",
            "call unmerge_adapter() first",
        )
