"""What ``inference()`` caches while it is open: no more than what acts, and that once.

Adapters that are swapped, deleted or taken off their layers let go of what was cached for them; batches that take turns
do not compute it again.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeftModel
from peanut.model.layers.layer import MOST

from .calls import Mlp, X, mlp, run
from .operations import Operations
from .support import Case, distance, one_thread, randomised  # noqa: F401
from .test_inference_context import plain_for, plainly
from .test_no_stale_values import DORA, FIRST
from .test_nothing_kept import alive, only_new_objects  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.* returned no loss")

every_method = pytest.mark.parametrize("case", [*FIRST, DORA], ids=str)

# What changes inside is let go


def added(case: Case, model: PeftModel, name: str) -> None:
    model.add_adapter(name, case.config())
    randomised(model, [name]).eval()


def swapped(case: Case, model: PeftModel, x: Tensor) -> None:
    """Two adapters take turns, active, by name, and merged."""
    for name in "ba":
        model.set_adapter(name)
        plainly(model, x)
        plain_for(model, x, {"a": "b", "b": "a"}[name])
    model.merge_adapter(["a"])
    plainly(model, x)
    model.unmerge_adapter()
    plainly(model, x)


def replaced(case: Case, model: PeftModel, x: Tensor) -> None:
    """A third adapter comes, answers, and is deleted."""
    added(case, model, "c")
    model.set_adapter("c")
    plainly(model, x)
    plain_for(model, x, "c")
    model.delete_adapter("c")
    model.set_adapter("a")
    plainly(model, x)


def unwrapped(case: Case, model: PeftModel, x: Tensor) -> None:
    """All adapters go, and with them their layers' wrappers; others come."""
    for name in "ab":
        plain_for(model, x, name)
    for name in "ab":
        model.delete_adapter(name)
    for name in "ab":
        added(case, model, name)
    model.set_adapter("a")
    plainly(model, x)


TURNS: list[Callable[[Case, PeftModel, Tensor], None]] = [swapped, replaced, unwrapped]


@every_method
@pytest.mark.parametrize("turn", TURNS, ids=lambda each: each.__name__)
def test_what_is_cached_does_not_grow(case: Case, turn: Any) -> None:
    model, x = case.adapted("a", "b"), case.input()
    model.set_adapter("a")
    with model.inference():
        for _ in range(2):
            turn(case, model, x)
        before = len(alive())
        for _ in range(3):
            turn(case, model, x)
        assert len(alive()) <= before


def of_adapter(model: PeftModel, name: str) -> list[weakref.ref[Tensor]]:
    """Its parameters, as long as anyone else holds them."""
    own = [weakref.ref(value) for _, value in model.adapters.parameters(name) if isinstance(value, nn.Parameter)]
    assert own
    return own


@every_method
@pytest.mark.parametrize("how", ["by name", "both"])
def test_a_deleted_adapter_is_let_go_inside(case: Case, how: str) -> None:
    model, x = case.adapted("a", "b"), case.input()
    with model.inference():
        model.set_adapter(["a", "b"] if how == "both" else "a")
        plainly(model, x)
        plain_for(model, x, "b")
        gone = of_adapter(model, "b")
        model.delete_adapter("b")
        model.set_adapter("a")
        plainly(model, x)
        gc.collect()
        assert [tuple(each().shape) for each in gone if each() is not None] == []  # type: ignore[union-attr]


@every_method
def test_an_unwrapped_layer_is_let_go_inside(case: Case) -> None:
    """The last adapter goes; the layer is the base's own again, and nothing holds what wrapped it."""
    model, x = case.adapted(), case.input()
    with model.inference():
        plainly(model, x)
        gone, wrapper = of_adapter(model, "default"), weakref.ref(next(layer for _, layer in model.adapters.layers()))
        model.delete_adapter("default")
        assert distance(plainly(model, x), plainly(case.net(), x)) < 1e-12
        gc.collect()
        assert wrapper() is None
        assert [tuple(each().shape) for each in gone if each() is not None] == []  # type: ignore[union-attr]


def test_a_model_that_is_gone_is_let_go_though_its_context_is_open() -> None:
    model = mlp()
    with model.inference():
        run(model, X)
        gone = of_adapter(model, "a")
        del model
        gc.collect()
        left = [each for each in gone if each() is not None]
    assert left == [] or len(left) == len(gone)  # whoever is inside may hold the model, not parts of it


# Batches that take turns

MIXED = [["a", "b", "__base__", "a"], ["b", "a", "a", "b"]]


def cost(model: Any, x: Tensor, batches: list[list[str]]) -> list[int]:
    """How many operations each of the batches takes, once all were seen twice."""
    found = []
    with torch.no_grad(), model.inference():
        for _ in range(2):
            for names in batches:
                model(x, adapter_names=names)
        for names in batches:
            with Operations() as counted:
                model(x, adapter_names=names)
            found.append(sum(counted.counts.values()))
    return found


@every_method
def test_mixed_batches_that_take_turns_cost_what_each_costs_alone(case: Case) -> None:
    def model() -> PeftModel:
        return case.adapted("a", "b")

    x = case.input()
    alone = [cost(model(), x, [names])[0] for names in MIXED]
    assert min(alone) > 0
    assert cost(model(), x, MIXED) == alone


def test_so_do_batches_of_plain_calls_and_of_names() -> None:
    model, counts = mlp(), []
    model.set_adapter("b")  # which computes a factor from the weight
    with torch.no_grad(), model.inference():
        for turn in range(4):
            for how in ({}, {"adapter_names": MIXED[0]}, {"adapter_names": MIXED[1]}):
                with Operations() as counted:
                    model(X, **how)
                counts.append((turn, sum(counted.counts.values())))
    assert [own for turn, own in counts if turn == 3] == [own for turn, own in counts if turn == 2]
    steady, first = ([own for turn, own in counts if turn == wanted] for wanted in (3, 0))
    assert all(one < other for one, other in zip(steady, first, strict=True))
    assert isinstance(model.get_base_model(), Mlp)


@torch.no_grad()
def test_mixed_batches_of_every_length_and_mix_are_cached_within_bounds() -> None:
    model = mlp()
    names = ["a", "b", "__base__"]
    with model.inference():
        for length in range(2, 12):
            model(X[:, :1].repeat(1, length, 1), adapter_names=MIXED[0])
        cache = model.adapters.state.call.cache
        sizes = [len(cache.of(layer)) for _, layer in model.adapters.layers()]
        assert max(sizes) <= 4
        for mix in itertools.product(names, repeat=4):
            model(X[:, :2], adapter_names=list(mix))
        sizes = [len(cache.of(layer)) for _, layer in model.adapters.layers()]
        assert max(sizes) <= MOST
