"""Every public attribute of Hugging Face PEFT's models and layers is here, or says why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import peanut
from peanut import PeanutError

from ..support import PEER_WARNINGS, scattered

pytestmark = PEER_WARNINGS

FROM_THE_BASE = {"prepare_inputs_for_generation", "in_features", "out_features"}
"""What is the base model's on purpose: what adapters add to an input is added by hooks, behind it."""
LORA = {"target_modules": ["0"]}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1))


@cache
def pairs() -> dict[str, tuple[Any, Any]]:
    theirs, ours = (library.get_peft_model(net(), library.LoraConfig(**LORA)) for library in (peft, peanut))
    prompt = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    prompts = [library.get_peft_model(llama(), library.PromptTuningConfig(**prompt)) for library in (peft, peanut)]
    mixed = [library.get_peft_model(net(), library.LoraConfig(**LORA), mixed=True) for library in (peft, peanut)]
    ada = [library.get_peft_model(net(), library.AdaLoraConfig(**LORA, total_step=9)) for library in (peft, peanut)]
    ia3 = [
        library.get_peft_model(net(), library.IA3Config(**LORA, feedforward_modules=[])) for library in (peft, peanut)
    ]
    return {
        "PeftModel": (theirs, ours),
        "LoraModel": (theirs.base_model, ours.base_model),
        "LoraLayer": (theirs.base_model.model[0], ours.base_model.model[0]),
        "PeftModelForCausalLM": (prompts[0], prompts[1]),
        "PeftMixedModel": (mixed[0], mixed[1]),
        "AdaLoraModel": (ada[0].base_model, ada[1].base_model),
        "IA3Model": (ia3[0].base_model, ia3[1].base_model),
    }


KINDS = ("PeftModel", "LoraModel", "LoraLayer", "PeftModelForCausalLM", "PeftMixedModel", "AdaLoraModel", "IA3Model")


def public(owner: Any) -> set[str]:
    inside = {*vars(owner), *owner._modules, *owner._parameters, *dir(type(owner))}
    return (
        {name for name in inside if not name.startswith("_")} - set(dir(nn.Module())) - {"word_embeddings", "config"}
    )  # a base's


@pytest.mark.parametrize("kind", KINDS)
def test_every_attribute_is_here_or_says_why_not(kind: str) -> None:
    theirs, ours = pairs()[kind]
    base = ours.get_base_layer() if kind == "LoraLayer" else ours.model if hasattr(ours, "model") else ours
    silent, borrowed = set(), set()
    for name in public(theirs):
        try:
            getattr(ours, name)
        except AttributeError as error:
            if not re.fullmatch(r"'\w+' has no attribute '\w+': \w.{15,}", str(error)):
                silent.add(name)
            continue
        if base is not ours and name not in dir(ours) and hasattr(base, name):
            borrowed.add(name)
    assert len(public(theirs)) > 15
    assert not silent
    assert not borrowed - FROM_THE_BASE


def test_an_attribute_of_the_base_is_never_taken_for_one_of_adapters() -> None:
    class Own(nn.Sequential):
        def subtract_mutated_init(self) -> str:
            return "the base's"

        def mine(self) -> str:
            return "the base's"

    model = peanut.get_peft_model(Own(nn.Linear(4, 4)), peanut.LoraConfig(**LORA))
    assert model.mine() == model.base_model.mine() == "the base's"
    with pytest.raises(AttributeError, match="'LoraModel' has no attribute 'subtract_mutated_init': the base keeps"):
        model.base_model.subtract_mutated_init()
    with pytest.raises(AttributeError, match="has no attribute 'subtract_mutated_init': the base keeps"):
        model.subtract_mutated_init()
    assert not hasattr(model, "set_modules_to_save")


def test_what_a_layer_says_is_what_hugging_face_peft_says() -> None:
    options = {"0": {"use_dora": False, "lora_alpha": 3}, "1": {"use_dora": True, "use_rslora": True}}
    for target, own in options.items():
        config = {"target_modules": [target], "r": 2, **own}
        theirs, ours = (library.get_peft_model(net(), library.LoraConfig(**config)) for library in (peft, peanut))
        scattered(each for each in theirs.parameters() if each.requires_grad)
        ours.load_state_dict(theirs.state_dict())
        one, other = theirs.base_model.model[int(target)], ours.base_model.model[int(target)]
        for name in ("use_dora", "use_rslora", "lora_bias", "r", "lora_alpha", "scaling"):
            assert getattr(other, name) == getattr(one, name)
        assert ("default" in other.lora_magnitude_vector) == ("default" in one.lora_magnitude_vector)
        assert "default" not in other.lora_embedding_A
        torch.testing.assert_close(other.get_base_weight(), one.get_base_weight())
        if not own["use_dora"]:  # there it is the part within the norm alone
            torch.testing.assert_close(other.get_delta_weight("default"), one.get_delta_weight("default"))
    with pytest.raises(PeanutError, match="no adapter 'other' at '1'"):
        other.get_delta_weight("other")


SHARED = {
    "VeraConfig": ("vera_A", "vera_B"),
    "RandLoraConfig": ("randlora_A", "randlora_B"),
    "VBLoRAConfig": ("vblora_vector_bank",),
}


@pytest.mark.parametrize("kind", SHARED)
def test_what_layers_share_is_had_by_its_name_as_there(kind: str) -> None:
    options = {"r": 2, "target_modules": ["0", "1"]} | ({"vector_length": 2} if kind == "VBLoRAConfig" else {})
    theirs, ours = (library.get_peft_model(net(), getattr(library, kind)(**options)) for library in (peft, peanut))
    for name in SHARED[kind]:
        found = getattr(ours.base_model, name)
        assert (list(found), len(found)) == (["default"], 1)
        assert found["default"].shape == getattr(theirs.base_model, name)["default"].shape
        for holder in (ours, *ours.base_model.model):
            assert getattr(holder, name)["default"] is found["default"]
        with pytest.raises(KeyError, match="other"):
            found["other"]
    assert not hasattr(ours, "vera_C")


def test_what_layers_share_can_be_written_and_has_every_adapter() -> None:
    model = peanut.get_peft_model(net(), peanut.VeraConfig(r=2, target_modules=["1"]))
    model.add_adapter("b", peanut.VeraConfig(r=3, target_modules=["0", "1"]))
    assert {name: value.shape for name, value in model.vera_A.items()} == {"default": (2, 6), "b": (3, 6)}
    before, there = model.vera_A["default"].clone(), model.vera_A["default"]
    model.vera_A["default"] += 1
    assert model.vera_A["default"] is there
    torch.testing.assert_close(there, before + 1)
    model.vera_A["default"] = before
    assert model.base_model.model[1].values("default")["vera_A"] is before
    bank = peanut.get_peft_model(net(), peanut.VBLoRAConfig(r=2, vector_length=2, target_modules=["0"]))
    bank.vblora_vector_bank["default"] = torch.ones(256, 2)
    assert bank.vblora_vector_bank["default"].requires_grad
    assert bank(torch.ones(1, 4)).isfinite().all()


def test_a_peanut_layer_says_how_deep_it_is() -> None:
    config = {"r": 2, "depth": 2, "target_modules": ["0"]}
    theirs, ours = (library.get_peft_model(net(), library.PeanutConfig(**config)) for library in (peft, peanut))
    one, other = theirs.base_model.model[0], ours.base_model.model[0]
    assert dict(other.res_num) == dict(one.res_num) == {"default": 2}
    for name in ("peanut_encoders", "peanut_decoders"):
        found, wanted = getattr(other, name)["default"], getattr(one, name)["default"]
        assert [each.weight.shape for each in found] == [each.weight.shape for each in wanted]


def test_the_change_of_a_layer_has_the_shape_of_its_weight() -> None:
    convolution = nn.Sequential(nn.Conv2d(2, 4, 3))
    model = peanut.get_peft_model(convolution, peanut.LoraConfig(**LORA, init_lora_weights=False))
    layer = model.base_model.model[0]
    before = layer.get_base_weight().clone()
    change = layer.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, before + change)


def test_the_prefix_of_adalora_is_that_of_its_parameters() -> None:
    theirs, ours = pairs()["AdaLoraModel"]
    assert ours.prefix == theirs.prefix == "lora_"
    assert {name for name, _ in ours.named_parameters() if "lora_" in name} == {
        name for name, value in ours.named_parameters() if value.requires_grad
    }


def test_what_a_model_says_is_what_hugging_face_peft_says() -> None:
    config = {**LORA, "modules_to_save": ["1"]}
    theirs, ours = (library.get_peft_model(net(), library.LoraConfig(**config)) for library in (peft, peanut))
    for name in ("modules_to_save", "base_model_torch_dtype", "has_active_enabled_adapter"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.supports_lora_conversion() is theirs.supports_lora_conversion() is True
    assert ours.base_model.targeted_parameter_names == theirs.base_model.targeted_parameter_names == []
    with ours.disable_adapter(), theirs.disable_adapter():
        assert ours.has_active_enabled_adapter is False
    assert not peanut.get_peft_model(
        llama(), peanut.PromptTuningConfig(num_virtual_tokens=2)
    ).supports_lora_conversion()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_are_what_hugging_face_peft_gives(kind: str) -> None:
    more = {"encoder_hidden_size": 4} if kind == "PromptEncoderConfig" else {}
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2, **more}
    theirs, ours = (library.get_peft_model(llama(), getattr(library, kind)(**options)) for library in (peft, peanut))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.get_prompt(3), theirs.get_prompt(3))
    saved = (each.get_prompt_embedding_to_save("default") for each in (ours, theirs))
    torch.testing.assert_close(*saved)
    plain = peanut.get_peft_model(net(), peanut.LoraConfig(**LORA))
    with pytest.raises(PeanutError, match="no active adapter puts virtual tokens"):
        plain.get_prompt(1)
    with pytest.raises(PeanutError, match="has no prompt"):
        plain.get_prompt_embedding_to_save("default")


def test_heads_of_the_task_are_among_the_modules_to_save(tiny_bert: Callable[..., Any]) -> None:
    config = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    found = peanut.get_peft_model(tiny_bert(), peanut.LoraConfig(**config)).modules_to_save
    assert found == peft.get_peft_model(tiny_bert(), peft.LoraConfig(**config)).modules_to_save
