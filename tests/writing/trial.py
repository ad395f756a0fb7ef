"""One model, written to in one way after some calls: it answers as a fresh one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peanut import PeftModel

from ..support import distance
from . import ANY, WAYS
from .reference import Given, History, answer_of, answers, differences, is_of_base
from .target import Slot, Target, slots_of

__all__ = ["Trial", "assert_follows", "noisy", "target"]

CLEAR = 0.02
"""How far, relative to it, an answer must move when something is written, so that an old one would show."""


@dataclass(frozen=True)
class Trial:
    """A model and what its answers are compared with.

    Args:
        model: the model.
        x: what it is called with.
        anew: a fresh model with the values of the first, or those that are given.
        replaces: whether nothing of the base's own values is in the adapted answer.
        also: something else that is compared, in eval mode.
    """

    model: PeftModel
    x: Tensor
    anew: Callable[[PeftModel, Given | None], PeftModel]
    replaces: bool = False
    also: Callable[[PeftModel], Tensor] | None = None


def target(trial: Trial, wanted: Callable[[str, Tensor], bool]) -> Target:
    slots = slots_of(trial.model, wanted)
    assert slots
    return Target(trial.model, slots, lambda given: trial.anew(trial.model, given))


def noisy(slots: Sequence[Slot], seed: int) -> list[Tensor]:
    """Other values than those that are there."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(slot.tensor.shape, generator=generator, dtype=torch.float64) for slot in slots]
    return [slot.tensor.detach() + 0.5 * each for slot, each in zip(slots, noise, strict=True)]


def assert_follows(trial: Trial, way: str, history: History, traced_first: bool) -> None:
    """A model answers as a fresh one after its adapter, its base, and both at once were written."""
    model = trial.model
    adapter = target(trial, lambda _, value: value.requires_grad)
    base = target(trial, lambda key, value: is_of_base(key) and value.is_floating_point() and not value.requires_grad)
    begun = [[tensor.detach().clone() for tensor in part.tensors()] for part in (adapter, base)]
    write, write_base = WAYS[way](adapter), (ANY[way] if way in ANY else ANY["data.copy_"])(base)
    for call in history:
        call(model, trial.x)
    wrong: list[str] = []
    given: Given = {}
    right: list[tuple[Tensor, Tensor]] = []
    for what in ("adapter", "base", "both, back"):
        if what == "adapter":
            given |= write(noisy(adapter.slots, 1)) or {}
        elif what == "base":
            given |= write_base(noisy(base.slots, 2)) or {}
        else:
            given |= {**(write(begun[0]) or {}), **(write_base(begun[1]) or {})}
        found = answers(model, trial.x, given, traced_first)
        also = None if trial.also is None or given or model.training else trial.also(model)
        fresh = trial.anew(model, given)
        expected = answers(fresh, trial.x)
        wrong += [f"{what}: {difference}" for difference in differences(found, expected)]
        if also is not None and trial.also is not None and not distance(also, trial.also(fresh)) < 1e-9:
            wrong.append(f"{what}: generation")
        right.append((expected.plain, of_base_alone(fresh, trial.x) if trial.replaces else expected.plain))
    assert not wrong, wrong
    of = int(trial.replaces)
    moves = {"adapter": (2, 0, 0), "base": (0, 1, of), "both, back": (1, 2, 0)}
    assert all(distance(right[after][of], right[before][of]) > CLEAR for before, after, of in moves.values())


@torch.no_grad()
def of_base_alone(model: PeftModel, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return answer_of(model(x))
