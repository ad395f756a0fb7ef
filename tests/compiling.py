"""A model compiled in one graph beside itself: for tests of methods that act by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from .support import directed, distance

__all__ = ["assert_compiles"]


def assert_compiles(model: nn.Module, given: dict[str, Any], answer: Callable[[Any], Tensor]) -> None:
    """Two steps of training and an evaluation are one graph each, and answer as the model that is not compiled.

    Args:
        model: the model, without dropout.
        given: what it is called with, labels among it if it is to train by its own loss.
        answer: what of its output is compared.
    """
    torch._dynamo.reset()
    counters.clear()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(2):
        found = []
        for called in (model.train(), compiled):
            model.zero_grad()
            torch.manual_seed(step)
            output = called(**given)
            loss = output["loss"] if output.get("loss") is not None else directed(answer(output))
            loss.backward()
            gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
            found.append({"answer": answer(output).detach(), **gradients})
        plain, fast = found
        assert plain.keys() == fast.keys() > {"answer"}
        for name, value in plain.items():
            assert distance(fast[name], value) < 1e-9, name
        with torch.no_grad():  # the second time with other values, and still the same graph
            for value in model.parameters():
                value.add_(value.grad if value.grad is not None else 0, alpha=-0.05)
    assert counters["stats"]["unique_graphs"] == 1
    model.eval()
    with torch.no_grad():
        plain_answer, fast_answer = answer(model(**given)), answer(compiled(**given))
    assert distance(fast_answer, plain_answer) < 1e-9
    assert distance(fast_answer, found[0]["answer"]) > 1e-6
