"""``XLoraModel``: a model adapted by X-LoRA, with functions to read its gates and change its settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import PeanutError
from .injection import AdaptedModel
from .layers.input import AdaptedMixture

__all__ = ["XLoraModel"]


class XLoraModel(AdaptedModel):
    """A model adapted by X-LoRA.

    Gates are of shape (batch, tokens, layers, experts), before ``top_k_lora`` and ``global_scaling_weight``; layers in
    the model's order, experts in that of their names. "The mixture" is the active one, or the only one.

    Raises:
        PeanutError: from each method, if no mixture is in the model, or several and none is active.
    """

    method = "XLORA"

    # Looking at the gates

    def get_latest_scalings(self) -> Tensor | None:
        """The gates of the last batch that went through the mixture, ``None`` if there was none."""
        holder, name = self._mixture()
        return holder.latest.get(name)

    def enable_scalings_logging(self) -> None:
        """Logs the gates of every batch from now on."""
        self._mixture()[0].logging = True

    def disable_scalings_logging(self) -> None:
        """Logs no further gates; those that were logged stay."""
        self._mixture()[0].logging = False

    def clear_scalings_log(self) -> None:
        """Clears the log of gates."""
        holder, name = self._mixture()
        holder.log.pop(name, None)

    def get_scalings_log(self) -> list[Tensor]:
        """The logged gates, a tensor for each batch."""
        holder, name = self._mixture()
        return list(holder.log.get(name, []))

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The logged gates by number of tokens: their positions in the log, and they themselves."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for position, gates in enumerate(self.get_scalings_log()):
            positions, found = buckets.setdefault(gates.shape[1], ([], []))
            positions.append(position)
            found.append(gates)
        return buckets

    def expert_names(self) -> list[str]:
        """The experts' names, in the order of the gates."""
        holder, name = self._mixture()
        return holder.experts(name)

    def gated_layers(self) -> list[str]:
        """The paths of the layers, in the order of the gates."""
        holder, name = self._mixture()
        return list(holder.layers[name])

    # Settings

    def set_topk_lora(self, value: int | None) -> None:
        """For each token and layer leave only the ``value`` largest gates; ``None`` for all."""
        self._set(top_k_lora=value)

    def set_global_scaling_weight(self, weight: float) -> None:
        """What all gates are multiplied by."""
        self._set(global_scaling_weight=weight)

    def get_global_scaling_weight(self) -> float:
        """What all gates are multiplied by."""
        return float(self.adapters.configs[self._mixture()[1]].global_scaling_weight)  # type: ignore[attr-defined]

    def set_scaling_pass_value(self, value: float | None) -> None:
        """The gate of every expert in the first pass; ``None`` for one divided by their number."""
        self._set(scaling_pass_value=1 / len(self.expert_names()) if value is None else value)

    # Parts of it

    def _mixture(self) -> tuple[AdaptedMixture, str]:
        holder = self.model._modules.get("adapted_mixture")
        names = list(holder.adapters) if isinstance(holder, AdaptedMixture) else []
        active = [name for name in names if name in self.adapters.state.active]
        if len(active or names) != 1:
            raise PeanutError(
                f"{len(active or names) or 'no'} {'active ' if active else ''}mixtures in the model",
                "one",
                "make one active with set_adapter(name)" if names else "add one",
            )
        return holder, (active or names)[0]  # type: ignore[return-value]

    def _set(self, **changes: Any) -> None:
        _, name = self._mixture()
        self.adapters.configure(name, replace(self.adapters.configs[name], **changes))
