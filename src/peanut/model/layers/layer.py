"""``AdaptedLayer``: the wrapper around a layer whose weight adapters change, for all methods and kinds of layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...operators import gated
from ...operators.delta import captured, product_dtype
from ...operators.inference import few_tokens
from ...protocols import METHODS, Change
from ...weights.made import made_once
from .adapted import refuse_symbolic
from .calls import BASE, EVERYWHERE, CallState, scattered
from .hooks import input_of
from .plan import Plan, for_samples
from .weight import AdaptedWeight

__all__ = ["AdaptedLayer"]

MOST = 32
"""A layer that has cached as many values begins anew with the next mix of names."""


class AdaptedLayer(AdaptedWeight):
    """A frozen layer and the adapters that change it: y = W' x + b', W' and b' as ``Change.together`` says.

    It manages adapters (which act, which are merged, how their changes combine); methods define the changes, and
    operators apply them.
    """

    def get_base_weight(self) -> Tensor:
        """The base's own weight, as numbers where it is quantised."""
        frozen = self.frozen
        own = frozen.kind.layout(frozen.module, frozen.matrix()) if frozen.kind.quantised else frozen.weight
        return own.detach()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' − W of one adapter, of the shape in which the layer stores its weight.

        Raises:
            PeanutError: it is not here.
        """
        if adapter not in self.adapters:
            raise PeanutError(f"no adapter {adapter!r} at '{self.path}'", ", ".join(self.adapters), "name one of them")
        return self.frozen.kind.layout(self.base_layer, self.delta(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``to_lora`` takes what an adapter changes here."""
        return self.frozen.kind.name in METHODS["LORA"].kinds

    def forward(self, *given: Any, **named: Any) -> Tensor:
        base: Any = self._modules["base_layer"]
        x, args, kwargs = input_of(base, given, named)
        if "parametrizations" not in base._modules:
            return self._computed(x, *args, **kwargs)
        with made_once(base):  # what is read is what the layer computes with
            return self._computed(x, *args, **kwargs)

    @property
    def _external_params(self) -> dict[int, nn.Parameter]:  # the base's tensors are read here too
        base: Any = self._modules["base_layer"]
        return super()._external_params | {id(value): value for value in base.parameters()}

    def _computed(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        refuse_symbolic(x, self.path)
        call = self.state.call
        self.state.check(call)
        if self.disable_adapters:
            return self.frozen.original(x, *args, **kwargs)  # type: ignore[no-any-return]
        if call.samples is not None:
            return self._per_sample(call, x, *args, **kwargs)
        return self._plan(call, x)(x, *args, **kwargs)

    def _plan(self, call: CallState, x: Tensor) -> Plan:
        """The computation of the adapters that act on a whole batch."""
        tasks = None if call.tasks is None else self.state.tasks_of(x.shape[0] if x.dim() else 1)
        names, cached = self.state.active_at(self.path), self._cached(call)
        different = () if cached is None or tasks is None else tuple(set(tasks.tolist()))
        if cached is None or len(different) > 1 or any(name in call.running.gates for name in names):
            # With factors of each row, or gates of each token, there is nothing to keep.
            return Plan.of(self.frozen, self._acting(call, x, names, tasks), training=self.training)
        dtype = product_dtype(x)
        key = ("plan", dtype, tuple(names), different, *self.scaling.values())
        if key not in cached:
            changes = self._acting(call, x, names, None if tasks is None else tasks[:1])
            cached[key] = Plan.of(self.frozen, changes, training=False).for_inference(dtype)
        return cached[key]  # type: ignore[no-any-return]

    def _cached(self, call: CallState) -> dict[Hashable, Any] | None:
        """What evaluation has cached for this layer; ``None`` where nothing may be cached.

        It may where the caller has said so, and only in evaluation. After a change of the adapters it is empty.
        """
        if not (call.contexts or EVERYWHERE.used) or captured():
            return None
        if self.training or call.sampling or torch.is_grad_enabled():
            EVERYWHERE.forget(self.state)
            return None
        cache = call.cache
        if cache is not None:
            return cache.of(self)
        return EVERYWHERE.of(self) if EVERYWHERE.on else None

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
        each = {name: self._changes_of(call, name, x, tasks, index) for name in names if name not in self.written}
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
            change = self.change(name, sample=sample, tasks=own)
            owner, leaf = next(iter(self.adapters[name].places.values()), ({}, ""))
            if leaf and owner[leaf].is_meta and not x.is_meta:  # all tensors of an adapter are there, or none
                raise PeanutError(
                    f"adapter {name!r} has no storage at '{self.path}' (it is on the meta device)",
                    "weights that are there",
                    "load it first",
                )
            return [change]
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
        cached, key = self._cached(call), ("expert", name, self.scaling[name])
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
        key = ("samples", x.dtype, len(x), x.dim(), few_tokens(x), tuple(call.samples or ()), *self.scaling.values())
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
