"""``disable_adapter()`` and ``inference()`` end where they are left: in any order, in any thread."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from peanut import PeftModel, PromptTuningConfig, get_peft_model

from .support import FIRST_CASES, one_thread, randomised, same_bits  # noqa: F401

CASE = next(case for case in FIRST_CASES if (case.method, case.kind) == ("PEANUT", "linear"))
CONTEXTS: dict[str, Callable[[PeftModel], AbstractContextManager[Any]]] = {
    "disabled": lambda model: model.disable_adapter(),
    "inference": lambda model: model.inference(),
}
every_context = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())


@torch.no_grad()
def answer(model: PeftModel) -> Tensor:
    return model(CASE.input())


@torch.no_grad()
def write(model: PeftModel) -> None:
    for _, value in model.adapters.parameters("default"):
        value.data.mul_(1.5)


def plain_is_right(model: PeftModel) -> bool:
    """Whether a plain call goes through the adapter, as it is now."""
    write(model)
    fresh = CASE.adapted()
    fresh.load_state_dict(model.state_dict())
    found = answer(model)
    return same_bits(found, answer(fresh)) and not same_bits(found, CASE.net()(CASE.input()))


def stream(model: PeftModel, context: Callable[[PeftModel], AbstractContextManager[Any]]) -> Iterator[Tensor]:
    with context(model):
        while True:
            yield answer(model)


@every_context
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_generators_may_be_closed_in_any_order(context: Callable[..., Any], order: tuple[int, ...]) -> None:
    model = CASE.adapted()
    streams = [stream(model, context) for _ in order]
    for one in streams * 2:
        next(one)
    for number in order:
        streams[number].close()  # type: ignore[attr-defined]
    assert plain_is_right(model)


@every_context
def test_a_generator_may_run_on_several_threads(context: Callable[..., Any]) -> None:
    model = CASE.adapted()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        one = stream(model, context)
        first.submit(next, one).result()
        second.submit(next, one).result()
        second.submit(one.close).result()  # type: ignore[attr-defined]
        for thread in (first, second):
            assert thread.submit(plain_is_right, model).result()


@pytest.mark.parametrize("inner_first", [False, True])
def test_contexts_of_both_kinds_may_be_left_in_any_order(inner_first: bool) -> None:
    model = CASE.adapted()
    outer, inner = model.disable_adapter(), model.inference()
    outer.__enter__()
    inner.__enter__()
    assert same_bits(answer(model), CASE.net()(CASE.input()))
    (inner if inner_first else outer).__exit__(None, None, None)
    assert same_bits(answer(model), CASE.net()(CASE.input())) == inner_first
    (outer if inner_first else inner).__exit__(None, None, None)
    assert plain_is_right(model)


@every_context
def test_what_was_begun_inside_and_outlives_it_is_outside(context: Callable[..., Any]) -> None:
    model = CASE.adapted()
    with context(model):
        answer(model)
        copied = contextvars.copy_context()
    assert copied.run(plain_is_right, model)


@every_context
def test_a_task_that_was_begun_inside_and_outlives_it_is_outside(context: Callable[..., Any]) -> None:
    model = CASE.adapted()

    async def serve(left: asyncio.Event) -> None:
        await left.wait()
        assert plain_is_right(model)

    async def main() -> None:
        left = asyncio.Event()
        with context(model):
            answer(model)
            task = asyncio.create_task(serve(left))
            await asyncio.sleep(0)
        left.set()
        await task

    asyncio.run(main())
    assert plain_is_right(model)


def test_a_call_that_runs_while_the_context_ends_stays_disabled() -> None:
    """As an asyncio task may leave it while a thread with its context computes."""
    model = CASE.adapted()
    disabled = model.disable_adapter()
    disabled.__enter__()

    def leave(*_: Any) -> None:
        disabled.__exit__(None, None, None)

    model.base_model.model.layer.register_forward_pre_hook(leave)
    assert same_bits(answer(model), CASE.net()(CASE.input()))


@every_context
def test_nothing_grows_by_contexts_that_were_left(context: Callable[..., Any]) -> None:
    model = CASE.adapted()

    def variables() -> int:
        return sum(len(value) if isinstance(value, dict) else 1 for value in contextvars.copy_context().values())

    answer(model)
    before = variables()
    for _ in range(20):
        with context(model):
            answer(model)
    for _ in range(20):  # left on another thread than entered
        one = context(model)
        one.__enter__()
        with ThreadPoolExecutor(1) as other:
            other.submit(one.__exit__, None, None, None).result()
    assert variables() <= before + 1
    assert len(model.adapters.state.call.contexts) <= 1
    assert plain_is_right(model)


def test_one_context_object_on_two_threads_and_left_on_a_third() -> None:
    """Nobody knows which entry is meant, so nothing is cached any more."""
    model = CASE.adapted()
    inference = model.inference()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second, ThreadPoolExecutor(1) as third:
        for thread in (first, second):
            thread.submit(inference.__enter__).result()
            thread.submit(answer, model).result()
        third.submit(inference.__exit__, None, None, None).result()
        for thread in (first, second, third):
            assert thread.submit(plain_is_right, model).result()


@pytest.mark.parametrize("context", [lambda model: model.inference(), lambda model: model.disable_adapter()])
def test_a_forward_that_breaks_off_in_a_context_leaves_nothing_of_its_batch(
    tiny_llama: Callable[..., Any], context: Callable[..., Any]
) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = randomised(get_peft_model(tiny_llama(), config)).eval()
    base, ids = model.get_base_model(), torch.arange(3, 17).reshape(2, 7)
    expected = base(ids).logits
    breaks = base.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), context(model):
        base(ids)
    breaks.remove()
    assert same_bits(base(ids).logits, expected)
    assert model.adapters.state.call.running.prompt is None
