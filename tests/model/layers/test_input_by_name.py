"""Adapted layers and modules that are trained whole take what the module itself takes, by position or by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.model.layers.hooks import names_of

from ...support import FIRST_CASES, LAYERS, Case, one_thread, randomised, same_bits  # noqa: F401

ONE_OF_EACH = {(case.kind, layer): case for case in FIRST_CASES for layer in LAYERS[case.kind] if case.method != "IA3"}


class ByName(nn.Module):
    """Calls its layer by the name of its first parameter."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, (self.name, *_) = layer, names_of(layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(**{self.name: x})
        return y


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=str)
def test_a_layers_input_may_be_given_by_name(case: Case) -> None:
    made = []
    for net in (case.net(), ByName(case.net().layer)):
        torch.manual_seed(3)
        model = get_peft_model(net, case.config(), "a")
        model.add_adapter("b", case.config())
        made.append(randomised(model).eval())
    one, other = made
    x, names = case.input(), ["a", "b", "__base__", "a"]
    assert same_bits(other(x), one(x))
    assert same_bits(other(x, adapter_names=names), one(x, adapter_names=names))
    with one.disable_adapter(), other.disable_adapter():
        assert same_bits(other(x), one(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layers_input_may_be_given_by_name() -> None:
    model = randomised(get_peft_model(ByName(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["layer"])))
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_a_layer_without_input_is_an_error_as_in_the_layer_itself() -> None:
    model = get_peft_model(ByName(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["layer"]))
    model.get_base_model().name = "y"
    with pytest.raises(TypeError, match="Linear is called without 'input'"):
        model(torch.ones(1, 6))


class Head(nn.Module):
    """A head that reads the tokens and which of them are there."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, there: Tensor, scale: float = 1.0) -> Tensor:
        return self.out((tokens * there[..., None]).sum(1)) * scale


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.by_name = nn.Linear(6, 6), Head(), False

    def forward(self, x: Tensor, there: Tensor) -> Any:
        tokens = self.layer(x)
        return self.head(tokens=tokens, there=there) if self.by_name else self.head(tokens, there, scale=1.0)


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"])
    model = get_peft_model(WithHead(), config, "a")
    model.add_adapter("b", config)
    return randomised(model).eval()


@pytest.mark.parametrize("by_name", [False, True])
def test_a_head_sees_the_rows_of_each_sample_in_all_that_it_is_given(model: PeftModel, by_name: bool) -> None:
    x, there = torch.randn(4, 5, 6), torch.tensor([[1.0] * 5, [1.0] * 2 + [0.0] * 3, [0.0] * 4 + [1.0], [1.0] * 5])
    model.get_base_model().by_name = by_name
    names = ["a", "b", "__base__", "b"]
    alone = [model(x[i : i + 1], there[i : i + 1], adapter_names=[name]) for i, name in enumerate(names)]
    torch.testing.assert_close(model(x, there, adapter_names=names), torch.cat(alone))


class ReadsHead(nn.Module):
    """Reads the weight of its head, and asks for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).to(self.head.weight.dtype) @ self.head.weight.T


def test_a_head_that_differs_between_samples_is_not_read() -> None:
    torch.manual_seed(0)
    model = get_peft_model(ReadsHead(), LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"]), "a")
    x, base = torch.randn(2, 6), model.get_base_model()
    randomised(model)
    torch.testing.assert_close(model(x), base.layer(x) @ base.head.modules_to_save["a"].weight.T)
    with pytest.raises(PeanutError, match=r"a module reads what belongs to 'head', .* differs between the samples"):
        model(x, adapter_names=["a", "__base__"])


class Scaling(nn.Module):
    """Has a number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(6, 6), Scaled(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x), lengths)
        return y


class Scaled(nn.Linear):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * lengths[:, None]


def test_a_head_sees_the_number_of_each_sample() -> None:
    config = LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"])
    model = get_peft_model(Scaling(), config, "a")
    model.add_adapter("b", config)
    randomised(model)
    x, lengths, names = torch.randn(4, 6), torch.arange(4.0), ["a", "b", "__base__", "b"]
    alone = [model(x[i : i + 1], lengths[i : i + 1], adapter_names=[name]) for i, name in enumerate(names)]
    torch.testing.assert_close(model(x, lengths, adapter_names=names), torch.cat(alone))


def test_numbers_that_may_be_of_the_samples_or_not_are_refused(model: PeftModel) -> None:
    head = model.get_base_model().head
    given = (torch.ones(3, 5, 6), torch.ones(3))  # as many as the head's outputs
    with pytest.raises(PeanutError, match=r"'head' is given 3 numbers beside a batch of 3 samples"):
        model.adapters.state.called(head, given, {}, {"samples": ["a", "b", "a"]})
