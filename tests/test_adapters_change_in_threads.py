"""One thread changes the set of adapters while others compute.

Each answer is that of before or of after, or an error of one line; afterwards all is right. So it is however the model
was made, whichever module of it is called, and whatever it answers with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, inject_adapter_in_model
from peanut.model.adapters.adapter_set import AdapterSet

from .calls import Mlp, X, in_threads, interleaved, judged, mlp, one_line, run  # noqa: F401
from .support import distance, one_thread, randomised, same_bits  # noqa: F401

TURNS = 40

# Ways to make a model and to call it


@dataclass
class Answer:
    """Not a tree that torch knows."""

    y: Tensor


class AnsweringMlp(Mlp):
    def forward(self, x: Tensor) -> Any:
        return Answer(super().forward(x))


@dataclass(frozen=True)
class Made:
    """A model with adapters ``a``, which acts, and ``b``.

    Args:
        model: what is called.
        base: the base model.
    """

    model: Any
    base: Mlp

    @property
    def adapters(self) -> AdapterSet:
        return AdapterSet.of(self.base)

    @torch.no_grad()
    def __call__(self, **how: Any) -> Tensor:
        y = self.model(X, **how)
        return y.y if isinstance(y, Answer) else y

    def add(self, name: str, config: Any) -> None:
        active = list(self.adapters.state.active)
        with self.adapters.state.changing():
            self.adapters.add(name, config)
            randomised(self.base, [name])
            self.adapters.activate(active)


LAYERS = ["layers.0", "layers.1", "layers.2", "layers.3"]


def made(base: type[Mlp], called: Callable[[nn.Module], Any]) -> Made:
    torch.manual_seed(0)
    model = base().double()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=LAYERS), model, "a")
    inject_adapter_in_model(PeanutConfig(r=3, depth=1, target_modules=LAYERS), model, "b")
    randomised(model).eval()
    AdapterSet.of(model).activate("a")
    return Made(called(model), model)


MADE: dict[str, Callable[[], Made]] = {
    "PeftModel": lambda: made(Mlp, PeftModel.around),
    "dataclass": lambda: made(AnsweringMlp, PeftModel.around),
    "get_base_model": lambda: made(Mlp, lambda base: PeftModel.around(base).get_base_model()),
    "base_model": lambda: made(Mlp, lambda base: PeftModel.around(base).base_model),
    "injected": lambda: made(Mlp, lambda base: base),
    "injected, dataclass": lambda: made(AnsweringMlp, lambda base: base),
}

# A change at one moment: after the first of four layers


def another(own: Made) -> None:
    own.adapters.activate("b")


def both(own: Made) -> None:
    own.adapters.activate(["a", "b"])


def there_and_back(own: Made) -> None:
    for name in "ba":
        own.adapters.activate(name)


def merging(own: Made) -> None:
    own.adapters.merge()


def deleting(own: Made) -> None:
    own.adapters.activate("b")
    own.adapters.delete("a")


def adding(own: Made) -> None:
    own.add("new", LoraConfig(r=2, target_modules=LAYERS[1:]))


def unloading(own: Made) -> None:
    own.adapters.unload()


CHANGES = [another, both, there_and_back, merging, deleting, adding]
AT_ONCE = [(how, change) for how in MADE for change in CHANGES]
AT_ONCE += [("PeftModel", unloading), ("dataclass", unloading)]
"""Of a model without a wrapper nothing is left, once it is unloaded, that could look."""


@pytest.mark.parametrize(("how", "change"), AT_ONCE, ids=lambda each: getattr(each, "__name__", each))
def test_the_set_changes_in_the_middle_of_a_forward(how: str, change: Callable[[Made], None]) -> None:
    own, after = MADE[how](), MADE[how]()
    before = own()
    change(after)
    right = [before, after()]
    begun: list[str] = []

    def work() -> None:
        begun.append("")
        change(own)

    def between(_: Tensor) -> None:
        """Waits for the change, or goes on if it waits for this call."""
        own.base.between = None
        thread.start()
        thread.join(0.3)

    thread, own.base.between = threading.Thread(target=work), between
    try:
        found = own()
    except PeanutError as error:
        assert one_line(error)  # noqa: PT017 - either is right
    else:
        assert min(distance(found, each) for each in right) < 1e-9
    thread.join()
    assert begun
    assert distance(own(), right[1]) < 1e-9


# Many changes


def switching(own: Made, turn: int, folder: Path) -> None:
    own.adapters.activate("ab"[turn % 2])


def merging_and_back(own: Made, turn: int, folder: Path) -> None:
    own.adapters.merge() if turn % 2 == 0 else own.adapters.unmerge()


def coming_and_going(own: Made, turn: int, folder: Path) -> None:
    if turn % 2 == 0:
        own.add("new", LoraConfig(r=2, target_modules=["layers.0", "layers.3"]))
    else:
        own.adapters.delete("new")


def loading(own: Made, turn: int, folder: Path) -> None:
    PeftModel.around(own.base).load_adapter(folder / str(turn % 2) / "a", "a")


MANY = [switching, merging_and_back, coming_and_going, loading]
NAMES = ["a", "b", "__base__", "a"]
TRIED = [(how, False) for how in MADE] + [(how, True) for how in ("PeftModel", "dataclass")]


@pytest.mark.parametrize(
    ("how", "named"), TRIED, ids=lambda each: {True: "adapter_names", False: "plain"}.get(each, each)
)
@pytest.mark.parametrize("change", MANY, ids=lambda each: each.__name__)
def test_the_set_changes_while_others_compute(change: Any, how: str, named: bool, tmp_path: Path) -> None:
    """Each answer is that of before or of after, or an error of one line; afterwards all is right."""
    own = MADE[how]()
    given = {"adapter_names": NAMES} if named else {}
    saving = PeftModel.around(own.base)
    saving.save_pretrained(tmp_path / "0")
    right = [own(**given)]
    if change is loading:
        randomised(own.base, ["a"])
        saving.save_pretrained(tmp_path / "1")
        right.append(own(**given))
        saving.load_adapter(tmp_path / "0" / "a", "a")
    else:
        change(own, change is switching, tmp_path)
        if not (named and change is merging_and_back):  # then they are refused
            right.append(own(**given))
        change(own, change is not switching, tmp_path)
    assert distance(own(**given), right[0]) < 1e-12
    stop, wrong, answered = threading.Event(), [], []

    def look() -> None:
        found = own(**given)
        if not min(distance(found, each) for each in right) < 1e-9:
            wrong.append("neither answer")

    def work() -> None:
        """Changes, and waits for an answer that was begun after the change before it changes again."""
        try:
            for turn in range(TURNS):
                change(own, turn + (change is switching), tmp_path)
                refused = named and change is merging_and_back and turn % 2 == 0
                enough, end = len(answered) + 4, time.monotonic() + 10
                while not refused and len(answered) < enough and not wrong and time.monotonic() < end:
                    time.sleep(0.0005)
        finally:
            stop.set()

    watch = lambda: judged(look, wrong, answered, lambda: not stop.is_set())  # noqa: E731
    in_threads([work, watch, watch, watch])
    assert wrong == []
    assert len(answered) >= TURNS * (2 if named and change is merging_and_back else 4)
    change(own, 0, tmp_path)  # an even number of changes, and once more: all is as after the first
    if change is coming_and_going:
        assert "new" in own.adapters.configs
        change(own, 1, tmp_path)
    elif change is merging_and_back:
        assert own.adapters.state.merged == ["a"]
        change(own, 1, tmp_path)
    assert distance(own(**given), right[0]) < 1e-12


def test_disabled_where_something_is_merged() -> None:
    """The base itself answers inside, the merged model before and after, and other threads get either or an error."""
    model = mlp()
    plain, base = run(model, X), run(model, X, adapter_names=["__base__"] * 4)
    model.merge_adapter()
    stop, wrong, answered = threading.Event(), [], []

    def look() -> None:
        found = run(model, X)
        if not distance(found, plain) < 1e-9:  # another thread's context is not this one's
            wrong.append("not the adapted model")

    def toggle() -> None:
        try:
            for _ in range(TURNS):
                with model.disable_adapter():
                    if not distance(run(model, X), base) < 1e-9:
                        wrong.append("not the base")
        finally:
            stop.set()

    watch = lambda: judged(look, wrong, answered, lambda: not stop.is_set())  # noqa: E731
    in_threads([toggle, watch, watch, watch])
    assert wrong == []
    assert distance(run(model, X), plain) < 1e-9
    model.unmerge_adapter()
    assert same_bits(run(model, X), plain)
