"""Holds the adapters of the whole model: those that change its input, and mixtures of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapted import Adapted
from .state import AdapterState

__all__ = ["AdaptedInput", "AdaptedMixture", "Front"]


@dataclass(frozen=True)
class Front:
    """What is put before the tokens of a batch.

    Args:
        values: (batch, p, width) of virtual tokens, or (batch, layers, 2, heads, p, head_size) of keys and values.
        there: (batch, p), which of them are used: samples with fewer have theirs at the right; ``None`` for all.
    """

    values: Tensor
    there: Tensor | None


class AdaptedInput(Adapted):
    """The adapters that change the model's input. The tokens of several active ones follow each other."""

    name = "adapted_input"

    def enable_adapters(self, enabled: bool) -> None:
        """Switches all adapters of the model on or off: what is before the input is in none of its layers."""
        self.owner.enable(enabled)

    def acting(self, kind: str) -> list[str]:
        """The names of the adapters of a kind (``InputMethod.prepends``) that act on some sample of the batch now."""
        there = [name for name in self.state.acting() if name in self.adapters]
        return [name for name in there if self.method_of(name)[0].prepends == kind]

    def taken(self, kind: str, batch: int) -> tuple[int, Tensor | None]:
        """p, how many positions adapters of a kind take before the user's tokens.

        And (batch, p), which of them each row uses, ``None`` for all.
        """
        counts = {name: self.method_of(name)[1].num_virtual_tokens for name in self.acting(kind)}
        if self.state.call.samples is None:
            return sum(counts.values()), None
        width = max(counts.values(), default=0)
        there = torch.zeros(batch, width, dtype=torch.bool)
        for name, rows in self.state.groups(batch).items():
            if name in counts:
                there[rows, width - counts[name] :] = True
        return width, None if bool(there.all()) else there

    def front(self, kind: str, batch: int) -> Front | None:
        """What is put before the tokens of ``batch`` rows, ``None`` for nothing."""
        names = self.acting(kind)
        if not names:
            return None
        along = -2  # p, of both kinds
        made = {name: self._made(name) for name in names}
        if self.state.call.samples is None:
            whole = torch.cat(list(made.values()), dim=along)
            return Front(whole.expand(batch, *whole.shape), None)
        width, there = self.taken(kind, batch)
        one = next(iter(made.values()))
        table = [one.new_zeros(*one.shape[:along], width, one.shape[-1])]
        for value in made.values():
            room = one.new_zeros(*one.shape[:along], width - value.shape[along], one.shape[-1])
            table.append(torch.cat([room, value], dim=along))
        order = torch.zeros(batch, dtype=torch.long)
        for name, rows in self.state.groups(batch).items():
            order[rows] = 0 if name not in made else 1 + names.index(name)
        return Front(torch.stack(table)[order.to(one.device)], there)

    def _made(self, name: str) -> Tensor:
        method, config = self.method_of(name)
        made: Tensor = method.prepended(config, self.values(name), self.training)
        return made


class AdaptedMixture(Adapted):
    """The gates of mixtures, each over experts that are adapters of the same model.

    ``layers`` has, for each mixture, the paths of the layers that its experts change, in the order of its gates;
    ``latest`` its gates of the last batch, (batch, tokens, layers, experts), and ``log``, while ``logging``, those of
    every batch.
    """

    name = "adapted_mixture"

    def __init__(self, path: str, state: AdapterState) -> None:
        super().__init__(path, state)
        self.layers: dict[str, list[str]] = {}
        self.latest: dict[str, Tensor | None] = {}
        self.log: dict[str, list[Tensor]] = {}
        self.logging = False

    def add(self, name: str, *args: Any, **options: Any) -> None:
        super().add(name, *args, **options)
        self.latest[name] = None  # so that a compiled forward, which puts gates here, finds the same the next time

    def delete(self, name: str) -> None:
        super().delete(name)
        del self.layers[name]
        self.latest.pop(name, None)
        self.log.pop(name, None)

    def experts(self, name: str) -> list[str]:
        """The names of the adapters that mixture ``name`` mixes, in the order of its gates."""
        return list(self.method_of(name)[0].experts(self.method_of(name)[1]))

    def acting(self) -> list[str]:
        """The names of the mixtures that act on some sample of the batch now."""
        return [name for name in self.state.acting() if name in self.adapters]
