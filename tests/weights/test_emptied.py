"""Parameters as DeepSpeed's third stage leaves them between forwards: of the shape (0,), with ``ds_shape``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model
from peanut.weights.emptied import gathered, is_emptied, shape_of

from ..support import ids

CONFIGS: dict[str, Callable[..., Any]] = {
    "LORA": lambda **more: LoraConfig(r=2, **more),
    "PEANUT": lambda **more: PeanutConfig(r=2, **more),
}
TARGETS = ["q_proj", "embed_tokens", "lm_head"]
every_method = pytest.mark.parametrize("method", CONFIGS)


def emptied(model: nn.Module) -> dict[int, Tensor]:
    """Empties what is not yet; the values by ``ds_id``."""
    held: dict[int, Tensor] = {}
    for number, value in enumerate(model.parameters()):
        there: Any = value
        there.ds_id, there.ds_shape, held[number] = number, value.shape, value.data
        value.data = value.data.new_empty(0)
    return held


@contextmanager
def whole(module: nn.Module, held: dict[int, Tensor]) -> Iterator[None]:
    """As DeepSpeed's hooks around a forward: what the module itself needs is gathered, then emptied again."""
    asked: Any = getattr(module, "ds_external_parameters", dict[int, Any]().items)
    needed: list[Any] = [*module.parameters(recurse=False), *(value for _, value in asked())]
    before = [value for value in needed if is_emptied(value)]
    for value in before:
        value.data = held[value.ds_id]
    yield
    for value in before:
        value.data = value.data.new_empty(0)


def gathering(model: nn.Module, held: dict[int, Tensor]) -> None:
    """Puts such hooks around every module."""
    open_now: dict[int, list[Any]] = {}

    def before(module: nn.Module, _: Any) -> None:
        context = whole(module, held)
        context.__enter__()
        open_now.setdefault(id(module), []).append(context)

    def after(module: nn.Module, *_: Any) -> None:
        open_now[id(module)].pop().__exit__(None, None, None)

    for module in model.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


@every_method
def test_an_adapter_of_an_emptied_base_has_the_shapes_of_a_whole_one(method: str, tiny_llama: Any) -> None:
    config = CONFIGS[method](target_modules=TARGETS)
    expected = get_peft_model(tiny_llama(), config)
    base = tiny_llama()
    emptied(base)
    model = get_peft_model(base, config)
    shapes = {name: value.shape for name, value in expected.named_parameters() if value.requires_grad}
    assert shapes
    assert shapes == {name: value.shape for name, value in model.named_parameters() if value.requires_grad}


def test_shapes_that_only_the_weight_tells(tiny_gpt2: Any) -> None:
    config = LoraConfig(r=2, target_modules=["c_attn", "ln_1"], init_lora_weights=False)
    with pytest.raises(PeanutError):  # a norm
        get_peft_model(tiny_gpt2(), config)
    base = tiny_gpt2()
    emptied(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert model.adapters.model.transformer.h[0].attn.c_attn.lora_A["default"].weight.shape == (2, 32)
    assert model.adapters.model.transformer.h[0].attn.c_attn.lora_B["default"].weight.shape == (96, 2)


@every_method
def test_a_forward_computes_the_same_where_each_module_s_parameters_are_gathered(method: str, tiny_llama: Any) -> None:
    torch.manual_seed(0)
    config = CONFIGS[method](target_modules=TARGETS)
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_(std=0.1)
        expected = model(ids()).logits
        model.adapters.model.requires_grad_(False)
        held = emptied(model)
        gathering(model, held)
        found = model(ids()).logits
    assert torch.equal(found, expected)
    assert all(is_emptied(value) for value in model.parameters())


@every_method
def test_a_full_state_dict_is_believed_and_its_base_is_never_refused(
    method: str, tiny_llama: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), CONFIGS[method](target_modules=TARGETS[:1]))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_(std=0.1)
        expected = model(ids()).logits
    full = {key: value.clone() for key, value in model.state_dict().items()}
    emptied(model)
    with pytest.raises(PeanutError, match=r"a part of .* in each process .*; pass state_dict=, the full one"):
        model.save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    of_adapter = {key: value for key, value in full.items() if f"{method[:4].lower()}" in key}
    for number, given in enumerate((full, of_adapter)):
        model.save_pretrained(tmp_path / str(number), state_dict=given)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / str(number))
        with torch.no_grad():
            assert torch.equal(again(ids()).logits, expected)
        base = tiny_llama()
        emptied(base)
        onto = PeftModel.from_pretrained(base, tmp_path / str(number))
        own, there = dict(onto.adapters.parameters("default")), dict(again.adapters.parameters("default"))
        assert own.keys() == there.keys()
        assert all(torch.equal(own[key], value) for key, value in there.items())
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1)
    with pytest.raises(PeanutError, match="the base that it was trained on"):
        PeftModel.from_pretrained(other, tmp_path / "0")


def test_what_reads_or_writes_an_emptied_weight_says_what_is_missing(tiny_llama: Any) -> None:
    base = tiny_llama()
    emptied(base)
    with pytest.raises(PeanutError, match="third stage has emptied; expected DeepSpeed"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PeanutError, match="third stage has emptied"):
        model.merge_adapter()


def test_a_forward_without_what_is_trained_says_so() -> None:
    net = nn.Sequential()
    net.layer = nn.Linear(4, 4)
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["layer"]))
    held, base = emptied(model), net.layer.base_layer
    base.weight.data, base.bias.data = held[base.weight.ds_id], held[base.bias.ds_id]
    with pytest.raises(PeanutError, match="tensors of LORA at 'layer' that DeepSpeed's third stage has emptied"):
        model.get_base_model().layer(torch.ones(1, 4))


def test_the_helpers() -> None:
    value: Any = nn.Parameter(torch.ones(2, 3))
    assert not is_emptied(value)
    assert gathered(value) is value
    value.ds_shape, value.data = value.shape, torch.empty(0)
    assert is_emptied(value)
    assert shape_of(value) == (2, 3)
