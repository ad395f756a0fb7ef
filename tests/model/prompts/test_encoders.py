"""The modules of prompt methods under the names, and with the tensors, that Hugging Face PEFT gives them."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import peanut
from peanut import PeanutError

from ...support import PEER_WARNINGS

pytestmark = PEER_WARNINGS

SIZES: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "token_dim": 8, "num_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_transformer_submodules": 1}
CPT: dict[str, Any] = SIZES | {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prompt": ("PromptEmbedding", "PromptTuningConfig", SIZES),
    "prompt, two stacks": ("PromptEmbedding", "PromptTuningConfig", SIZES | {"num_transformer_submodules": 2}),
    "prompt, for use": ("PromptEmbedding", "PromptTuningConfig", SIZES | {"inference_mode": True}),
    "p-tuning": ("PromptEncoder", "PromptEncoderConfig", SIZES | {"encoder_hidden_size": 6}),
    "p-tuning, LSTM": (
        "PromptEncoder",
        "PromptEncoderConfig",
        SIZES | {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("PrefixEncoder", "PrefixTuningConfig", SIZES),
    "prefix, projected": (
        "PrefixEncoder",
        "PrefixTuningConfig",
        SIZES | {"prefix_projection": True, "encoder_hidden_size": 6},
    ),
    "cpt": ("CPTEmbedding", "CPTConfig", CPT),
}
BOTH: tuple[Any, Any] = (peft, peanut)
IDS = torch.tensor([[3, 1, 4, 1]])


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()


def made(library: Any, case: str, embeddings: nn.Module) -> Any:
    name, config_class, options = CASES[case]
    config = getattr(library, config_class)(**options)
    config.token_dim = 8  # CPT's own forgets it there
    given = (embeddings,) if name in ("PromptEmbedding", "CPTEmbedding") else ()
    return getattr(library, name)(config, *given)


@pytest.mark.parametrize("case", CASES)
def test_they_have_the_tensors_and_the_outputs_that_they_have_there(case: str) -> None:
    embeddings = nn.Embedding(9, 8)
    theirs, ours = (made(library, case, embeddings) for library in (peft, peanut))
    if case == "cpt":
        nn.init.normal_(theirs.delta_embedding.weight, std=1e-3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    indices = torch.arange(len(theirs.embedding.weight))[None].repeat(2, 1)
    found, wanted = ours(indices), theirs(indices)
    torch.testing.assert_close(found, wanted)
    trained = {name for name, value in theirs.named_parameters() if value.requires_grad}
    assert {name for name, value in ours.named_parameters() if value.requires_grad} == trained
    for output in (found, wanted):
        output.square().sum().backward()
    for name, value in theirs.named_parameters():
        if name in trained:
            torch.testing.assert_close(ours.get_parameter(name).grad, value.grad)


def test_they_start_from_the_embeddings_of_the_base() -> None:
    embeddings = nn.Embedding(9, 8)
    config = peanut.PromptTuningConfig(**SIZES, prompt_tuning_init="SAMPLE_VOCAB")
    rows = peanut.PromptEmbedding(config, embeddings).embedding.weight
    assert (torch.cdist(rows, embeddings.weight).min(dim=1).values < 1e-6).all()
    with pytest.raises(PeanutError, match="no word_embeddings"):
        peanut.PromptEmbedding(config)


def test_a_config_of_another_method_or_without_sizes_is_refused() -> None:
    with pytest.raises(PeanutError, match="a PrefixTuningConfig with token_dim=8 for PromptEmbedding"):
        peanut.PromptEmbedding(peanut.PrefixTuningConfig(**SIZES))
    with pytest.raises(PeanutError, match="token_dim=None"):
        peanut.PrefixEncoder(peanut.PrefixTuningConfig(num_virtual_tokens=3))


OF_A_MODEL = {case: own for case, own in CASES.items() if case not in ("prompt, two stacks", "prompt, for use")}


@pytest.mark.parametrize("case", OF_A_MODEL)
def test_those_of_a_model_are_its_own_tensors(case: str) -> None:
    name, config_class, options = OF_A_MODEL[case]
    theirs, ours = (library.get_peft_model(llama(), getattr(library, config_class)(**options)) for library in BOTH)
    held, there = ours.prompt_encoder, theirs.prompt_encoder
    assert isinstance(held["default"], getattr(peanut, name))
    assert held.state_dict().keys() == there.state_dict().keys()
    held.load_state_dict(there.state_dict())
    indices = torch.arange(3)
    torch.testing.assert_close(held.default(indices), there.default(indices))
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    theirs(IDS, labels=IDS).loss.backward()
    ours(IDS, labels=IDS).loss.backward()
    trained = {key: value for key, value in there.named_parameters() if value.requires_grad}
    for key, value in trained.items():
        torch.testing.assert_close(held.get_parameter(key).grad, value.grad)
    assert ours.prefix == "adapted_input"
    before = ours(IDS).logits
    leaf = held.default.delta_embedding if case == "cpt" else held.default.embedding
    leaf.weight = nn.Parameter(torch.full_like(leaf.weight, 0.001))
    assert not torch.equal(ours(IDS).logits, before)


def test_a_base_keeps_a_part_of_that_name() -> None:
    base = nn.Sequential(nn.Linear(2, 2))
    base.prompt_encoder = nn.Linear(2, 2)
    model = peanut.get_peft_model(base, peanut.LoraConfig(target_modules=["0"]))
    assert model.prompt_encoder is base.prompt_encoder
    del base.prompt_encoder
    assert not hasattr(model, "prompt_encoder")
