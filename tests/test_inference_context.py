"""``with model.inference():`` lets values be kept: inside, answers are right; after it, nothing is left.

What writes to weights past the library is not looked for inside; what the library itself changes is seen at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peanut import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from .support import Case, distance, one_thread, randomised  # noqa: F401
from .test_no_stale_values import DORA, FIRST, cover, over, trial_of
from .test_nothing_kept import alive, only_new_objects  # noqa: F401
from .writing import WAYS
from .writing.llama import IDS, adapted_llama, generated
from .writing.reference import (
    History,
    anew,
    answer,
    answer_of,
    answers,
    differences,
    direction,
    learn,
    to_eval,
    to_train,
)
from .writing.trial import assert_follows

pytestmark = pytest.mark.filterwarnings("ignore:.* returned no loss")

every_method = pytest.mark.parametrize("case", [*FIRST, DORA], ids=str)


def plainly(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return answer_of(model(x))


def within(model: PeftModel, x: Tensor) -> None:
    with model.inference():
        answer(model, x)
        answer(model, x)


def within_twice(model: PeftModel, x: Tensor) -> None:
    with model.inference():
        answer(model, x)
        with model.inference():
            answer(model, x)
            learn(model, x)
        answer(model, x)
    within(model, x)


def broken_off(model: PeftModel, x: Tensor) -> None:
    def work() -> None:
        with model.inference():
            answer(model, x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()


LEFT: list[History] = [(to_eval, within), (to_eval, within_twice), (to_eval, broken_off, answer), (to_train, within)]


@over(cover([*FIRST, DORA], list(WAYS), 4, LEFT))
def test_after_it_every_write_is_seen(case: Case, way: str, history: History, traced_first: bool) -> None:
    assert_follows(trial_of(case), way, history, traced_first)


@every_method
def test_answers_inside_are_those_outside(case: Case) -> None:
    trial = trial_of(case)
    expected = answers(anew(case, trial.model), trial.x)
    with trial.model.inference():
        for turn in range(3):
            assert differences(answers(trial.model, trial.x, traced_first=bool(turn % 2)), expected) == []
            with trial.model.inference():
                assert differences(answers(trial.model, trial.x), expected) == []
    assert differences(answers(trial.model, trial.x), expected) == []


@every_method
def test_nothing_stays_after_it(case: Case) -> None:
    model, x = case.adapted(), case.input()
    within_twice(case.adapted(), x)
    before = alive()
    within(model, x)
    left = [tuple(each.shape) for key, each in alive().items() if key not in before]
    assert not left, left


@every_method
def test_training_inside_is_training(case: Case) -> None:
    x = case.input()

    def losses(inside: bool, training: bool) -> Tensor:
        torch.manual_seed(1)
        model = case.adapted().train(training)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, fused=True)
        found = []

        def loop() -> None:
            for step in range(4):
                torch.default_generator.manual_seed(step)  # some methods draw
                y = model(x)
                loss = (y * direction(y)).sum()
                found.append(loss.item())
                optimizer.zero_grad(set_to_none=False)
                loss.backward()
                optimizer.step()

        if inside:
            with model.inference():
                loop()
        else:
            loop()
        return torch.tensor(found, dtype=torch.float64)

    for training in (True, False):
        expected = losses(False, training)
        assert distance(losses(True, training), expected) < 1e-9
        assert abs(expected[-1] - expected[0]) > 1e-3 * abs(expected[0])


# What the library changes inside


def _two(case: Case) -> tuple[PeftModel, Tensor]:
    return case.adapted("a", "b"), case.input()


def alone(case: Case, name: str, model: PeftModel) -> Tensor:
    """What a model answers that never had more than what adapter ``name`` has now."""
    fresh = case.adapted(name)
    state = get_peft_model_state_dict(model, adapter_name=name)
    set_peft_model_state_dict(fresh, state, adapter_name=name)
    return plainly(fresh.eval(), case.input())


@every_method
def test_which_adapter_acts_is_seen_inside(case: Case) -> None:
    model, x = _two(case)
    expected = {name: alone(case, name, model) for name in "ab"}
    base = plainly(case.net(), x)
    assert min(distance(expected["a"], expected["b"]), distance(expected["a"], base)) > 0.02
    with model.inference():
        for name in "abab":
            model.set_adapter(name)
            assert distance(plainly(model, x), expected[name]) < 1e-9
            with model.disable_adapter():
                assert distance(plainly(model, x), base) < 1e-12
            assert distance(plainly(model, x), expected[name]) < 1e-9
            other = {"a": "b", "b": "a"}[name]
            assert distance(answer_of(plain_for(model, x, other)), expected[other]) < 1e-9
            assert distance(plainly(model, x), expected[name]) < 1e-9


@torch.no_grad()
def plain_for(model: PeftModel, x: Tensor, name: str) -> Any:
    return model(x, adapter_names=[name] * len(x))


@every_method
def test_merging_is_seen_inside(case: Case) -> None:
    model, x = case.adapted(), case.input()
    expected, base = plainly(model, x), plainly(case.net(), x)
    with model.inference():
        for _ in range(2):
            assert distance(plainly(model, x), expected) < 1e-9
            model.merge_adapter()
            assert distance(plainly(model, x), expected) < 1e-9
            with model.disable_adapter():
                assert distance(plainly(model, x), base) < 1e-9
            assert distance(plainly(model, x), expected) < 1e-9
            model.unmerge_adapter()
    assert distance(plainly(model, x), expected) < 1e-9
    assert distance(expected, base) > 0.02


@every_method
@pytest.mark.parametrize("how", ["load_adapter", "set_peft_model_state_dict"])
def test_other_values_are_seen_inside(case: Case, how: str, tmp_path: Path) -> None:
    """Values that the library puts into an adapter that is there."""
    model, x = case.adapted(), case.input()
    donor = randomised(case.adapted(), scale=0.5).eval()
    expected = plainly(model, x), plainly(donor, x)
    assert distance(*expected) > 0.02
    for number, each in enumerate((model, donor)):
        each.save_pretrained(tmp_path / str(number))
    states = [{k: v.clone() for k, v in get_peft_model_state_dict(each).items()} for each in (model, donor)]
    with model.inference():
        assert distance(plainly(model, x), expected[0]) < 1e-9
        for number in (1, 0, 1):
            if how == "load_adapter":
                model.load_adapter(tmp_path / str(number), "default")
            else:
                set_peft_model_state_dict(model, states[number])
            assert distance(plainly(model, x), expected[number]) < 1e-9


@every_method
def test_adapters_that_come_and_go_are_seen_inside(case: Case) -> None:
    model, x = case.adapted("a"), case.input()
    before = plainly(model, x)
    with model.inference():
        for turn in range(2):
            assert distance(plainly(model, x), before) < 1e-9
            model.add_adapter("b", case.config())
            randomised(model, ["b"], scale=0.3 + turn)
            model.set_adapter("b")
            found = plainly(model.eval(), x)
            assert distance(found, alone(case, "b", model)) < 1e-9
            assert distance(found, before) > 0.02
            model.delete_adapter("b")
            model.set_adapter("a")
    assert distance(plainly(model, x), before) < 1e-9


@pytest.mark.parametrize(
    "name", ["PEANUT", "LORA", "HRA", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "XLORA", "BOTTLENECK"]
)
def test_a_server_s_loop(name: str) -> None:
    """Forwards and generation inside are those outside; what is written between two contexts is seen in the second."""
    model = adapted_llama(name)
    for _ in range(2):
        outside = plainly(model, IDS), generated(model)
        with model.inference():
            for _ in range(2):
                assert distance(plainly(model, IDS), outside[0]) < 1e-9
                assert distance(generated(model), outside[1]) < 1e-9
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        assert distance(plainly(model, IDS), outside[0]) > 0.02


@pytest.mark.parametrize("name", ["PEANUT", "HRA", "LORA", "OFT"])
def test_threads_that_enter_and_leave_it(name: str) -> None:
    """One thread stays inside while others come and go: when all have left, a write is seen by every thread."""
    case = next(case for case in FIRST if case.method == name)
    model, x = case.adapted("a", "b"), case.input()
    expected = {name: alone(case, name, model) for name in "ab"}
    wrong: list[float] = []

    def serve(own: str) -> None:
        for _ in range(10):
            with model.inference():
                for _ in range(3):
                    far = distance(plain_for(model, x, own), expected[own])
                    if not far < 1e-9:
                        wrong.append(far)

    def in_threads(work: Callable[[str], None]) -> None:
        threads = [threading.Thread(target=work, args=(own,)) for own in "abab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    in_threads(serve)
    assert not wrong
    for own in "ab":
        for _, value in model.adapters.parameters(own):
            value.data += 0.2 * torch.randn_like(value)
    before, expected = expected, {own: alone(case, own, model) for own in "ab"}
    assert min(distance(expected[own], before[own]) for own in "ab") > 0.02
    in_threads(serve)
    assert not wrong
