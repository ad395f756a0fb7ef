"""The state of a call belongs to the call: threads and asyncio tasks each get the answer that they would get alone.

``disable_adapter`` belongs to the thread or the asyncio task that entered it; ``adapter_names`` and ``task_ids`` to the
call that they are given to. Which adapters are active or merged is the model's, and holds for everyone.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peanut import PeftModel

from .calls import MODELS, X, in_threads, interleaved, jobs_of, judged, mlp, poly, run, wrong_answers  # noqa: F401
from .support import distance, one_thread, randomised, same_bits  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.* returned no loss")


@pytest.mark.parametrize(
    ("name", "count"), [("mlp", 2000), ("poly", 800), ("prompted", 240), ("gated", 160), ("hooked", 240)]
)
def test_threads_each_get_their_own_answer(name: str, count: int) -> None:
    model = MODELS[name]()
    jobs = jobs_of(name, model)
    before = {job: jobs[job]() for job in jobs}
    assert len({f"{float(each.sum()):.6f}" for each in before.values()}) > len(jobs) / 2  # they differ
    assert wrong_answers(jobs, count) == []
    for job, expected in before.items():
        assert same_bits(jobs[job](), expected), job


@pytest.mark.parametrize("name", ["mlp", "prompted"])
def test_threads_within_one_inference_context(name: str) -> None:
    model = MODELS[name]()
    jobs = {job: call for job, call in jobs_of(name, model).items() if "gradient" not in job}
    with model.inference():
        assert wrong_answers(jobs, 160) == []
    assert wrong_answers(jobs, 160) == []


# Calls that overlap, one pair of each kind, in a fixed order


class Meeting:
    """Two calls that are both inside the model at once: the first to enter is the first to leave, or the last."""

    def __init__(self, model: PeftModel, nested: bool) -> None:
        self.entered, self.nested, self.done = [threading.Event(), threading.Event()], nested, threading.Event()
        model.get_base_model().between = self.wait  # type: ignore[assignment]

    def wait(self, _: Tensor) -> None:
        number = {"first": 0, "second": 1}.get(threading.current_thread().name)
        if number is None:
            return
        self.entered[number].set()
        assert self.entered[1 - number].wait(10)
        if number == (0 if self.nested else 1):
            assert self.done.wait(10)

    def __call__(self, calls: list[Callable[[], Tensor]]) -> list[Tensor]:
        answers: list[Any] = [None, None]

        def work(number: int) -> None:
            if number == 1:
                assert self.entered[0].wait(10)
            answers[number] = calls[number]()
            if number == (1 if self.nested else 0):
                self.done.set()

        threads = [threading.Thread(target=work, args=(n,), name=name) for n, name in enumerate(("first", "second"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return answers


@pytest.mark.parametrize("nested", [False, True], ids=["first in, first out", "nested"])
@pytest.mark.parametrize("name", ["mlp", "poly"])
def test_overlapping_calls_leave_no_trace(name: str, nested: bool) -> None:
    model = MODELS[name]()
    jobs = {job: call for job, call in jobs_of(name, model).items() if job.endswith(" 0")}
    expected = {job: call() for job, call in jobs.items()}
    assert len(expected) > 6
    for pair in itertools.product(list(jobs), repeat=2):
        found = Meeting(model, nested)([jobs[job] for job in pair])
        model.get_base_model().between = None  # type: ignore[assignment]
        assert all(distance(own, expected[job]) < 1e-12 for own, job in zip(found, pair, strict=True)), pair
        assert same_bits(jobs["plain 0"](), expected["plain 0"]), pair
    for job, before in expected.items():
        assert same_bits(jobs[job](), before), job


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["mlp", "poly"])
def test_calls_that_break_off_leave_no_trace(name: str, error: type[BaseException]) -> None:
    model = MODELS[name]()
    jobs = jobs_of(name, model)
    expected = {job: call() for job, call in jobs.items()}
    assert len(expected) > 6

    def stop(_: Tensor) -> None:
        raise error

    for broken in jobs:
        model.get_base_model().between = stop  # type: ignore[assignment]
        with pytest.raises(error):
            jobs[broken]()
        model.get_base_model().between = None  # type: ignore[assignment]
        assert same_bits(jobs["plain 0"](), expected["plain 0"]), broken
    for job, before in expected.items():
        assert same_bits(jobs[job](), before), job


class OnPurpose(Exception):  # noqa: N818
    """Raised by a model in a test."""


def test_calls_that_break_off_in_threads() -> None:
    """Half of the calls raise at random; the others are right."""
    model = mlp()
    jobs = jobs_of("mlp", model)
    turns = itertools.count()
    local = threading.local()

    def maybe(_: Tensor) -> None:
        if getattr(local, "breaks", False) and next(turns) % 2:
            raise OnPurpose

    def breaking(call: Callable[[], Tensor]) -> Tensor:
        local.breaks = True
        try:
            return call()
        except OnPurpose:
            local.breaks = False
            return call()
        finally:
            local.breaks = False

    before = {job: call() for job, call in jobs.items()}
    model.get_base_model().between = maybe  # type: ignore[assignment]
    assert wrong_answers({job: lambda call=call: breaking(call) for job, call in jobs.items()}, 640) == []
    model.get_base_model().between = None  # type: ignore[assignment]
    for job, expected in before.items():
        assert same_bits(jobs[job](), expected), job


# To whom disable_adapter belongs


def test_nested_contexts() -> None:
    model = mlp()
    plain, b = run(model, X), run(model, X, adapter_names=["b"] * 4)
    base = run(model, X, adapter_names=["__base__"] * 4)
    assert min(distance(plain, base), distance(plain, b), distance(b, base)) > 0.02
    with model.disable_adapter():
        assert distance(run(model, X), base) < 1e-12
        with model.disable_adapter():
            assert distance(run(model, X, adapter_names=["b"] * 4), base) < 1e-12
        assert distance(run(model, X), base) < 1e-12
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            _ = 1 / 0
        assert distance(run(model, X), base) < 1e-12
        model.set_adapter("b")
        assert distance(run(model, X), base) < 1e-12
    assert distance(run(model, X), b) < 1e-12
    model.set_adapter("a")
    assert same_bits(run(model, X), plain)


def test_a_thread_started_inside_is_not_inside() -> None:
    model = mlp()
    plain = run(model, X)
    base = run(model, X, adapter_names=["__base__"] * 4)
    assert distance(plain, base) > 0.02
    found: list[Tensor] = []

    def work() -> None:
        found.append(run(model, X))
        with model.disable_adapter():
            found.append(run(model, X))
        found.append(run(model, X))

    with model.disable_adapter():
        in_threads([work])
        found.append(run(model, X))
    found.append(run(model, X))
    for own, expected in zip(found, [plain, base, plain, base, plain], strict=True):
        assert distance(own, expected) < 1e-12


def test_a_thread_outlives_the_context_that_it_was_started_in() -> None:
    """It enters before the other leaves, and leaves after: neither changes what holds for the other."""
    model = mlp()
    plain, base = run(model, X), run(model, X, adapter_names=["__base__"] * 4)
    inside, left, found = threading.Event(), threading.Event(), []

    def work() -> None:
        with model.disable_adapter():
            inside.set()
            assert left.wait(10)
            found.append(run(model, X))
        found.append(run(model, X))

    with model.disable_adapter():
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(10)
    found.append(run(model, X))
    left.set()
    thread.join(10)
    found.append(run(model, X))
    for own, expected in zip(found, [plain, base, plain, plain], strict=True):
        assert distance(own, expected) < 1e-12


def test_asyncio_tasks_each_have_their_own() -> None:
    model = mlp()
    plain = run(model, X)
    answers = {name: run(model, X, adapter_names=[name] * 4) for name in ("a", "b", "c", "__base__")}
    wrong: list[str] = []

    async def disabled() -> None:
        for _ in range(20):
            with model.disable_adapter():
                for _ in range(3):
                    await asyncio.sleep(0)
                    if not distance(run(model, X), answers["__base__"]) < 1e-12:
                        wrong.append("disabled")
            if not distance(run(model, X), plain) < 1e-12:
                wrong.append("after disabled")
            await asyncio.sleep(0)

    async def named(name: str) -> None:
        for _ in range(60):
            await asyncio.sleep(0)
            if not distance(run(model, X, adapter_names=[name] * 4), answers[name]) < 1e-12:
                wrong.append(name)
            await asyncio.sleep(0)
            if not distance(run(model, X), plain) < 1e-12:
                wrong.append("plain")

    async def main() -> None:
        await asyncio.gather(disabled(), named("b"), disabled(), named("__base__"), named("c"))

    asyncio.run(main())
    assert wrong == []
    assert same_bits(run(model, X), plain)


def test_tasks_differ_by_thread() -> None:
    """Poly's task_ids and the names of another adapter, without a context of their own."""
    model = poly()
    calls = {
        f"{tasks}{names}": lambda tasks=tasks, names=names: run(model, X, task_ids=tasks, adapter_names=names)
        for tasks in ([0] * 4, [1] * 4, [2, 0, 2, 1])
        for names in (None, ["a", "b", "a", "__base__"])
    }
    assert wrong_answers(calls, 400) == []


def test_a_backward_in_another_thread() -> None:
    model = mlp().train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for how in ({}, {"adapter_names": ["a", "b", "__base__", "a"]}):
        expected = torch.autograd.grad(model(X, **how).cumsum(-1).sum(), trained)
        y = model(X, **how).cumsum(-1).sum()
        found: list[Any] = []
        in_threads([lambda y=y, found=found: found.append(torch.autograd.grad(y, trained))])
        assert max(float(each.abs().max()) for each in expected) > 0
        assert all(distance(own, each) < 1e-12 for own, each in zip(found[0], expected, strict=True))
