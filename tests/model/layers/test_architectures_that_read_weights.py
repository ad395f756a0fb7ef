"""Architectures of transformers that compute with a projection's weight and never call the projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconMambaConfig, FalconMambaModel, MambaConfig, MambaModel, WavLMConfig, WavLMModel

from peanut import PeftConfig, get_peft_model
from peanut.protocols import METHODS

from ...support import distance, randomised

IDS = torch.tensor([[5, 9, 2, 7, 1, 3]])
SOUND = torch.randn(1, 800, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mamba() -> nn.Module:
    return MambaModel(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4))


def falcon_mamba() -> nn.Module:
    return FalconMambaModel(
        FalconMambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)
    )


def wavlm() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return WavLMModel(WavLMConfig(**sizes, **convolutions, **positions))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "mamba": (mamba, IDS, ["dt_proj"]),
    "falcon_mamba": (falcon_mamba, IDS, ["dt_proj"]),
    "wavlm": (wavlm, SOUND, ["q_proj", "k_proj", "v_proj", "out_proj"]),
}


@pytest.mark.parametrize("method", ["LORA", "PEANUT", "OFT"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_act_and_train_there_and_can_be_merged(name: str, method: str) -> None:
    make, x, targets = MODELS[name]
    torch.manual_seed(0)
    base = make().double().eval()
    before = base(x).last_hidden_state.detach()
    sizes: dict[str, Any] = {"oft_block_size": 4} if method == "OFT" else {"r": 2}
    config: PeftConfig = METHODS[method].config_class(target_modules=targets, **sizes)
    model = randomised(get_peft_model(base, config)).eval()
    y = model(x).last_hidden_state
    effect = distance(y, before)
    assert effect > 1e-7
    y.square().sum().backward()
    slopes = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(slopes) >= 2 * len(targets)
    assert all(slope is not None and slope.abs().max() > 0 for slope in slopes)
    model.merge_adapter()
    assert distance(model(x).last_hidden_state, y) < 1e-5 * effect
