"""Plain state dicts of Hugging Face PEFT's models, ``model.state_dict()``, load into ours of the same config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import peanut
from peanut import PeanutError

from ..support import PEER_WARNINGS, one_thread, scattered  # noqa: F401

pytestmark = PEER_WARNINGS

ON: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
PROMPT: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
ENCODER: dict[str, Any] = PROMPT | {"encoder_hidden_size": 8}
CPT: dict[str, Any] = {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", ON),
    "lora, all biases": ("LoraConfig", ON | {"bias": "all"}),
    "lora, its biases": ("LoraConfig", ON | {"bias": "lora_only"}),
    "lora_bias": ("LoraConfig", ON | {"lora_bias": True}),
    "lora of an embedding": ("LoraConfig", {"target_modules": ["embed_tokens"]}),
    "lora, a head": ("LoraConfig", ON | {"modules_to_save": ["lm_head"]}),
    "lora, a task": ("LoraConfig", ON | {"task_type": "SEQ_CLS"}),
    "lora, tokens": ("LoraConfig", ON | {"trainable_token_indices": [1, 2]}),
    "dora": ("LoraConfig", ON | {"use_dora": True}),
    "pissa": ("LoraConfig", ON | {"init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", ON | {"init_lora_weights": "olora"}),
    "adalora": ("AdaLoraConfig", ON | {"total_step": 10}),
    "ia3": ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", ON | {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft, a series": ("OFTConfig", ON | {"oft_block_size": 4, "bias": "all", "use_cayley_neumann": True}),
    "boft": ("BOFTConfig", ON | {"boft_block_size": 4, "bias": "all"}),
    "hra": ("HRAConfig", ON),
    "vera": ("VeraConfig", ON | {"r": 4}),
    "vera, bases apart": ("VeraConfig", ON | {"r": 4, "save_projection": False}),
    "vblora": ("VBLoRAConfig", ON | {"vector_length": 4, "num_vectors": 8, "r": 2, "topk": 2}),
    "randlora": ("RandLoraConfig", ON | {"r": 4}),
    "peanut": ("PeanutConfig", ON | {"r": 4, "depth": 1}),
    "lokr": ("LoKrConfig", ON | {"r": 2}),
    "fourierft": ("FourierFTConfig", ON | {"n_frequency": 10, "scaling": 150.0}),
    "miss": ("MissConfig", ON | {"r": 4}),
    "c3a": ("C3AConfig", ON | {"block_size": 4}),
    "road": ("RoadConfig", ON | {"group_size": 4}),
    "shira": ("ShiraConfig", ON | {"r": 2, "random_seed": 7}),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
    "poly": ("PolyConfig", ON | {"task_type": "CAUSAL_LM", "r": 4, "n_tasks": 3, "n_skills": 2, "n_splits": 2}),
    "prompt": ("PromptTuningConfig", PROMPT),
    "prompt, a task": ("PromptTuningConfig", PROMPT | {"task_type": "SEQ_CLS"}),
    "p-tuning": ("PromptEncoderConfig", ENCODER),
    "p-tuning, LSTM": ("PromptEncoderConfig", ENCODER | {"encoder_reparameterization_type": "LSTM"}),
    "p-tuning, for use": ("PromptEncoderConfig", ENCODER | {"inference_mode": True}),
    "prefix": ("PrefixTuningConfig", PROMPT),
    "prefix, projected": ("PrefixTuningConfig", ENCODER | {"prefix_projection": True}),
    "cpt": ("CPTConfig", CPT | {"task_type": "CAUSAL_LM"}),
    "adaption prompt": ("AdaptionPromptConfig", {"task_type": "CAUSAL_LM", "adapter_len": 4, "adapter_layers": 2}),
}
"""A config of each method: its class and what it is given, in both libraries."""
RENAMED = {
    "lora, all biases",
    "lora, its biases",
    "boft",
    "oft, a series",
    "lora, tokens",
    "adalora",
    "shira",
    "vera",
    "vblora",
    "randlora",
    "adaption prompt",
    "cpt",
}
"""Those of which some keys differ; and those of prompts."""


def base(kind: Any = LlamaForCausalLM, tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "attention_bias": True}
    return kind(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def pair(name: str, options: dict[str, Any], tied: bool = False) -> tuple[Any, Any]:
    """Both libraries' models with the same config, the peer's with other values."""
    kind = LlamaForSequenceClassification if options.get("task_type") == "SEQ_CLS" else LlamaForCausalLM
    theirs = peft.get_peft_model(base(kind, tied), getattr(peft, name)(**options))
    scattered((each for each in theirs.parameters() if each.requires_grad), scale=0.1)
    return theirs.eval(), peanut.get_peft_model(base(kind, tied), getattr(peanut, name)(**options)).eval()


def logits(model: nn.Module, case: str) -> Tensor:
    ids = torch.arange(1, 9)[None]
    more = {"task_ids": torch.tensor([1])} if case == "poly" else {}
    more |= {"labels": ids, "input_type_mask": torch.full_like(ids, 4)} if case == "cpt" else {}
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    return found.detach()


@pytest.mark.filterwarnings("ignore:.*detect padding tokens")
@pytest.mark.parametrize("case", CASES)
def test_a_plain_state_dict_is_that_of_the_other_library(case: str) -> None:
    name, options = CASES[case]
    theirs, ours = pair(name, options)
    prompts = "num_virtual_tokens" in options or case == "cpt"
    assert (ours.state_dict().keys() == theirs.state_dict().keys()) == (case not in RENAMED and not prompts)
    before = logits(ours, case)
    found = ours.load_state_dict(theirs.state_dict())
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    wanted = logits(theirs, case)
    torch.testing.assert_close(logits(ours, case), wanted, rtol=1e-4, atol=1e-6)
    assert (before - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_a_plain_state_dict_of_ours_is_loaded_by_us(case: str) -> None:
    name, options = CASES[case]
    _, ours = pair(name, options)
    _, other = pair(name, options)
    scattered((each for each in ours.parameters() if each.requires_grad), scale=0.1)
    found = other.load_state_dict(ours.state_dict())
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    torch.testing.assert_close(logits(other, case), logits(ours, case), rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [True, False])
def test_tied_tokens_have_one_tensor(tokens: bool) -> None:
    own = ("TrainableTokensConfig", {"token_indices": [1, 2]})
    name, options = own if tokens else ("LoraConfig", ON | {"trainable_token_indices": [1, 2]})
    theirs, ours = pair(name, options, tied=True)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(logits(ours, ""), logits(theirs, ""), rtol=1e-4, atol=1e-6)


def test_a_mixture_and_its_experts(tmp_path: Path) -> None:
    models = []
    for each in ("0", "1"):
        torch.manual_seed(int(each))
        expert = peft.get_peft_model(base(), peft.LoraConfig(**ON, task_type="CAUSAL_LM", init_lora_weights=False))
        expert.save_pretrained(tmp_path / each)
    for library in (peft, peanut):
        model = base()
        model.config.use_cache = False
        options = {"task_type": "CAUSAL_LM", "hidden_size": 16, "xlora_depth": 1}
        config = library.XLoraConfig(**options, adapters={each: str(tmp_path / each) for each in ("0", "1")})
        models.append(library.get_peft_model(model, config).eval())
    theirs, ours = models
    scattered((value for key, value in theirs.named_parameters() if "lora_A" in key or "classifier" in key), scale=0.1)
    found = ours.load_state_dict(theirs.state_dict())
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    torch.testing.assert_close(logits(ours, ""), logits(theirs, ""), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_loaded_is_one_line_also_where_keys_may_be_missing() -> None:
    theirs, ours = pair("ShiraConfig", ON | {"r": 2})
    with pytest.raises(PeanutError, match=r"no '.*shira_indices\.default', and the config no random_seed"):
        ours.load_state_dict(theirs.state_dict(), strict=False)
    prompts, _ = pair("PromptTuningConfig", PROMPT)
    with pytest.raises(PeanutError, match=r"'prompt_encoder\.default\.embedding\.weight'; .*no prompt 'default'"):
        ours.load_state_dict(prompts.state_dict(), strict=False)
    theirs, ours = pair("LoraConfig", ON | {"init_lora_weights": "pissa"})
    state = theirs.state_dict()
    state["base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight"] += 0.01
    with pytest.raises(PeanutError, match=r"another base weight at 'model\.layers\.1\.self_attn\.q_proj'"):
        ours.load_state_dict(state, strict=False)
    theirs, ours = pair("AdaLoraConfig", ON | {"total_step": 10})
    state = theirs.state_dict()
    state["base_model.model.model.layers.1.self_attn.q_proj.ranknum.default"] += 1
    with pytest.raises(PeanutError, match="of rank 13 in the state dict; expected init_r=12"):
        ours.load_state_dict(state, strict=False)
