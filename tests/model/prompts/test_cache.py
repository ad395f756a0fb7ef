"""A model's cache under both of its names, and models whose layers keep something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from peanut import LoraConfig, PeanutError, PrefixTuningConfig, PromptTuningConfig, XLoraConfig, get_peft_model
from peanut.model.prompts.cache import cache_name

from ...prompts import KINDS, answer, moved
from ...support import CACHE, one_thread, refused, same_bits  # noqa: F401

LLAMA, T5 = (
    next(kind for kind in KINDS if str(kind) == name) for name in ("LlamaForCausalLM", "T5ForConditionalGeneration")
)
SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize("name", ["past_key_values", CACHE])
def test_the_users_cache_is_taken_by_its_old_name_too(name: str) -> None:
    model, batch = moved(get_peft_model(LLAMA.base(), PrefixTuningConfig(num_virtual_tokens=3))), LLAMA.batch()
    cache = hf.DynamicCache()
    found = answer(model, {**batch, name: cache})
    assert same_bits(found, answer(model, batch))
    assert cache.get_seq_length() == 3 + batch["input_ids"].shape[1]


def test_names() -> None:
    assert cache_name(LLAMA.base()) == cache_name(T5.base().get_decoder()) == CACHE
    assert cache_name(nn.Linear(2, 2)) is None
    # Their dictionary has the new name in every version, and is no cache of what a stack has read.
    xlm = hf.XLMModel(hf.XLMConfig(emb_dim=16, n_layers=1, n_heads=2, vocab_size=31))
    assert cache_name(xlm) is None


def jamba() -> Any:
    config = hf.JambaConfig(
        **SIZES,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        use_mamba_kernels=False,
    )
    return hf.JambaForCausalLM(config)


def test_prefix_of_layers_that_keep_states_is_refused() -> None:
    model = jamba()
    with refused(model, "JambaModel, some of whose layers are never given keys and values.*use prompt tuning"):
        get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3))


@pytest.mark.parametrize("config_class", [PrefixTuningConfig, PromptTuningConfig])
def test_models_without_attention_are_refused(config_class: Any) -> None:
    model = hf.MambaForCausalLM(hf.MambaConfig(**SIZES, state_size=4))
    with refused(model, "a MambaConfig without num_attention_heads.*changes weights or outputs"):
        get_peft_model(model, config_class(num_virtual_tokens=3))


def test_states_tell_a_mixture_no_length(tmp_path: Path) -> None:
    base = hf.MambaForCausalLM(hf.MambaConfig(**SIZES, state_size=4, eos_token_id=None)).eval()
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    config = XLoraConfig(hidden_size=16, task_type="CAUSAL_LM", adapters={"a": str(tmp_path)})
    model, ids = get_peft_model(lora.unload(), config).eval(), torch.arange(1, 13).view(2, 6)
    with pytest.raises(PeanutError, match=r"of states, which does not tell.*use_cache=False"):
        model.generate(input_ids=ids, max_new_tokens=2)
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, use_cache=False).shape == (2, 8)
