"""A change that breaks off half-way leaves the model as it was, whatever broke it off and wherever.

Here memory runs out at one operation of torch after the other, or at one call within the library after the other.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peanut
from peanut import HRAConfig, IA3Config, LoraConfig, PeftModel, get_peft_model

from .calls import Mlp, X, run
from .operations import Operations
from .support import one_thread, randomised, same_bits  # noqa: F401

PLACES = 25
"""At about how many places a change is broken off."""
LAYERS = ["layers.0", "layers.2", "layers.3"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False),
    "HRA": lambda: HRAConfig(r=2, target_modules=LAYERS),
    "IA3": lambda: IA3Config(target_modules=LAYERS, feedforward_modules=[]),
}


class OutOfMemory(TorchDispatchMode):
    """The operation of this number fails, and none after it."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = at, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error
        return func(*args, **(kwargs or {}))


def base() -> Mlp:
    return Mlp().double().eval()


def model_of(method: str) -> PeftModel:
    """Adapters ``a`` and ``b``, both active."""
    torch.manual_seed(0)
    model = get_peft_model(base(), CONFIGS[method](), "a")
    model.add_adapter("b", CONFIGS["LORA"]())
    model.set_adapter(["a", "b"])
    return randomised(model).eval()  # type: ignore[no-any-return]


def seen(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What of a model must stay: its modules, what acts, is merged and trained; its weights as they lie there."""
    what: dict[str, Any] = {name: type(module) for name, module in model.named_modules()}
    what |= {f"trained {name}": value.requires_grad for name, value in model.named_parameters()}
    if isinstance(model, PeftModel):
        what |= {"active": model.active_adapters, "merged": model.merged_adapters, "configs": list(model.peft_config)}
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        return what, {**weights, "answer": model(X)}


def assert_seen(model: nn.Module, before: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    what, tensors = seen(model)
    assert what == before[0]
    assert tensors.keys() == before[1].keys()
    for name, value in tensors.items():
        assert same_bits(value, before[1][name]), name


def assert_all_or_nothing(made: Callable[[], nn.Module], change: Callable[[nn.Module], Any], least: int) -> None:
    """Wherever a change fails, the model is as before, and the change succeeds when it is tried again."""
    whole = made()
    with Operations() as counted:
        expected = change(whole)
    count = sum(counted.counts.values())
    assert count >= least
    after = seen(whole if expected is None else expected)
    model = made()
    before = seen(model)
    errors = [RuntimeError("CUDA error: out of memory"), KeyboardInterrupt(), MemoryError()]
    for number in range(0, count, max(1, count // PLACES)):
        error = errors[number % len(errors)]
        with pytest.raises(type(error)), OutOfMemory(number, error):
            change(model)
        assert_seen(model, before)
    again = change(model)
    assert_seen(model if again is None else again, after)


def merge(model: Any) -> None:
    model.merge_adapter()


def merge_one(model: Any) -> None:
    model.merge_adapter(["a"])


def merge_for_good(model: Any) -> nn.Module:
    """The model that is left has no adapters."""
    found: nn.Module = model.merge_and_unload()
    return found


@pytest.mark.parametrize("change", [merge, merge_one, merge_for_good], ids=lambda each: each.__name__)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_merge_that_breaks_off_merges_nothing(method: str, change: Any) -> None:
    assert_all_or_nothing(lambda: model_of(method), change, least=6)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_second_merge_that_breaks_off_leaves_the_first(method: str) -> None:
    def made() -> PeftModel:
        model = model_of(method)
        model.merge_adapter(["a"])
        return model

    assert_all_or_nothing(made, merge, least=6)


@pytest.mark.parametrize("method", CONFIGS)
def test_an_unmerge_that_breaks_off_can_be_tried_again(method: str) -> None:
    model = model_of(method)
    expected = seen(model)
    for number in range(3):
        model.merge_adapter()
        with pytest.raises(MemoryError), OutOfMemory(number, MemoryError()):
            model.unmerge_adapter()
        model.unmerge_adapter()
        assert_seen(model, expected)


# Adding and loading


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_that_is_half_added_is_gone(method: str) -> None:
    def add(model: Any) -> None:
        torch.manual_seed(0)
        model.add_adapter("c", CONFIGS[method]())

    assert_all_or_nothing(lambda: model_of("LORA"), add, least=3)


class Calls:
    """Within the context the calls of functions of the library are counted, and the one of a number fails.

    What sets a call's own state goes on, as it does so in ``finally``, and generators, as they are contexts.
    """

    def __init__(self, failing: int | None = None) -> None:
        self.failing, self.count = failing, 0

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(SOURCE) or code.co_flags & inspect.CO_GENERATOR:
            return
        if code.co_filename == STATE:
            return
        self.count += 1
        if self.count - 1 == self.failing:
            sys.setprofile(None)
            raise RuntimeError("CUDA error: out of memory")

    def __enter__(self) -> Calls:
        sys.setprofile(self.see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


SOURCE = str(Path(peanut.__file__).parent)
STATE = str(Path(SOURCE) / "model" / "layers" / "state.py")


def places(count: int) -> list[int]:
    assert count > PLACES
    return [number * count // PLACES for number in range(PLACES)]


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_that_is_half_loaded_is_gone(method: str, tmp_path: Path) -> None:
    model_of(method).save_pretrained(tmp_path)
    model, whole = model_of("LORA"), model_of("LORA")
    before = seen(model)
    with Calls() as counted:
        whole.load_adapter(tmp_path / "a", "c")
    for number in places(counted.count):
        with pytest.raises(RuntimeError, match="out of memory"), Calls(number):
            model.load_adapter(tmp_path / "a", "c")
        assert_seen(model, before)
    model.load_adapter(tmp_path / "a", "c")
    assert_seen(model, seen(whole))


@pytest.mark.parametrize("method", CONFIGS)
def test_a_base_onto_which_an_adapter_is_half_loaded_is_as_before(method: str, tmp_path: Path) -> None:
    adapted = model_of(method)
    adapted.set_adapter("a")
    expected = run(adapted, X)
    adapted.save_pretrained(tmp_path)
    model = base()
    before = seen(model)
    with Calls() as counted:
        PeftModel.from_pretrained(base(), tmp_path / "a")
    for number in places(counted.count):
        with pytest.raises(RuntimeError, match="out of memory"), Calls(number):
            PeftModel.from_pretrained(model, tmp_path / "a")
        assert_seen(model, before)
    assert same_bits(run(PeftModel.from_pretrained(model, tmp_path / "a"), X), expected)
