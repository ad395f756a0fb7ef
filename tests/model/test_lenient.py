"""What scripts for Hugging Face PEFT do that is done here too, each with one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from peanut import LoraConfig, OFTConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model

from ..support import Net, distance, one_thread, randomised, refused, same_bits  # noqa: F401

CONFIG: dict[str, Any] = {"target_modules": ["layer"]}


def net() -> Net:
    torch.manual_seed(1)
    return Net(torch.nn.Linear(8, 6))


def two() -> PeftModel:
    model = get_peft_model(net(), LoraConfig(r=2, **CONFIG), "a")
    model.add_adapter("b", LoraConfig(r=3, **CONFIG))
    return randomised(model)  # type: ignore[no-any-return]


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_a_second_get_peft_model_replaces_the_first_adapter(wrapped: bool, merged: bool) -> None:
    base = net()
    expected = base(X)
    first = randomised(get_peft_model(base, LoraConfig(r=2, **CONFIG)))
    if merged:
        first.merge_adapter()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"^the model has an adapter 'default' already: a new one takes its place"):
        second = get_peft_model(first if wrapped else base, PeanutConfig(r=3, **CONFIG))
    bare = net()
    torch.manual_seed(3)
    fresh = get_peft_model(bare, PeanutConfig(r=3, **CONFIG))
    assert list(second.peft_config) == ["default"]
    assert same_bits(second(X), expected)
    found, made = (dict(model.named_parameters()) for model in (second, fresh))
    assert found.keys() == made.keys()
    assert all(same_bits(value, made[name]) for name, value in found.items())
    assert second.get_nb_trainable_parameters() == fresh.get_nb_trainable_parameters()


def test_another_name_is_another_adapter() -> None:
    model = two()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(model, LoraConfig(r=2, **CONFIG), "c")
    assert sorted(model.peft_config) == ["a", "b", "c"]


@pytest.mark.parametrize("merged", [True, False])
def test_a_second_get_peft_model_that_is_refused_leaves_the_first(merged: bool) -> None:
    model = randomised(get_peft_model(net(), LoraConfig(r=2, **CONFIG)))
    if merged:
        model.merge_adapter()
    before = model(X)
    with refused(model, "divisor of 8"):
        get_peft_model(model, OFTConfig(r=3, **CONFIG))
    assert (model.active_adapters, model.merged_adapters) == (["default"], ["default"] if merged else [])
    assert same_bits(model(X), before)


def test_deleting_the_active_adapter_activates_another() -> None:
    model = two()
    model.set_adapter("b")
    expected = model(X)
    model.set_adapter("a")
    with pytest.warns(UserWarning, match=r"^adapter 'a', which is deleted, was active; 'b' is active now$"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert same_bits(model(X), expected)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained
    assert all(".b." in name for name in trained)


def test_deleting_what_is_not_the_only_active_adapter_says_nothing() -> None:
    model = two()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_adapter(["a", "b"])
        model.delete_adapter("a")
        assert model.active_adapters == ["b"]
        model.delete_adapter("b")
    assert model.active_adapters == []


def test_an_adapter_that_is_not_trained_is_followed_by_one_that_is_not() -> None:
    model = two()
    model.set_adapter("a", inference_mode=True)
    with pytest.warns(UserWarning, match="'b' is active now"):
        model.delete_adapter("a")
    assert model.get_nb_trainable_parameters()[0] == 0


def test_set_adapter_while_another_is_merged_unmerges_it() -> None:
    model, weight = two(), net().layer.weight
    model.set_adapter("b")
    expected: Tensor = model(X)
    model.set_adapter("a")
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"^adapter 'a' was merged, and is unmerged so that \['b'\] can be active$"):
        model.set_adapter("b")
    assert (model.active_adapters, model.merged_adapters) == (["b"], [])
    assert same_bits(model(X), expected)
    assert same_bits(model.base_model.model.layer.base_layer.weight, weight)


def test_what_may_stay_merged_does() -> None:
    model = two()
    model.set_adapter(["a", "b"])
    expected = model(X)
    model.set_adapter("a")
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_adapter(["a", "b"])
    assert model.merged_adapters == ["a"]
    assert distance(model(X), expected) < 1e-5


def test_an_order_that_a_merge_forbids_unmerges() -> None:
    model = get_peft_model(net(), OFTConfig(r=2, init_weights=False, **CONFIG), "a")
    model.add_adapter("b", OFTConfig(r=4, init_weights=False, **CONFIG))
    model.merge_adapter("a")
    with pytest.warns(UserWarning, match=r"^adapter 'a' was merged, and is unmerged"):
        model.set_adapter(["b", "a"])
    assert (model.active_adapters, model.merged_adapters) == (["b", "a"], [])


def test_an_unknown_adapter_is_an_error_while_one_is_merged() -> None:
    model = two()
    model.merge_adapter()
    with pytest.raises(PeanutError, match=r"^no adapter 'c'"):
        model.set_adapter("c")
    assert model.merged_adapters == ["a"]
