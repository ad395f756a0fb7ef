"""Options of ``nn.Embedding``: an adapted one answers, and gives gradients, as one that has W' as its weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peanut import PeftModel, get_peft_model

from ..dense import layer_of
from ..support import CASES, FIRST_CASES, VOCABULARY, Case, Net, directed, distance, gradients, one_thread, randomised  # noqa: F401

OPTIONS: dict[str, Callable[[], nn.Embedding]] = {
    "max_norm": lambda: nn.Embedding(VOCABULARY, 12, max_norm=1.5),
    "max_norm of L1": lambda: nn.Embedding(VOCABULARY, 12, max_norm=4.0, norm_type=1.0, padding_idx=2),
    "by frequency": lambda: nn.Embedding(VOCABULARY, 12, scale_grad_by_freq=True),
    "sparse": lambda: nn.Embedding(VOCABULARY, 12, sparse=True, padding_idx=3),
}
EMBEDDINGS = [case for case in CASES if (case.kind, case.layer) == ("embedding", "plain")]
PAIRS = [(case, options) for case in EMBEDDINGS for options in (OPTIONS if case in FIRST_CASES else ["max_norm"])]


def embedding(options: str) -> nn.Embedding:
    torch.manual_seed(1)
    return OPTIONS[options]().double()


def adapted(case: Case, options: str) -> PeftModel:
    return randomised(get_peft_model(Net(embedding(options)), case.config())).eval()


def dense(model: PeftModel, options: str, x: Tensor) -> Tensor:
    """What an embedding answers that has W' as its weight, W being shortened already where the layer does that."""
    layer, module = layer_of(model), embedding(options)
    module.sparse = False  # the same numbers
    with torch.no_grad():
        module(torch.arange(VOCABULARY))
    assert distance(layer.base_layer.weight, module.weight) < 1e-6
    weight = layer.change("default").matrix(module.weight.detach().T).T
    answer: Tensor = torch.func.functional_call(module, {"weight": weight.contiguous()}, (x,))
    shift = layer.change("default").shift
    return answer if shift is None else answer + shift


@pytest.mark.parametrize(("case", "options"), PAIRS, ids=str)
def test_answers_gradients_and_merge(case: Case, options: str) -> None:
    model, x = adapted(case, options), torch.tensor([[1, 2, 3, 1], [9, 10, 1, 3]])
    assert distance(model(x), dense(model, options, x)) < 1e-6
    found, expected = [], []
    for gathered, y in ((found, model(x)), (expected, dense(model, options, x))):
        model.zero_grad()
        directed(y).backward()
        gathered.append({name: value.clone() for name, value in gradients(model).items()})
    assert found[0].keys() == expected[0].keys()
    assert found[0]
    for name, value in expected[0].items():
        assert float((found[0][name] - value).abs().max()) <= 1e-6 * max(1.0, float(value.abs().max()))
    if layer_of(model).change("default").shift is not None:
        return  # there is no bias to merge it into
    with torch.no_grad():
        before, own = model(x), layer_of(model).base_layer.weight.clone()
        model.merge_adapter()
        assert distance(model(x), before) < 1e-6
        model.unmerge_adapter()
        assert torch.equal(layer_of(model).base_layer.weight, own)
        assert distance(model(x), before) < 1e-12


def test_a_weight_is_shortened_once_and_not_lookup_by_lookup() -> None:
    """A method that reads W would else answer differently after each lookup of a row that is too long."""
    case = next(case for case in EMBEDDINGS if case.method == "PEANUT")
    model, x = adapted(case, "max_norm"), torch.tensor([[1]])
    assert bool((embedding("max_norm").weight.norm(dim=1) > 1.5).any())
    with torch.no_grad():
        before = model(x)
        model(torch.arange(VOCABULARY))
        assert distance(model(x), before) < 1e-6
