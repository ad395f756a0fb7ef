"""Whole models that accelerate has spread over memory and disk: adapters, trained modules, prompts, ties, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peanut import (
    LNTuningConfig,
    LoraConfig,
    LoreftConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peanut.protocols import PeftConfig

from ..support import distance, one_thread, randomised  # noqa: F401

IDS = torch.tensor([[1, 7, 9, 33, 7, 5]])
PLACES = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
CONFIGS: dict[str, PeftConfig] = {
    "peanut": PeanutConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "dora, head": LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens"]),
    "tokens": TrainableTokensConfig(token_indices=[7, 9], target_modules=["embed_tokens"]),
    "norms": LNTuningConfig(target_modules=["norm"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "states": LoreftConfig(r=2),
}


def llama() -> LlamaForCausalLM:
    """With the head tied to the embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def spread(model: nn.Module, folder: Path) -> nn.Module:
    dispatch_model(model, PLACES, main_device="cpu", offload_dir=folder, force_hooks=True)
    return model


def trained(model: Any) -> list[float]:
    """The losses of a few steps; the optimizer knows the parameters before the first forward does."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def answer(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


AFTERWARDS = [name for name in CONFIGS if name not in ("prompt", "prefix")]
"""What accelerate can spread: its map has no names for what lies beside the model."""


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("name", "first"), [(name, "base") for name in CONFIGS] + [(name, "adapters") for name in AFTERWARDS]
)
def test_trained_saved_and_merged_as_if_all_were_there(name: str, first: str, tmp_path: Path) -> None:
    expected: Any = randomised(get_peft_model(llama(), CONFIGS[name])).eval()
    expected.save_pretrained(tmp_path / "start")
    base = spread(llama(), tmp_path / "weights") if first == "base" else llama()
    if name == "tokens" and first == "base":
        answer(base)  # after a forward the tied weights are two in accelerate's hooks
    model: Any = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).eval()
    if first == "adapters":
        spread(model.get_base_model(), tmp_path / "weights")
    assert trained(model) == pytest.approx(trained(expected), rel=1e-5)
    found, wanted = answer(model), answer(expected)
    assert distance(found, wanted) < 1e-4
    model.save_pretrained(tmp_path / "end")
    assert distance(answer(PeftModel.from_pretrained(llama(), tmp_path / "end").eval()), wanted) < 1e-4
    if name in ("prompt", "prefix", "states"):
        return
    merged = model.merge_and_unload()
    assert distance(answer(merged), wanted) < 1e-4
    if name != "dora, head":
        untied = expected.merge_and_unload()
        assert merged.config.tie_word_embeddings == untied.config.tie_word_embeddings == (name != "embedding")
    merged.save_pretrained(tmp_path / "merged")
    assert distance(answer(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), wanted) < 1e-4


def test_blocks_that_one_hook_brings_whole_are_refused() -> None:
    model = llama()
    cpu_offload(model, torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(PeanutError, match=r"^'model\.layers\.0', whose offloaded weights one hook brings together"):
        get_peft_model(model, CONFIGS["peanut"])


def test_adapters_in_blocks_that_one_hook_brings_whole_answer_and_are_not_trained() -> None:
    model = randomised(get_peft_model(llama(), CONFIGS["peanut"])).eval()
    wanted = answer(model)
    cpu_offload(model.get_base_model(), torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"])
    assert distance(answer(model), wanted) < 1e-6
    with pytest.raises(PeanutError, match=r"^'model\.layers\.0', whose offloaded weights one hook brings together"):
        trained(model)


def test_a_head_that_is_partly_offloaded_is_trained_whole() -> None:
    net: Any = nn.Sequential()
    net.layer, net.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"]))
    own = net.head.modules_to_save["default"]
    cpu_offload(own[2], execution_device=torch.device("cpu"))
    model(torch.randn(8, 4)).square().sum().backward()
    assert [parameter.grad is not None and not parameter.is_meta for parameter in own.parameters()] == 4 * [True]
