"""``AdaptedLayer``: the wrapper around a layer whose weight adapters change, for all methods and kinds of layer."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...operators import Diagonal, gated
from ...operators.delta import product_dtype
from ...operators.inference import few_tokens
from ...protocols import Change, PeftConfig, Values, WeightMethod
from ...weights import FrozenLayer, LayerKind, kind_of
from .adapted import Adapted
from .calls import BASE, CallState, scattered
from .plan import Plan, for_samples
from .state import AdapterState

__all__ = ["BIAS", "AdaptedLayer"]

MOST = 32
"""A layer that has cached as many values begins anew with the next mix of names."""

BIAS = "base_layer.bias"
"""The suffix of an adapted layer's own bias where it is trained beside the method."""


class AdaptedLayer(Adapted):
    """A frozen layer and the adapters that change it: y = W' x + b', W' and b' as ``Change.together`` says.

    It manages adapters (which act, which are merged, how their changes combine); methods define the changes, and
    operators apply them.
    """

    def __init__(self, base_layer: nn.Module, kind: LayerKind, path: str, state: AdapterState) -> None:
        super().__init__(path, state)
        self.base_layer = base_layer
        self._frozen = FrozenLayer(base_layer, kind)
        self.register_state_dict_post_hook(_save_unmerged)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]

    @property
    def frozen(self) -> FrozenLayer:
        """The layer as a frozen matrix: of the module that is there now, which somebody may have replaced.

        Raises:
            PeanutError: what is there now is no layer that can be adapted.
        """
        if self._frozen.module is not self.base_layer:
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
        return [name for name in self.state.merged if name in self.adapters]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self.state.call.disabled

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

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
        return self._changed_by(method, config, values)

    def _changed_by(self, method: WeightMethod[Any], config: PeftConfig, values: Values) -> Change:
        """The method's change, and that of the bias where it is trained beside the method."""
        change = method.change(config, values, self.frozen)
        if not isinstance(change, Change):
            raise PeanutError(f"{method.name} answered '{self.path}' with {type(change).__name__}", "a Change")
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
    def merge(self, names: Sequence[str], shared: bool) -> None:
        """Writes W' and b' of the adapters ``names``, in this order, all from the weight before any merge."""
        names = [name for name in names if name in self.adapters]
        if not names:
            return
        change = Change.together([self.change(name) for name in names])
        moves_bias = change.shift is not None or change.left is not None
        offset = change.offset(self.frozen.bias()) if moves_bias else None
        try:
            self.frozen.write(self._written(change, self._wide_matrix()), offset, shared=shared)
        except PeanutError as error:
            raise PeanutError(f"'{self.path}': {error}") from None

    def _written(self, change: Change, weight: Tensor) -> Tensor:
        """W' as a matrix."""
        if not (change.left is None or isinstance(change.left, Diagonal) or self.frozen.kind.mixes(self.base_layer)):
            raise PeanutError(
                f"an adapter that mixes the outputs of {self.base_layer}",
                "a convolution in one group",
                "use it unmerged",
            )
        return change.matrix(weight)

    def _wide_matrix(self) -> Tensor:
        matrix = self.frozen.matrix()
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    def unmerge(self) -> None:
        """Restores the weight bit for bit."""
        self.frozen.restore()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = self.state.call
        self.state.check(call)
        if call.disabled:
            return self.frozen.original(x, *args, **kwargs)  # type: ignore[no-any-return]
        if call.samples is not None:
            return self._per_sample(call, x, *args, **kwargs)
        return self._plan(call, x)(x, *args, **kwargs)

    def _plan(self, call: CallState, x: Tensor) -> Plan:
        """The computation of the adapters that act on a whole batch."""
        tasks = None if call.tasks is None else self.state.tasks_of(x.shape[0] if x.dim() else 1)
        names, cached = self.state.active, self._cached(call)
        different = () if cached is None or tasks is None else tuple(set(tasks.tolist()))
        if cached is None or len(different) > 1 or any(name in call.running.gates for name in names):
            # With factors of each row, or gates of each token, there is nothing to keep.
            return Plan.of(self.frozen, self._acting(call, x, names, tasks), training=self.training)
        dtype = product_dtype(x)
        key = ("plan", dtype, tuple(names), different)
        if key not in cached:
            changes = self._acting(call, x, names, None if tasks is None else tasks[:1])
            cached[key] = Plan.of(self.frozen, changes, training=False).for_inference(dtype)
        return cached[key]  # type: ignore[no-any-return]

    def _cached(self, call: CallState) -> dict[Hashable, Any] | None:
        """What evaluation has cached for this layer; ``None`` where nothing may be cached.

        It may where the caller has said so, and only in evaluation. After a change of the adapters it is empty.
        """
        if not call.contexts or self.training or call.sampling or torch.is_grad_enabled():
            return None
        cache = call.cache
        return None if cache is None or torch.compiler.is_compiling() else cache.of(self)

    def _acting(
        self,
        call: CallState,
        x: Tensor,
        names: Sequence[str],
        tasks: Tensor | None,
        index: Tensor | None = None,
    ) -> list[Change]:
        """The changes that are still to be made of what the layer computes, in the order of activation.

        Args:
            names: the adapters that act.
            tasks: the task of each row.
            index: the rows that go through them, ``None`` for all.
        """
        merged = self.state.merged
        each = {name: self._changes_of(call, name, x, tasks, index) for name in names if name not in merged}
        changes = [change for own in each.values() for change in own]
        if changes and self.merged:
            there = {name: [self.change(name)] for name in self.merged_adapters}
            inner = Change.together([change for own in there.values() for change in own])
            if not inner.adds or inner.shift is not None:
                whole = [change for name in names for change in {**there, **each}.get(name, [])]
                return Change.after(changes, inner, Change.together(whole))
        return changes

    def _changes_of(
        self, call: CallState, name: str, x: Tensor, tasks: Tensor | None, index: Tensor | None
    ) -> list[Change]:
        """The changes that adapter ``name``, or each expert of a mixture of that name, makes here."""
        sample = self.training or call.sampling
        if name in self.adapters:
            own = tasks if tasks is None or index is None else tasks[index.to(tasks.device)]
            return [self.change(name, sample=sample, tasks=own)]
        changes = []
        for expert, gate in call.running.gates.get(name, {}).get(self.path, []):
            if expert not in self.adapters:
                continue
            change = self._expert(call, expert, sample)
            assert change.delta is not None  # an expert only adds: the mixture has checked it
            self._check_gate(x, gate)
            changes.append(replace(change, delta=gated(change.delta, gate if index is None else gate[index])))
        return changes

    def _expert(self, call: CallState, name: str, sample: bool) -> Change:
        """The change of an expert of a mixture."""
        cached, key = self._cached(call), ("expert", name)
        if cached is None:
            return self.change(name, sample=sample)
        if key not in cached:
            cached[key] = self.change(name)
        return cached[key]  # type: ignore[no-any-return]

    def _check_gate(self, x: Tensor, gate: Tensor) -> None:
        tokens = x.shape if not self.frozen.kind.takes_activations else x.shape[:-1]
        if tokens != gate.shape[:2]:
            raise PeanutError(
                f"'{self.path}' deals with {tuple(x.shape)} where a mixture's gates are for (batch, tokens) = "
                f"{tuple(gate.shape[:2])}",
                "experts of layers that see every token",
                "leave this layer out of the experts",
            )

    def _per_sample(self, call: CallState, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each sample's rows with its own adapter's change: by one product where they are alike, else row by row."""
        tasks, placed = self.state.tasks_of(x.shape[0]), self.state.groups(x.shape[0], x.device)
        cached = self._cached(call) if tasks is None and not call.running.gates else None
        key = ("samples", x.dtype, len(x), x.dim(), few_tokens(x), tuple(call.samples or ()))
        if cached is not None and key in cached:
            return cached[key](x, *args, **kwargs)  # type: ignore[no-any-return]
        groups = [
            (index, [] if name == BASE else self._acting(call, x, [name], tasks, index))
            for name, index in placed.items()
        ]
        whole = for_samples(groups, x, training=self.training) if self.frozen.kind.takes_features else None
        if whole is not None:
            plan = Plan(self.frozen, whole)
            if cached is not None:
                if len(cached) >= MOST:
                    cached.clear()
                cached[key] = plan
            return plan(x, *args, **kwargs)
        plans = ((index, Plan.of(self.frozen, changes, training=self.training)) for index, changes in groups)
        return scattered(((index, plan(x[index], *args, **kwargs)) for index, plan in plans), len(x), self.path)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


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
