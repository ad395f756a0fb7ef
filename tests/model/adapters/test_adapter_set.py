"""Several adapters of one model: which act, which are taken out, and what stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model, inject_adapter_in_model
from peanut.model.adapters.adapter_set import AdapterSet

from ...support import (
    assert_looks,
    distance,
    frozen_state,
    look_of,
    one_thread,  # noqa: F401
    randomised,
    refused,
    same_bits,
)

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)


def config(kind: str = "peanut", **options: Any) -> Any:
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"]} | options
    return PeanutConfig(**options) if kind == "peanut" else LoraConfig(**options)


@pytest.fixture
def two(tiny_llama: Build) -> PeftModel:
    """A PEANuT called a, which is active, and a LoRA called b on other layers too."""
    model = get_peft_model(tiny_llama(), config(), "a")
    model.add_adapter("b", config("lora", target_modules=["q_proj", "o_proj"]))
    return randomised(model).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def each(model: PeftModel) -> dict[str, Tensor]:
    """The logits with nothing active, a, b, and both."""
    found = {}
    for names in ([], ["a"], ["b"], ["a", "b"]):
        model.set_adapter(names)
        found["".join(names)] = logits(model)
    return found


# Which act


def test_exactly_the_named_adapters_act_and_train(two: PeftModel, tiny_llama: Build) -> None:
    found = each(two)
    assert same_bits(found[""], logits(tiny_llama()))
    pairs = [("", "a"), ("", "b"), ("a", "b"), ("ab", "a"), ("ab", "b")]
    assert min(distance(found[one], found[other]) for one, other in pairs) > 0.005
    for names in ("a", ["b"], ["b", "a"], ["a", "a"]):
        two.set_adapter(names)
        wanted = list(dict.fromkeys(names))
        assert two.active_adapters == wanted
        assert distance(logits(two), found["".join(sorted(wanted))]) < 1e-5
        for name in "ab":
            assert {p.requires_grad for _, p in two.adapters.parameters(name)} == {name in wanted}
    two.set_adapter([])
    with pytest.raises(
        PeanutError, match=r"^no adapter is active; expected an active adapter; call set_adapter\(name\)$"
    ):
        _ = two.active_adapter


def test_unknown_names_are_refused_everywhere(two: PeftModel) -> None:
    calls: list[Callable[[], object]] = [
        lambda: two.set_adapter("c"),
        lambda: two.set_adapter(["a", "c"]),
        lambda: two.delete_adapter("c"),
        lambda: two.merge_adapter(["c"]),
        lambda: two(IDS, adapter_names=["a", "c"]),
        lambda: two.save_pretrained("never-made", selected_adapters=["c"]),
    ]
    for call in calls:
        with refused(two, r"^no adapter 'c'; expected one of 'a', 'b'; nearest: 'a'$"):
            call()
    assert two.active_adapters == ["a"]


NAMES = ["0", "layers", "keys", "default2", "base_layer", "training", "weight", "a b", "größe"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_without_a_dot_or_slash_will_do(name: str, tiny_llama: Build, tmp_path: Any) -> None:
    model = randomised(get_peft_model(tiny_llama(), config(), name)).eval()
    model.add_adapter("default", config(modules_to_save=["lm_head"]))
    randomised(model, ["default"])
    expected = logits(model)
    model.set_adapter("default")
    assert distance(logits(model), expected) > 0.01
    model.set_adapter(name)
    assert same_bits(logits(model), expected)
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name=name)
    assert same_bits(logits(again), expected)
    assert distance(model(IDS, adapter_names=[name, name]).logits, expected) < 1e-5
    with pytest.warns(UserWarning, match=r"which is deleted, was active; 'default' is active now$"):
        model.delete_adapter(name)
    assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a\\b", "__base__"])
def test_names_that_would_break_a_path_are_refused(name: str, two: PeftModel) -> None:
    with refused(two, r"^adapter name '.*'; expected a name without dots and slashes; choose another name$"):
        two.add_adapter(name, config())


def test_a_name_is_given_once(two: PeftModel) -> None:
    with refused(two, r"^an adapter 'a' is there already; expected a new name; delete it first or choose another$"):
        two.add_adapter("a", config())


# In and out


def test_adding_leaves_the_others_as_they_are(tiny_llama: Build) -> None:
    model = randomised(get_peft_model(tiny_llama(), config(inference_mode=True), "a")).eval()
    expected = logits(model)
    for name, wanted in (("b", set()), ("c", {"a"})):
        model.add_adapter(name, config())
        assert model.active_adapters == ["a"]
        trained = {one for one in model.peft_config for _, p in model.adapters.parameters(one) if p.requires_grad}
        assert trained == wanted
        assert same_bits(logits(model), expected)
        model.set_adapter("a")  # trained from now on, whatever its config was made for


def test_deleting_takes_every_trace_of_one_adapter(two: PeftModel, tiny_llama: Build) -> None:
    found, base = each(two), two.get_base_model()
    two.set_adapter(["a", "b"])
    two.delete_adapter("b")
    assert (list(two.peft_config), two.active_adapters) == (["a"], ["a"])
    assert same_bits(logits(two), found["a"])
    assert type(base.model.layers[0].self_attn.o_proj) is nn.Linear
    two.delete_adapter("a")
    assert two.active_adapters == []
    fresh = tiny_llama().requires_grad_(False)
    assert_looks(base, look_of(fresh))


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_unloading_gives_the_base_back_bit_for_bit(merged: bool, two: PeftModel, tiny_llama: Build) -> None:
    two.set_adapter(["a", "b"])
    if merged:
        two.merge_adapter()
    base = two.unload()
    assert_looks(base, look_of(tiny_llama().requires_grad_(False)))
    assert "_adapter_set" not in base.__dict__
    outputs = []
    for model in (base, tiny_llama()):  # and it can be adapted like one that never was
        torch.manual_seed(0)
        outputs.append(logits(get_peft_model(model, config(init_weights=False))))
    assert same_bits(*outputs)


def test_one_model_holds_all_adapters(tiny_llama: Build) -> None:
    base = tiny_llama()
    inner = get_peft_model(base.model, config(), "inner")
    with refused(
        base, r"^a part of this LlamaForCausalLM, or a model around it, has adapters of its own; .*unload\(\)"
    ):
        get_peft_model(base, config(target_modules=["lm_head"]), "outer")
    inner.unload()
    outer = get_peft_model(base, config(), "outer")
    assert outer.get_base_model() is base
    with refused(base, r"^a part of this LlamaModel, or a model around it, has adapters"):
        inject_adapter_in_model(config(), base.model, "inner")
    assert AdapterSet.of(outer) is AdapterSet.of(outer.base_model) is AdapterSet.of(base)


# Switched off


def test_disabling_is_exact_nested_and_undone_also_after_an_error(two: PeftModel, tiny_llama: Build) -> None:
    plain = logits(tiny_llama())
    two.set_adapter(["a", "b"])
    expected = logits(two)
    with two.disable_adapter():
        assert same_bits(logits(two), plain)
        with two.disable_adapter():
            assert same_bits(logits(two), plain)
        assert same_bits(logits(two), plain)
        assert two.active_adapters == ["a", "b"]
    assert same_bits(logits(two), expected)
    with pytest.raises(RuntimeError, match="inside"), two.disable_adapter():
        raise RuntimeError("inside")
    assert same_bits(logits(two), expected)


def test_disabled_a_merged_adapter_is_the_base_and_stays_merged(two: PeftModel, tiny_llama: Build) -> None:
    two.set_adapter(["a", "b"])
    two.merge_adapter(["a"])
    merged, expected = frozen_state(two.get_base_model().model.layers[0].self_attn.q_proj.base_layer), logits(two)
    with two.disable_adapter():
        assert same_bits(logits(two), logits(tiny_llama()))
        assert two.merged_adapters == ["a"]
        with two.disable_adapter():
            assert same_bits(logits(two), logits(tiny_llama()))
    assert two.merged_adapters == ["a"]
    assert same_bits(logits(two), expected)
    after = frozen_state(two.get_base_model().model.layers[0].self_attn.q_proj.base_layer)
    assert same_bits(after["weight"], merged["weight"])


# Copies


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(through: str, merged: bool, two: PeftModel) -> None:
    two.set_adapter(["a", "b"])
    if merged:
        two.merge_adapter(["b"])
    expected = logits(two)
    if through == "deepcopy":
        copied = copy.deepcopy(two)
    elif through == "pickle":
        copied = pickle.loads(pickle.dumps(two))
    else:
        buffer = io.BytesIO()
        torch.save(two, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert same_bits(logits(copied), expected)
    assert copied.merged_adapters == two.merged_adapters
    assert copied.adapters is not two.adapters
    assert copied.adapters.model is copied.get_base_model()
    copied.unmerge_adapter()
    copied.set_adapter("a")
    randomised(copied, ["a"])
    assert two.active_adapters == ["a", "b"]
    assert same_bits(logits(two), expected)
    assert distance(logits(copied), expected) > 0.01
    assert_looks(copied.unload(), look_of(two.unload()))


# Chance


def test_the_seed_alone_decides_where_an_adapter_starts(tiny_llama: Build) -> None:
    def started(seed: int, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = get_peft_model(tiny_llama(), config("lora", **options))
        return {key: value.detach() for key, value in model.adapters.parameters("default")}

    first, again, other = started(0), started(0), started(1)
    assert all(same_bits(again[key], value) for key, value in first.items())
    assert not any(same_bits(other[key], value) for key, value in first.items() if "lora_A" in key)
    fewer = started(0, target_modules=["up_proj"], layers_to_transform=[1])
    assert len(fewer) == 2  # a layer's start depends on no other layer
    assert all(same_bits(first[key], value) for key, value in fewer.items())
    a = [value for key, value in first.items() if "q_proj.lora_A" in key]
    assert not same_bits(a[0], a[1])


def test_adding_draws_once_from_the_generator_of_torch(tiny_llama: Build) -> None:
    base = tiny_llama()
    torch.manual_seed(0)
    torch.randint(2**62, ())
    expected = torch.rand(3)
    torch.manual_seed(0)
    get_peft_model(base, config(target_modules="all-linear"))
    assert same_bits(torch.rand(3), expected)
