"""Mixtures and their experts: put in, taken out, saved and loaded whole."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from peanut import LoraConfig, PeftModel, get_peft_model
from peanut.methods.bitfit import BitFitConfig
from peanut.methods.prompt_tuning import PromptTuningConfig
from peanut.methods.xlora import XLoraConfig
from peanut.model.adapters.adapter_set import AdapterSet

from ...methods.mixing import (
    GATE,
    OPTIONS,
    TARGETS,
    Builder,
    gate,
    logits,
    lora_folders,  # noqa: F401
    mixed,
)
from ...support import (
    PEER_WARNINGS,
    distance,
    one_thread,  # noqa: F401
    randomised,
    refused,
    same_bits,
    scattered,
)

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:`enable_softmax_topk` and `enable_softmax`")]


# In and out


def test_merging_deleting_unloading(tiny_llama: Builder, experts: dict[str, str]) -> None:
    model = mixed(tiny_llama(), experts)
    before = logits(model)
    with refused(model, r"^adapter 'default', of XLORA, changes no weight, so it cannot be merged"):
        model.merge_adapter()
    with refused(model, r"^adapter '1' is an expert of 'default'; expected an adapter that stands alone; delete 'defa"):
        model.delete_adapter("1")
    again = copy.deepcopy(model)
    scattered(gate(again).values())
    assert same_bits(logits(model), before)
    assert distance(logits(again), before) > 1e-3
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter(["other", "default"])
    model.merge_adapter("other")
    with refused(
        model, r"^mixture 'default' while 'other' is merged: its gates read the bare base; expected an unmerg"
    ):
        logits(model)
    model.unmerge_adapter()
    model.delete_adapter("default")
    model.delete_adapter("1")
    base = again.unload()
    assert [name for name, _ in base.named_modules()] == [name for name, _ in tiny_llama().named_modules()]
    assert same_bits(logits(base), logits(tiny_llama()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 64}, r"^hidden_size=64 for a model whose hidden states have 32; expected 32; leave it out"),
        ({"adapters": {"0": "nowhere/at/all"}}, r"nowhere/at/all"),
        ({"adapters": {"0": None}}, r"^expert '0' is neither in the model nor in the mixture's folder"),
        ({"adapters": None}, r"^XLORA without experts: the model has no adapters; expected adapters to mix; load LoRA"),
    ],
    ids=["width", "folder", "absent", "none"],
)
def test_a_refused_mixture_leaves_nothing(
    tiny_llama: Builder, experts: dict[str, str], options: dict[str, Any], message: str
) -> None:
    base = tiny_llama()
    with refused(base, message):
        get_peft_model(base, XLoraConfig(**{"adapters": experts} | options))
    assert not AdapterSet.of(base).configs


def test_experts_that_do_more_than_add(tiny_llama: Builder, experts: dict[str, str]) -> None:
    base = tiny_llama()
    get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS, use_dora=True), "dora")
    get_peft_model(base, PromptTuningConfig(num_virtual_tokens=3), "prompt")
    with refused(base, r"^expert 'prompt' is a PROMPT_TUNING adapter, which changes no weight"):
        get_peft_model(base, XLoraConfig(adapters={"prompt": None}))
    base = tiny_llama(attention_bias=True)
    get_peft_model(base, BitFitConfig(target_modules=["q_proj"]), "bias")
    with refused(base, r"^expert 'bias' does more at 'model.layers.0.self_attn.q_proj' than to add a product"):
        get_peft_model(base, XLoraConfig())


# Files


@pytest.mark.parametrize("name", ["default", "gate"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[3]], ids=str)
def test_saved_and_loaded_whole(
    tiny_llama: Builder, experts: dict[str, str], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """The experts' names are in another order than that of the alphabet, and the folder moves."""
    own = {"math": experts["0"], "code": experts["1"], "art": experts["2"]}
    config = XLoraConfig(adapters=own, use_trainable_adapters=True, **options)
    model = get_peft_model(tiny_llama(), config, name).eval()
    randomised(model)
    before = logits(model)
    model.save_pretrained(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    folder = tmp_path / "moved" if name == "default" else tmp_path / "moved" / name
    again = PeftModel.from_pretrained(tiny_llama(), folder)
    assert same_bits(logits(again), before)
    assert again.peft_config["default"].adapters == {"art": None, "code": None, "math": None}
    assert not any(parameter.requires_grad for parameter in again.parameters())
    again.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again", is_trainable=True)
    assert same_bits(logits(third.eval()), before)
    trained = {name for name, parameter in third.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained if GATE.split(".")[0] in name} == {"weight"}
    assert len([name for name in trained if GATE.split(".")[0] not in name]) == 3 * 4 * 2
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["v_proj"]), "plain").eval()
    plain.load_adapter(folder, "mixture")
    plain.set_adapter("mixture")
    assert same_bits(logits(plain), before)


def test_an_expert_called_default(tiny_llama: Builder, experts: dict[str, str], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), experts["0"])
    model.load_adapter(experts["1"], "second")
    model = get_peft_model(model, XLoraConfig()).eval()
    assert model.active_adapter == "xlora"
    scattered(gate(model, "xlora").values())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "xlora")
    assert list(again.peft_config) == ["default", "second", "xlora"]
    assert same_bits(logits(again), logits(model))


def test_a_name_that_another_adapter_has(tiny_llama: Builder, experts: dict[str, str], tmp_path: Path) -> None:
    mixed(tiny_llama(), experts).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), experts["1"], "0")
    message = (
        r"^expert '0' of '.*0' is another adapter than the one of that name in the model; expected the same adapter"
    )
    with refused(model, message):
        model.load_adapter(tmp_path, "mixture")
    with refused(model, message):
        get_peft_model(model.get_base_model(), XLoraConfig(adapters=experts))
    same = PeftModel.from_pretrained(tiny_llama(), experts["0"], "0")
    same.load_adapter(tmp_path, "mixture")
    assert list(same.peft_config) == ["0", "1", "2", "mixture"]
