"""The layer wrapper: one class for every method and every kind of layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...operators import LowRank
from ...protocols import Change, PeftConfig, Values, WeightMethod
from ...weights import FrozenLayer, LayerKind
from .adapted import Adapted
from .answers import Answers, autocast_dtype
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
        self.answers = Answers(self.frozen, path)
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
        key, known = (autocast_dtype(weight.device), weight.data_ptr()), self._known.get(name)
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
        return self.answers.to(x, self._acting(_rows(x)), *args, **kwargs)

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
            changes = [self.change(name, sample=sample, tasks=tasks)]
        else:
            changes = [
                replace(self.change(expert, sample=sample), gate=gate if index is None else gate[index])
                for expert, gate in self.state.running.gates.get(name, {}).get(self.path, [])
                if expert in self.adapters
            ]
        if self.training:
            return changes
        return [replace(change, dropout=0.0) if change.dropout else change for change in changes]

    def _answer_settled(self, x: Tensor) -> Tensor | None:
        """What a plain layer answers in evaluation, from what is kept while nothing changes; else ``None``."""
        state, module, kind = self.state, self.frozen.module, self.frozen.kind
        if state.sampling or state.running.gates or not kind.fused(module):
            return None
        if module._parameters.get("weight") is None:  # kept in a way of its own (sharded): nobody would see it change
            return None
        if state.samples is not None:
            return self._answer_beside(x) if state.tasks is None else None
        task = state.tasks_of(_rows(x))
        if task is not None and len(set(task.tolist())) != 1:  # factors of each row would be kept
            return None
        lowered = autocast_dtype(x.device)
        dtype = lowered or x.dtype
        key = (dtype, *state.active, None, *state.merged, None if task is None else (task.dtype, task.tolist()[0]))
        kept = self._kept
        if kept is None or not kept.holds(key):
            places = self._places({*state.active, *state.merged})
            with state.during(None, None if task is None else task[:1]):
                changes = self._acting(1)
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

    def _forward_per_sample(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Row by row: each sample's rows with its own adapter's change."""
        groups = self._groups(x)
        if self.frozen.kind.multiplies() and all(change.adds for _, changes in groups.values() for change in changes):
            return self._added_per_sample(x, groups, *args, **kwargs)
        y: Tensor | None = None
        for index, changes in groups.values():
            part = self.answers.to(x[index], changes, *args, **kwargs)
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
            not change.adds or change.shift is not None or change.gate is not None or change.dropout > 0
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
                    y = y.index_add(0, index, self.answers.response(x[index], change).to(y.dtype))
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
