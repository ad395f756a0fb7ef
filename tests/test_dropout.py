"""Dropout so rare that nothing is dropped: in training, too, a layer then computes its dense form.

So no adapter may get lost, or stop the layer, because one beside it has dropout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from peanut import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peanut.protocols import METHODS

from .dense import layer_of, written_out
from .operations import Operations
from .support import CASES, FIRST_CASES, Case, distance, one_thread, randomised  # noqa: F401
from .writing.llama import IDS, TARGETS, llama
from .writing.reference import answer_of, direction

pytestmark = pytest.mark.filterwarnings("ignore:.* returned no loss")

RARE = 1e-13
TIGHT = 1e-11


def rare(case: Case) -> dict[str, float]:
    """Every dropout that a method's config has, as good as never."""
    own = METHODS[case.method].config_class
    return {field.name: RARE for field in fields(own) if field.name.endswith("dropout")}


def on(case: Case, kind: str, layer: str) -> bool:
    return (case.kind, case.layer) == (kind, layer)


DROPPING = [case for case in FIRST_CASES if rare(case)]
INPUT_GAINS = [case for case in CASES if case.variant.name == "input"]
"""(IA)³ on feed-forward layers: its gains are those of the layer's input."""
OTHERS = [*FIRST_CASES, *INPUT_GAINS]
PAIRS = [(a, b) for a in DROPPING if a.method == "LORA" for b in OTHERS if on(b, a.kind, a.layer)]
PAIRS += [
    (a, b)
    for a in DROPPING
    for b in OTHERS
    if a.method != "LORA"
    and a.kind == "linear"
    and on(b, a.kind, a.layer)
    and (b.method in (a.method, "OFT") or b in INPUT_GAINS)
]
PAIRS += [
    (a, replace(b, layer=a.layer))
    for a in CASES
    for b in [*(case for case in FIRST_CASES if case.method == "OFT"), *INPUT_GAINS]
    if a.method == "LORA" and a.kind == b.kind == "conv" and not on(a, b.kind, b.layer)
    if b.method != "IA3" or a.layer not in ("grouped", "depthwise")  # which it refuses
]
"""LoRA beside every method on every kind of layer; every method with dropout beside itself, a rotation and gains; and
every convolution."""
ORDERED = [(a, b, ["a", "b"] if number % 2 else ["b", "a"]) for number, (a, b) in enumerate(PAIRS)]


def pair(case: Case, other: Case) -> tuple[PeftModel, Tensor]:
    """Adapters ``a`` and ``b`` in one layer, both trained."""
    model = get_peft_model(case.net(), case.config(**rare(case)), "a")
    model.add_adapter("b", other.config(**rare(other)))
    model.set_adapter(["a", "b"])
    return randomised(model), case.input()


def assert_same(model: PeftModel, fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> None:
    """Two ways to compute an output agree in it and in every gradient, and both adapters have some."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found: list[dict[str, Tensor]] = []
    for way in (fast, slow):
        torch.manual_seed(9)  # some methods draw in training
        y = way()
        given = torch.autograd.grad(y, list(trained.values()), direction(y), allow_unused=True)
        gradients = {name: g for name, g in zip(trained, given, strict=True) if g is not None}
        found.append({"output": y.detach(), **gradients})
    own, expected = found
    for name in ("a", "b"):
        assert any(f".{name}." in f"{key}." and value.abs().max() > 0 for key, value in expected.items())
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        assert (own[name] - value).abs().max() <= TIGHT * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize(("case", "other", "names"), ORDERED, ids=str)
def test_two_adapters_in_training_are_their_dense_form(case: Case, other: Case, names: list[str]) -> None:
    model, x = pair(case, other)
    model.set_adapter(names)
    layer = layer_of(model.train())
    assert_same(model, lambda: layer(x), lambda: written_out(case, layer, names, x, sample=True))


@pytest.mark.parametrize(("case", "other"), PAIRS, ids=str)
def test_an_adapter_for_each_sample_is_its_dense_form(case: Case, other: Case) -> None:
    model, x = pair(case, other)
    layer, names = layer_of(model), ["b", "__base__", "a", "b"]

    def row_by_row(training: bool) -> Tensor:
        alone = {own: written_out(case, layer, [own], x, sample=training) for own in ("b", "a")}
        alone["__base__"] = layer.base_layer(x)
        return torch.stack([alone[name][row] for row, name in enumerate(names)])

    for training in (True, False):
        model.train(training)
        assert_same(model, lambda: model(x, adapter_names=names), lambda mode=training: row_by_row(mode))


@pytest.mark.parametrize("case", DROPPING, ids=str)
def test_dropout_drops_in_training_alone(case: Case) -> None:
    model, x = pair(case, case)
    config = case.config(**dict.fromkeys(rare(case), 0.9))
    again = get_peft_model(case.net(), config, "a")
    again.add_adapter("b", config)
    again.load_state_dict(model.state_dict())
    again.set_adapter(["a", "b"])
    with torch.no_grad():
        assert distance(again.eval()(x), model.eval()(x)) < TIGHT
        if layer_of(again).frozen.kind.takes_activations:
            assert distance(again.train()(x), model(x)) > 0.01


# Experts of a mixture


def test_experts_with_dropout_train_under_their_mixture() -> None:
    def learned(dropout: float) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(1)
        expert = LoraConfig(r=2, target_modules=TARGETS["linear"], lora_dropout=dropout, task_type="CAUSAL_LM")
        model = get_peft_model(llama(2), expert, "one")
        model.add_adapter("two", expert)
        mixture = {"adapters": {"one": None, "two": None}, "xlora_dropout_p": 0.0, "use_trainable_adapters": True}
        model.add_adapter("both", XLoraConfig(task_type="CAUSAL_LM", **mixture))
        model.set_adapter("both")
        randomised(model, scale=0.3).train()
        y = answer_of(model(IDS))
        y.backward(direction(y))
        return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, gradients = learned(0.0)
    found, own = learned(RARE)
    assert distance(found, expected) < 1e-9
    assert own.keys() == gradients.keys()
    assert all(any(f".{name}." in key for key in own) for name in ("one", "two", "both"))
    assert all(distance(value, gradients[key]) < 1e-7 for key, value in own.items() if gradients[key].abs().max() > 0)


# What dropout costs where it does not act


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inference"])
@pytest.mark.parametrize("case", [case for case in DROPPING if case.kind == "linear"], ids=str)
def test_in_eval_a_mixed_batch_costs_the_same_with_dropout_in_the_config(case: Case, inside: bool) -> None:
    def operations(probability: float) -> Counter[str]:
        options = dict.fromkeys(rare(case), probability)
        model = get_peft_model(case.net(), case.config(**options), "a")
        model.add_adapter("b", case.config(**options))
        randomised(model).eval()
        x, counted = case.input(), Operations()
        with torch.no_grad(), model.inference() if inside else torch.no_grad():
            for _ in range(2):
                model(x, adapter_names=["b", "__base__", "a", "b"])
            with counted:
                model(x, adapter_names=["b", "__base__", "a", "b"])
        return counted.counts

    plain = operations(0.0)
    assert plain
    assert operations(0.5) == plain
