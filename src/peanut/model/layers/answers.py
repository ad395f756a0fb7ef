"""How a frozen layer answers with changes: the one place where a ``Change`` becomes a computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...operators import LowRank, Operator, PerToken
from ...operators.scaled_product import gained_product
from ...protocols import Change
from ...weights import FrozenLayer
from ...weights.kind import recomputed

__all__ = ["Answers", "autocast_dtype"]


class Answers:
    """What one layer answers with changes, each way of computing it where it is the cheapest.

    Args:
        frozen: the layer.
        path: where it lies in the model.
    """

    def __init__(self, frozen: FrozenLayer, path: str) -> None:
        self.frozen, self.path = frozen, path

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.frozen.module.weight
        return weight

    @property
    def _bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.frozen.module, "bias", None)
        return bias

    def to(self, x: Tensor, changes: list[Change], *args: Any, **kwargs: Any) -> Tensor:
        """y for x with all ``changes`` together; what else is given goes to the layer."""
        if not changes:
            return self.frozen.module(x, *args, **kwargs)  # type: ignore[no-any-return]
        kind, whole = self.frozen.kind, Change.together(changes)
        if not kind.multiplies() or (
            not kind.takes_features() and (whole.rotation is not None or whole.in_scale is not None)
        ):
            return self._rebuilt(x, whole, *args, **kwargs)
        if not args and not kwargs and kind.fused(self.frozen.module):
            delta = self._one_delta(x, changes, whole)
            if whole.rotation is None and delta is not None:
                return self._joined(x, whole, delta)
            if whole.rotation is not None and whole.delta is None and whole.in_scale is None:
                return self._turned(x, whole, whole.rotation)
            bare = whole.rotation is None and whole.delta is None and whole.in_scale is None
            if bare and whole.out_scale is not None:
                gained = self._gained(x, whole, whole.out_scale)
                if gained is not None:
                    return gained
        seen = x if whole.in_scale is None else x * whole.in_scale.to(x.dtype)
        turned = seen if whole.rotation is None else whole.rotation.to(x.dtype).apply(seen)
        y: Tensor = self.frozen.module(turned, *args, **kwargs)
        product = y
        for change in changes:
            if change.delta is not None:
                y = y + self.response(seen, change, product if turned is x else None).to(y.dtype)
        if whole.out_scale is not None:
            y = y * kind.along_output(whole.out_scale.to(y.dtype))
        correction = whole.correction(self._bias)
        return y if correction is None else y + kind.along_output(correction.to(y.dtype))

    def response(self, x: Tensor, change: Change, y: Tensor | None = None) -> Tensor:
        """What the Δ of a change adds to the layer's output.

        Args:
            x: the layer's input.
            change: the change.
            y: what the layer itself answers to x, if that is known.
        """
        kind = self.frozen.kind
        assert change.delta is not None  # else there is nothing to ask for
        dtype = x.dtype if kind.takes_activations() else self._weight.dtype
        if change.dropout and kind.takes_activations():
            x = nn.functional.dropout(x, change.dropout)
        elif y is not None and kind.quantised and change.gate is None:  # to read W again would be to make it of codes
            return change.delta.to(dtype).beside(x, y, self._bias)
        delta, gate = change.delta.to(dtype), change.gate
        early = gate is not None and kind.takes_features()  # else Δ has to answer before it is weighted
        response = x if early else kind.respond(self.frozen.module, x, delta)
        if gate is None:
            return response
        self._check_gate(response, gate)
        gate = gate.to(response.dtype)
        return delta.weighted(x, gate) if early else response * gate

    def _joined(self, x: Tensor, change: Change, delta: Operator) -> Tensor:
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

    def _turned(self, x: Tensor, change: Change, rotation: Operator) -> Tensor:
        """The frozen product of the turned input in one go."""
        x, weight, bias = self._lowered(x)
        offset = change.offset(bias)
        offset = None if offset is None else offset.to(x.dtype)
        return rotation.to(x.dtype).turned(x, weight, offset, change.out_scale)

    def _gained(self, x: Tensor, change: Change, gain: Tensor) -> Tensor | None:
        """The frozen product and a gain of its output in one go, ``None`` where that does not pay."""
        x, weight, bias = self._lowered(x)
        offset = change.offset(bias)
        return gained_product(x, weight, None if offset is None else offset.to(x.dtype), gain)

    def _lowered(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input of a plain layer, its matrix (out, in) and its bias, in autocast's dtype where it is on."""
        weight, bias = self.frozen.kind.matrix(self.frozen.module, self._weight), self._bias
        dtype = autocast_dtype(x.device)
        if dtype is None:
            return x, weight, bias
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def _rebuilt(self, x: Tensor, change: Change, *args: Any, **kwargs: Any) -> Tensor:
        """The layer run with W' and b' in place, for kinds on whose input a change of W is no change of the input.

        W' is made again in the backward rather than kept. (Dropout of Δ's input does not exist here.)
        """
        kind, module = self.frozen.kind, self.frozen.module

        def run(x: Tensor) -> Tensor:
            weight = self._weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            matrix = kind.layout(module, change.matrix(kind.matrix(module, weight).to(wide)))
            own = {"weight": matrix.to(weight.dtype)}
            offset = change.offset(self._bias)
            if self._bias is not None and offset is not None:
                own["bias"] = offset.to(self._bias.dtype)
            y: Tensor = torch.func.functional_call(module, own, (x, *args), kwargs)
            extra = None if self._bias is not None else offset
            return y if extra is None else y + kind.along_output(extra.to(y.dtype))

        return recomputed(run, x) if kind.multiplies() else run(x)

    def _one_delta(self, x: Tensor, changes: list[Change], whole: Change) -> Operator | None:
        """The Δ of all ``changes`` as one operator, ``None`` where there is none or each has to answer apart."""
        if any(change.dropout for change in changes):
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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast has products computed on ``device`` now, or ``None``."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
