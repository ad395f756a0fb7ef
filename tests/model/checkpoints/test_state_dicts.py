"""State dicts that are given to be saved or loaded: by the model's own keys or by those of files, whole or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import peanut
from peanut import (
    LoraConfig,
    PeanutConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from ...support import PEER_WARNINGS, randomised, refused, same_bits

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)
CONFIGS: list[Any] = [
    LoraConfig(),
    LoraConfig(modules_to_save=["norm"]),
    LoraConfig(init_lora_weights="pissa"),
    LoraConfig(use_dora=True),
    PeanutConfig(depth=1),
    VeraConfig(r=4),
    VBLoRAConfig(num_vectors=8, vector_length=8, target_modules=["q_proj"]),
    PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
]
pytestmark = PEER_WARNINGS
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)


@each_config
@pytest.mark.parametrize("form", ["of files", "of the model"])
def test_what_is_given_is_what_is_saved(config: Any, form: str, tiny_llama: Build, tmp_path: Path) -> None:
    model = randomised(get_peft_model(tiny_llama(), config))
    plain = get_peft_model_state_dict(model)
    given = plain if form == "of files" else model.state_dict()
    model.save_pretrained(tmp_path, state_dict={key: value * 0.5 for key, value in given.items()})
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == plain.keys()
    if not (config.method == "LORA" and isinstance(config.init_lora_weights, str) and form == "of the model"):
        assert all(same_bits(found[key], value * 0.5) for key, value in plain.items())
    some = dict(list(plain.items())[1:]) or {"another": torch.ones(1)}
    with refused(model, r"^a state_dict of \d+ tensors without '.*' of adapter 'default'; expected all of the adap"):
        model.save_pretrained(tmp_path, state_dict=some)


@each_config
def test_a_models_own_keys_are_loaded(config: Any, tiny_llama: Build) -> None:
    model = randomised(get_peft_model(tiny_llama(), config)).eval()
    own = {key: value for key, value in model.state_dict().items() if "default" in key}
    assert own
    again = get_peft_model(tiny_llama(), config).eval()
    set_peft_model_state_dict(again, own)
    with torch.no_grad():
        assert same_bits(again(IDS).logits, model(IDS).logits)


def test_names_of_modules_to_save_are_ends_of_paths_as_in_the_peers_files(tiny_llama: Build, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(modules_to_save=["norm", "head"]))
    ours = get_peft_model(tiny_llama(), LoraConfig(modules_to_save=["norm", "head"]))
    assert get_peft_model_state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()
    assert "base_model.model.model.layers.0.input_layernorm.weight" in get_peft_model_state_dict(ours)
    for library, other, model in ((peft, peanut, theirs), (peanut, peft, ours)):
        model.save_pretrained(tmp_path / library.__name__)
        read = other.PeftModel.from_pretrained(tiny_llama(), tmp_path / library.__name__)
        assert read.get_nb_trainable_parameters()[1] == model.get_nb_trainable_parameters()[1]
