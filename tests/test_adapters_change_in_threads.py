"""One thread changes the set of adapters while others compute.

Each answer is that of before or of after, or an error of one line; afterwards all is right.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from peanut import LoraConfig, PeftModel

from .calls import X, in_threads, interleaved, judged, mlp, run  # noqa: F401
from .support import distance, one_thread, randomised, same_bits  # noqa: F401


def switching(model: PeftModel, turn: int, folder: Path) -> None:
    model.set_adapter("ab"[turn % 2])


def merging(model: PeftModel, turn: int, folder: Path) -> None:
    model.merge_adapter() if turn % 2 == 0 else model.unmerge_adapter()


def coming_and_going(model: PeftModel, turn: int, folder: Path) -> None:
    if turn % 2 == 0:
        model.add_adapter("new", LoraConfig(r=2, target_modules=["layers.0", "layers.3"]))
        randomised(model, ["new"])
    else:
        model.delete_adapter("new")


def loading(model: PeftModel, turn: int, folder: Path) -> None:
    model.load_adapter(folder / str(turn % 2) / "a", "a")


@pytest.mark.parametrize("named", [False, True], ids=["plain", "adapter_names"])
@pytest.mark.parametrize("change", [switching, merging, coming_and_going, loading], ids=lambda each: each.__name__)
def test_the_set_changes_while_others_compute(change: Any, named: bool, tmp_path: Path) -> None:
    """Each answer is that of before or of after, or an error of one line; afterwards all is right."""
    model = mlp()
    how = {"adapter_names": ["a", "b", "__base__", "a"]} if named else {}
    model.save_pretrained(tmp_path / "0")
    right = [run(model, X, **how)]
    if change is loading:
        randomised(model, ["a"])
        model.save_pretrained(tmp_path / "1")
        right.append(run(model, X, **how))
        model.load_adapter(tmp_path / "0" / "a", "a")
    elif change is switching:
        model.set_adapter("b")
        right.append(run(model, X, **how))
        model.set_adapter("a")
    assert same_bits(run(model, X, **how), right[0])
    stop, wrong, answered = threading.Event(), [], []

    def look() -> None:
        found = run(model, X, **how)
        if not min(distance(found, each) for each in right) < 1e-9:
            wrong.append("neither answer")

    def work() -> None:
        try:
            for turn in range(40):
                change(model, turn + (change is switching), tmp_path)
                time.sleep(0.004)
        finally:
            stop.set()

    watch = lambda: judged(look, wrong, answered, lambda: not stop.is_set())  # noqa: E731
    in_threads([work, watch, watch, watch])
    assert wrong == []
    assert answered
    change(model, 0, tmp_path)  # an even number of changes, and once more: all is as after the first
    if change is coming_and_going:
        assert "new" in model.peft_config
        change(model, 1, tmp_path)
    elif change is merging:
        assert model.merged_adapters == ["a"]
        change(model, 1, tmp_path)
    assert distance(run(model, X, **how), right[0]) < 1e-12


def test_disabled_where_something_is_merged() -> None:
    """The base itself answers inside, the merged model before and after, and other threads get either or an error."""
    model = mlp()
    plain, base = run(model, X), run(model, X, adapter_names=["__base__"] * 4)
    model.merge_adapter()
    stop, wrong, answered = threading.Event(), [], []

    def look() -> None:
        found = run(model, X)
        if not min(distance(found, plain), distance(found, base)) < 1e-9:
            wrong.append("neither")

    def toggle() -> None:
        try:
            for _ in range(40):
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
