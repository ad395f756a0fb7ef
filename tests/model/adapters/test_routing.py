"""One batch, a different adapter for each sample: in forward, backward, checkpointed blocks and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeftModel, get_peft_model

from ...support import directed, distance, one_thread, randomised, refused, same_bits  # noqa: F401

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 31).reshape(4, 7)
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NAMES = ["b", "__base__", "a", "b"]


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    model = get_peft_model(base, PeanutConfig(**{"r": 4, "depth": 1, "target_modules": "all-linear"} | options), "a")
    model.add_adapter("b", LoraConfig(r=3, target_modules="all-linear"))
    return randomised(model).eval()


def alone(model: PeftModel, name: str, run: Callable[[], Any]) -> Any:
    """What ``run`` gives with the adapter ``name`` alone for all samples."""
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_each_sample_goes_through_its_own_adapter(fixture: str, request: pytest.FixtureRequest) -> None:
    build = request.getfixturevalue(fixture)
    model = adapted(build())
    rows = [alone(model, name, lambda: model(IDS).logits)[row] for row, name in enumerate(NAMES)]
    model.set_adapter("a")
    mixed = model(IDS, adapter_names=NAMES).logits
    assert distance(mixed, torch.stack(rows)) < 1e-5
    assert min(distance(rows[0], other[0]) for other in (model(IDS).logits, build()(IDS).logits)) > 0.01
    assert distance(model(IDS, adapter_names=["a"] * 4).logits, model(IDS).logits) < 1e-5
    assert distance(model(IDS, adapter_names=["__base__"] * 4).logits, build()(IDS).logits) < 1e-5
    assert model.adapters.state.call.samples is None


@pytest.mark.parametrize("tokens", [3, 40], ids=["one product", "a product each"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "with gradients"])
def test_low_rank_adapters_act_side_by_side(tokens: int, kept: bool) -> None:
    net = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24)).double()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]), "a")
    model.add_adapter("b", LoraConfig(r=5, target_modules=["0", "1"]))
    model.add_adapter("c", PeanutConfig(r=3, depth=1, target_modules=["1"]))
    model = randomised(model.double()).eval()
    names = ["c", "a", "__base__", "b", "a"]
    torch.manual_seed(0)
    with torch.set_grad_enabled(not kept):
        for _ in range(2):
            x = torch.randn(5, tokens, 24, dtype=torch.float64)
            expected = torch.stack([alone(model, name, lambda x=x: model(x))[row] for row, name in enumerate(names)])
            for _ in range(2):
                assert distance(model(x, adapter_names=names), expected) < 1e-12
            with torch.no_grad():
                for _, parameter in model.adapters.parameters("b"):
                    parameter.mul_(1.5)
    names = ["b", "b", "a", "c", "c"]  # another batch, the same layers
    expected = torch.stack([alone(model, name, lambda: model(x))[row] for row, name in enumerate(names)])
    assert distance(model(x, adapter_names=names), expected) < 1e-12


def gradients(model: PeftModel, name: str) -> dict[str, Tensor]:
    return {key: parameter.grad.clone() for key, parameter in model.adapters.parameters(name)}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointed", "checkpointed reentrant"])
def test_each_adapter_learns_from_its_own_samples(checkpointing: bool | None, tiny_gpt2: Build) -> None:
    model = adapted(tiny_gpt2(**NO_DROPOUT).double()).train()
    model.adapters.freeze(trainable="ab")
    expected, direction = {}, torch.randn_like(model(IDS).logits)
    for name, rows in (("a", [2]), ("b", [0, 3])):
        model.set_adapter(name)
        model.zero_grad()
        model(IDS[rows]).logits.backward(direction[rows])
        expected[name] = gradients(model, name)
    model.adapters.freeze(trainable="ab")
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    model.zero_grad()
    model(IDS, adapter_names=NAMES).logits.backward(direction)
    for name, wanted in expected.items():
        found = gradients(model, name)
        assert all(distance(found[key], grad) < 1e-10 for key, grad in wanted.items())
    base = model.unload()
    functions = {type(getattr(module, "_gradient_checkpointing_func", None)).__name__ for module in base.modules()}
    assert functions == ({"NoneType"} if checkpointing is None else {"NoneType", "partial"})  # as transformers put it


def test_two_mixed_batches_before_one_backward(tiny_gpt2: Build) -> None:
    """Each block is run again under the names of its own first run, not of the last one."""
    model = adapted(tiny_gpt2(**NO_DROPOUT).double()).train()
    model.adapters.freeze(trainable="ab")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        first = model(IDS, adapter_names=["a", "a", "b", "b"]).logits
        second = model(IDS, adapter_names=["b", "__base__", "b", "a"]).logits
        third = model(IDS).logits
        directed(torch.stack([first, second, third])).backward()
        found.append({**gradients(model, "a"), **{f"b.{key}": g for key, g in gradients(model, "b").items()}})
    assert found[0].keys() == found[1].keys() > set()
    assert all(distance(found[1][key], grad) < 1e-10 for key, grad in found[0].items())


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams", "returned"]
)
@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_generation_routes_every_beam_of_a_sample(
    fixture: str, options: dict[str, int], request: pytest.FixtureRequest
) -> None:
    model = adapted(request.getfixturevalue(fixture)())
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    count = options.get("num_return_sequences", 1)
    mixed = model.generate(IDS, adapter_names=NAMES, **options).reshape(4, count, -1)
    for row, name in enumerate(NAMES):
        expected = alone(model, name, lambda row=row: model.generate(IDS[row : row + 1], **options))
        assert torch.equal(mixed[row], expected)
    assert not torch.equal(mixed[0], alone(model, "a", lambda: model.generate(IDS[:1], **options)))


def test_wrong_names_are_refused_and_leave_nothing_switched(tiny_llama: Build) -> None:
    model = adapted(tiny_llama())
    with refused(
        model, r"^adapter_names has 3 names and a layer sees a batch of 4; expected one name for each sample; give"
    ):
        model(IDS, adapter_names=["a", "b", "a"])
    with refused(model, r"^adapter_names has 0 names and a layer sees a batch of 4"):
        model(IDS, adapter_names=[])
    with refused(model, r"^no adapter 'c'; expected one of 'a', 'b'; nearest: 'a'$"):
        model(IDS, adapter_names=["a", "c", "a", "a"])
    assert model.adapters.state.call.samples is None
    model.set_adapter("a")
    expected = model(IDS).logits
    assert same_bits(model(IDS).logits, expected)


def test_a_disabled_model_answers_as_its_base_whatever_the_names(tiny_llama: Build) -> None:
    model = adapted(tiny_llama())
    with model.disable_adapter():
        assert same_bits(model(IDS, adapter_names=NAMES).logits, tiny_llama()(IDS).logits)


def test_names_work_in_half_precision(tiny_llama: Build) -> None:
    model = adapted(tiny_llama().bfloat16())
    mixed = model(IDS, adapter_names=NAMES).logits
    assert mixed.dtype == torch.bfloat16
    rows = [alone(model, name, lambda: model(IDS).logits)[row] for row, name in enumerate(NAMES)]
    assert distance(mixed, torch.stack(rows)) < 0.1
