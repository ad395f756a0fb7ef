"""What a context says ends where it ends: in tasks and threads that were begun inside it, and in whatever order.

``inference()`` and ``disable_adapter()`` are state of whoever is inside. Tasks and copied contexts inherit it, and must
not go on with it once the block is left.
"""

from __future__ import annotations

import asyncio
import builtins
import contextvars
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from peanut import LoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.model.layers.state import AdapterState

from .calls import X, in_threads, mlp, run
from .support import Case, distance, one_thread, same_bits  # noqa: F401
from .test_no_stale_values import DORA, FIRST, trial_of
from .writing.llama import IDS, adapted_llama
from .writing.reference import anew, answer_of
from .writing.trial import Trial, noisy, target

pytestmark = pytest.mark.filterwarnings("ignore:.* returned no loss")

every_method = pytest.mark.parametrize("case", [*FIRST, DORA], ids=str)


@torch.no_grad()
def answered(model: Any, x: Tensor) -> Tensor:
    return answer_of(model(x))


def written(trial: Trial) -> None:
    """Other values in the adapter, in a way that only a call that computes anew can see."""
    slots = target(trial, lambda _, value: value.requires_grad).slots
    for slot, value in zip(slots, noisy(slots, 3), strict=True):
        slot.tensor.data.copy_(value)


# Whoever was begun inside


def as_a_task(model: PeftModel, x: Tensor, write: Callable[[], None]) -> list[Tensor]:
    """What a task that was begun inside answers inside and after the block."""

    async def main() -> list[Tensor]:
        inside, left = asyncio.Event(), asyncio.Event()

        async def worker() -> list[Tensor]:
            found = [answered(model, x), answered(model, x)]
            inside.set()
            await left.wait()
            return [*found, answered(model, x), answered(model, x)]

        with model.inference():
            task = asyncio.create_task(worker())
            await inside.wait()
        write()
        left.set()
        return await task

    return asyncio.run(main())


def twice(context: contextvars.Context, model: PeftModel, x: Tensor) -> list[Tensor]:
    return [context.run(answered, model, x) for _ in range(2)]


def in_a_copied_context(model: PeftModel, x: Tensor, write: Callable[[], None]) -> list[Tensor]:
    with model.inference():
        context = contextvars.copy_context()
        found = twice(context, model, x)
    write()
    return [*found, *twice(context, model, x)]


def in_a_thread_with_a_copied_context(model: PeftModel, x: Tensor, write: Callable[[], None]) -> list[Tensor]:
    found: list[Tensor] = []

    with model.inference():
        context = contextvars.copy_context()
        in_threads([lambda: found.extend(twice(context, model, x))])
    write()
    in_threads([lambda: found.extend(twice(context, model, x))])
    return found


def within_an_outer_block(model: PeftModel, x: Tensor, write: Callable[[], None]) -> list[Tensor]:
    """The inner block is left inside of an outer one, and then that one, too."""
    with model.inference():
        answered(model, x)
        with model.inference():
            context = contextvars.copy_context()
            found = twice(context, model, x)
    write()
    return [*found, *twice(context, model, x)]


def while_another_block_is_open(model: PeftModel, x: Tensor, write: Callable[[], None]) -> list[Tensor]:
    """A block that is entered later has values of its own."""
    with model.inference():
        context = contextvars.copy_context()
        found = twice(context, model, x)
    write()
    with model.inference():
        answered(model, x)
        return [*found, *twice(context, model, x)]


BEGUN = [
    as_a_task,
    in_a_copied_context,
    in_a_thread_with_a_copied_context,
    within_an_outer_block,
    while_another_block_is_open,
]


@every_method
@pytest.mark.parametrize("begun", BEGUN, ids=lambda each: each.__name__)
def test_what_was_begun_inside_keeps_nothing_after_it(case: Case, begun: Any) -> None:
    trial = trial_of(case)
    model, x = trial.model, trial.x
    before = answered(anew(case, model), x)
    found = begun(model, x, lambda: written(trial))
    after = answered(anew(case, model), x)
    assert distance(after, before) > 0.02
    for own, expected in zip(found, (before, before, after, after), strict=True):
        assert distance(own, expected) < 1e-9


def test_a_task_begun_while_disabled_stays_so_and_no_other_is() -> None:
    """``disable_adapter`` is part of what a task was told to do, not something cached: it inherits it."""
    model = mlp()
    plain, base = run(model, X), run(model, X, adapter_names=["__base__"] * 4)
    with model.disable_adapter():
        context = contextvars.copy_context()
        assert same_bits(context.run(run, model, X), base)
    assert same_bits(run(model, X), plain)
    assert distance(plain, base) > 0.02


# What a context costs whoever enters it


def entered(context: Callable[[PeftModel], AbstractContextManager[Any]]) -> Callable[[PeftModel], None]:
    def enter(model: PeftModel) -> None:
        with context(model):
            pass

    return enter


def nested(model: PeftModel) -> None:
    with model.inference(), model.disable_adapter(), model.inference():
        run(model, X)


ENTERED: dict[str, Callable[[PeftModel], Any]] = {
    "inference": entered(PeftModel.inference),
    "disable_adapter": entered(PeftModel.disable_adapter),
    "nested": nested,
    "adapter_names": lambda model: run(model, X, adapter_names=["a", "b", "__base__", "a"]),
    "a gradient": lambda model: model(X).sum().backward(),
}


@pytest.mark.parametrize("how", ENTERED)
def test_a_context_entered_often_leaves_nothing_in_the_thread_s_context(how: str) -> None:
    model = mlp()
    ENTERED[how](model)
    before = len(contextvars.copy_context())
    for _ in range(1000 if how in ("inference", "disable_adapter") else 20):
        ENTERED[how](model)
    assert len(contextvars.copy_context()) == before


def test_models_that_are_gone_leave_nothing_in_the_thread_s_context() -> None:
    def serve() -> None:
        model = mlp()
        for each in ENTERED.values():
            each(model)

    serve()
    before = len(contextvars.copy_context())
    for _ in range(5):
        serve()
    assert len(contextvars.copy_context()) == before


def test_a_model_at_the_address_of_another_is_not_disabled_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be made where one lay that is gone: here every model's state says that it lies in one place."""
    real = builtins.id
    monkeypatch.setattr(builtins, "id", lambda each: 7 if isinstance(each, AdapterState) else real(each))

    def made() -> PeftModel:
        torch.manual_seed(0)
        return mlp()

    model = made()
    with model.disable_adapter():
        context = contextvars.copy_context()
        found = [context.run(run, made(), X), run(made(), X)]
    monkeypatch.undo()
    expected, base = run(model, X), run(model, X, adapter_names=["__base__"] * 4)
    assert all(same_bits(each, expected) for each in found)
    assert distance(expected, base) > 0.02


# Left in another order, or by someone else


def test_left_in_another_context_than_it_was_entered_in() -> None:
    """It is left all the same, or there is an error of one line; nothing cached inside is used afterwards."""
    case = next(case for case in FIRST if case.method == "PEANUT")
    trial = trial_of(case)
    model, x = trial.model, trial.x
    inference = model.inference()
    inference.__enter__()
    before = answered(model, x)
    with suppress(PeanutError):
        contextvars.Context().run(inference.__exit__, None, None, None)
    with suppress(PeanutError):
        inference.__exit__(None, None, None)
    written(trial)
    expected = answered(anew(case, model), x)
    assert distance(expected, before) > 0.02
    assert distance(answered(model, x), expected) < 1e-9


def test_left_more_often_than_entered_is_no_error_of_python_s() -> None:
    model = mlp()
    plain, inference = run(model, X), model.inference()
    with inference:
        pass
    with suppress(PeanutError):
        inference.__exit__(None, None, None)
    assert same_bits(run(model, X), plain)
    with model.inference():
        assert same_bits(run(model, X), plain)


CONTEXTS: dict[str, Callable[[PeftModel], AbstractContextManager[Any]]] = {
    "inference": PeftModel.inference,
    "disable": PeftModel.disable_adapter,
}


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize(
    "kinds",
    [
        ("disable", "inference", "inference"),
        ("inference", "disable", "inference"),
        ("inference", "inference", "disable"),
        ("disable", "disable", "inference"),
    ],
    ids="-".join,
)
def test_contexts_that_are_left_in_any_order(kinds: tuple[str, ...], order: tuple[int, ...]) -> None:
    """In the end no adapter is disabled and nothing is cached; before, what is left does not act."""
    case = next(case for case in FIRST if case.method == "PEANUT")
    trial = trial_of(case)
    model, x = trial.model, trial.x
    plain = answered(anew(case, model), x)
    with model.disable_adapter():
        base = answered(model, x)
    open_contexts = {number: CONTEXTS[kind](model) for number, kind in enumerate(kinds)}
    for context in open_contexts.values():
        context.__enter__()
        answered(model, x)
    for number in order:
        open_contexts.pop(number).__exit__(None, None, None)
        disabled = any(kinds[each] == "disable" for each in open_contexts)
        assert distance(answered(model, x), base if disabled else plain) < 1e-9
    written(trial)
    expected = answered(anew(case, model), x)
    assert min(distance(expected, plain), distance(plain, base)) > 0.02
    assert distance(answered(model, x), expected) < 1e-9


def test_a_generator_that_is_left_in_mid_block() -> None:
    """A stream of answers that is dropped before its end leaves nothing behind in whoever read it."""
    model = adapted_llama("PEANUT")
    plain = answered(model, IDS)

    def stream() -> Any:
        with model.inference():
            for _ in range(3):
                yield answered(model, IDS)

    one, other = stream(), stream()
    for each in (one, other, one):
        assert distance(next(each), plain) < 1e-9
    one.close()  # the one that was entered first
    assert distance(next(other), plain) < 1e-9
    other.close()
    before = answered(model, IDS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    assert distance(answered(model, IDS), before) > 0.02


def test_a_model_made_and_left_in_a_context_of_its_own() -> None:
    def work() -> Tensor:
        model = get_peft_model(mlp().unload(), LoraConfig(r=2, target_modules=["layers.0"], init_lora_weights=False))
        with model.inference(), model.disable_adapter():
            return run(model.eval(), X)

    expected = run(mlp(), X, adapter_names=["__base__"] * 4)
    assert same_bits(contextvars.Context().run(work), expected)
