"""``DoraCaching``: evaluation caches in every model while it is on, and stays right; scales within a context."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, OFTConfig, PeftConfig, VBLoRAConfig, get_peft_model
from peanut.helpers import DoraCaching, disable_input_dtype_casting, rescale_adapter_scale
from peanut.methods.lora import Lora

CONFIGS = [LoraConfig(r=2, use_dora=True, target_modules=["0", "1"]), OFTConfig(r=2, target_modules=["0", "1"])]
INPUT = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    DoraCaching()(enabled=False)


def adapted(config: PeftConfig) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config).eval()
    for value in model.parameters():
        if value.requires_grad:
            nn.init.normal_(value, std=0.5)
    return model


@torch.no_grad()
def answer(model: Any) -> Tensor:
    return model(INPUT)  # type: ignore[no-any-return]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that a LoRA's change is computed."""
    calls: list[str] = []
    change = Lora.change
    monkeypatch.setattr(Lora, "change", lambda *given: calls.append("") or change(*given))  # type: ignore[func-returns-value]
    return calls


@pytest.mark.parametrize("config", CONFIGS, ids=lambda each: str(each.peft_type))
def test_answers_are_the_same(config: PeftConfig) -> None:
    model = adapted(config)
    plain = answer(model)
    with DoraCaching():
        torch.testing.assert_close(answer(model), plain)
        torch.testing.assert_close(answer(model), plain)
    torch.testing.assert_close(answer(model), plain)


def test_a_change_is_computed_once_inside_and_anew_outside(computed: list[str]) -> None:
    model = adapted(CONFIGS[0])
    with DoraCaching():
        for _ in range(3):
            answer(model)
        assert len(computed) == 2  # of two layers
        with DoraCaching(enabled=False):
            answer(model)
        assert len(computed) == 4
    answer(model)
    assert len(computed) == 6


def test_for_good_until_it_is_switched_off(computed: list[str]) -> None:
    DoraCaching()(enabled=True)
    models = [adapted(CONFIGS[0]), adapted(CONFIGS[0])]
    for model in [*models, *models]:
        answer(model)
    assert len(computed) == 4
    DoraCaching()(enabled=False)
    answer(models[0])
    assert len(computed) == 6


@pytest.mark.parametrize("training", [True, False])
def test_a_step_is_seen(training: bool) -> None:
    model = adapted(CONFIGS[0])
    with DoraCaching():
        before = answer(model)
        model.train(training)
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
        model(INPUT).square().sum().backward()
        optimizer.step()
        model.eval()
        after = answer(model)
    torch.testing.assert_close(after, answer(model))
    assert (after - before).abs().max() > 1e-3


def test_a_step_of_what_layers_share_is_seen_in_layers_that_were_not_called() -> None:
    model = adapted(VBLoRAConfig(r=2, vector_length=2, target_modules=["0", "1"]))
    first, second = model.base_model.model
    with DoraCaching():
        before = answer(second)
        first(INPUT).square().sum().backward()
        torch.optim.SGD([model.vblora_vector_bank["default"]], lr=0.1).step()
        after = answer(second)
    torch.testing.assert_close(after, answer(second))
    assert (after - before).abs().max() > 1e-3


def test_other_adapters_are_seen() -> None:
    model = adapted(CONFIGS[0])
    model.add_adapter("other", CONFIGS[0])
    with DoraCaching():
        first = answer(model)
        model.set_adapter("other")
        second = answer(model)
        assert (first - second).abs().max() > 1e-3
        model.merge_adapter()
        torch.testing.assert_close(answer(model), second)
    model.unmerge_adapter()
    torch.testing.assert_close(answer(model), second)


def test_a_model_that_is_gone_is_let_go() -> None:
    DoraCaching()(enabled=True)
    model = adapted(CONFIGS[0])
    answer(model)
    weight = weakref.ref(model.base_model.model[0].base_layer.weight)
    del model
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("active", [True, False])
def test_inputs_are_never_cast(active: bool) -> None:
    model = adapted(LoraConfig(target_modules=["0"])).to(torch.bfloat16)
    seen: list[torch.dtype] = []
    model.base_model.model[0].base_layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    with disable_input_dtype_casting(model, active=active):
        model(INPUT.bfloat16())
    assert seen == [torch.bfloat16]


def test_scales_that_were_read_stay_what_they_were() -> None:
    layer = adapted(LoraConfig(r=4, target_modules=["0"])).base_model.model[0]
    before = layer.scaling
    with rescale_adapter_scale(layer.owner.model, 0.5):
        during = layer.scaling
        assert (before, during) == ({"default": 2.0}, {"default": 1.0})
    assert layer.scaling == before != during


def test_what_is_written_meanwhile_is_seen() -> None:
    model, other = adapted(CONFIGS[0]), adapted(CONFIGS[0])
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    expected = answer(other)
    with DoraCaching():
        before = answer(model)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(answer(model), expected)
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.01)
        model.train()(INPUT).square().mean().backward()
        again = answer(model.eval())
        optimizer.step()
        assert (answer(model) - again).abs().max() > 1e-4
    assert (before - expected).abs().max() > 1e-2


def test_contexts_within_one_another_end_where_they_began(computed: list[str]) -> None:
    model, caching = adapted(CONFIGS[0]), DoraCaching()
    with caching, caching:
        answer(model)
    computed.clear()
    answer(model), answer(model)
    assert len(computed) == 4
