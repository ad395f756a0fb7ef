"""The modules of prompt methods under the names, and with the tensors, that Hugging Face PEFT gives them."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
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
