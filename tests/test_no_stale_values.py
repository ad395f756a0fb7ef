"""Nothing computed from a tensor outlives its call: every method answers with the values as they are, however written.

Each case is compared with a fresh model that is made from the values as they are now and is called once. Every method
meets every way of writing on one kind of layer, and some ways on all kinds, in all variants and in a Llama that
generates; what was called before takes turns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from peanut import PeftModel

from .support import CASES, FIRST_CASES, Case, distance, one_thread  # noqa: F401
from .writing import FEW, WAYS
from .writing.llama import ADAPT, IDS, adapted_llama, generated, llama
from .writing.reference import (
    HISTORIES,
    History,
    anew,
    answer,
    answers,
    begun,
    differences,
    learn,
    remade,
    to_eval,
    to_train,
)
from .writing.trial import Trial, assert_follows, noisy, target

pytestmark = pytest.mark.filterwarnings("ignore:.* returned no loss")  # so its penalty is not in it

FIRST = list({case.method: case for case in reversed(FIRST_CASES)}.values())[::-1]
"""One case of every method, on the first of its kinds of layer."""
DORA = next(case for case in CASES if case.variant.name == "dora")

Tried = tuple[Any, str, History, bool]


def trial_of(case: Case) -> Trial:
    return Trial(
        begun(case), case.input(), lambda own, given: anew(case, own, given), replaces=case.method == "LN_TUNING"
    )


def cover(
    cases: Sequence[Any], ways: Sequence[str], each: int, histories: Sequence[History] = HISTORIES
) -> list[Tried]:
    """Every case with ``each`` of the ways, which take turns; the histories take turns with both cases and ways."""
    count, found = len(histories), []
    for number, case in enumerate(cases):
        for place in range(each):
            turn = number * each + place
            history = histories[(number + place) % count]
            found.append((case, ways[turn % len(ways)], history, bool((number + place // count) % 2)))
    return found


def over(tried: list[Tried]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "way", "history", "traced_first"), tried, ids=map(named, tried))


def named(one: Tried) -> str:
    case, way, history, traced_first = one
    return f"{case}, {way}, {'-'.join(call.__name__ for call in history)}{', traced first' if traced_first else ''}"


@over(cover([*FIRST, DORA], list(WAYS), len(WAYS)))
def test_every_method_in_every_way(case: Case, way: str, history: History, traced_first: bool) -> None:
    assert_follows(trial_of(case), way, history, traced_first)


@over(cover([case for case in FIRST_CASES if case not in FIRST], FEW, 3))
def test_every_kind_of_layer(case: Case, way: str, history: History, traced_first: bool) -> None:
    assert_follows(trial_of(case), way, history, traced_first)


@over(cover([case for case in CASES if case not in [*FIRST_CASES, DORA]], FEW, 1))
def test_every_variant(case: Case, way: str, history: History, traced_first: bool) -> None:
    assert_follows(trial_of(case), way, history, traced_first)


# In a Llama that generates, every method


def generate(model: PeftModel, x: Tensor) -> None:
    generated(model, x)


GENERATING: list[History] = [
    (to_eval, generate, answer),
    (to_eval, generate, learn),
    (to_train, learn, to_eval, generate),
    (to_eval, learn, answer, generate, generate),
    (to_eval, generate, to_train, learn),
]


@over(cover(list(ADAPT), FEW, 2, GENERATING))
def test_after_generation(case: str, way: str, history: History, traced_first: bool) -> None:
    model = adapted_llama(case)
    trial = Trial(model, IDS, lambda own, given: remade(own, llama(), ADAPT[case], given), case == "FULL", generated)
    assert_follows(trial, way, history, traced_first)


# What is not trained, and copies

UNTRAINED = ("vera_A", "vera_B", "randlora_A", "randlora_B", "start_A", "start_B")
HAVING_UNTRAINED = [
    next(case for case in CASES if (case.method, case.variant.name) == wanted)
    for wanted in (("VERA", "plain"), ("VERA", "from the seed"), ("RANDLORA", "plain"), ("LORA", "pissa"))
]
TO_BUFFERS = [
    "copy_",
    "data.copy_",
    "numpy of detach()",
    "setattr",
    "half() and back",
    "flat buffer",
    "functional_call",
]


@over(cover(HAVING_UNTRAINED, TO_BUFFERS, len(TO_BUFFERS)))
def test_tensors_that_are_not_trained(case: Case, way: str, history: History, traced_first: bool) -> None:
    trial = trial_of(case)
    buffers = target(trial, lambda key, value: key.split(".")[-2] in UNTRAINED)
    write = WAYS[way](buffers)
    for call in history:
        call(trial.model, trial.x)
    before = answers(anew(case, trial.model), trial.x)
    for seed in (1, 2):
        given = write(noisy(buffers.slots, seed))
        found = answers(trial.model, trial.x, given, traced_first)
        expected = answers(anew(case, trial.model, given), trial.x)
        assert differences(found, expected) == []
        assert distance(expected.plain, before.plain) > 0.02
        before = expected


@pytest.mark.parametrize("history", HISTORIES[::3], ids=lambda history: "-".join(call.__name__ for call in history))
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_copy_is_written_to(case: Case, history: History) -> None:
    """Neither the copy nor the original answers with what was computed for the other."""
    trial = trial_of(case)
    for call in history:
        call(trial.model, trial.x)
    before = answers(trial.model, trial.x)
    twin = copy.deepcopy(trial.model)
    assert differences(answers(twin, trial.x), before) == []
    with torch.no_grad():
        for value in twin.parameters():
            if value.requires_grad:
                value.data.add_(torch.rand_like(value), alpha=0.5)
    expected = answers(anew(case, twin), trial.x)
    assert differences(answers(twin, trial.x), expected) == []
    assert differences(answers(trial.model, trial.x), before) == []
    assert distance(expected.plain, before.plain) > 0.02
