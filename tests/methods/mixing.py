"""What the tests of mixtures share: three LoRAs in folders, models that mix them, and the peer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LoraConfig, get_peft_model
from peanut.methods.xlora import XLoraConfig

from ..support import scattered

Builder = Callable[..., hf.PreTrainedModel]
IDS = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "down_proj"]
GATE = "internal_xlora_classifier.layers"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"layerwise_scalings": True, "softmax_temperature": 0.5},
    {"xlora_depth": 2, "xlora_size": 8},
    {"xlora_depth": 3, "xlora_size": 8, "xlora_dropout_p": 0.0, "layerwise_scalings": True},
    {"top_k_lora": 2, "enable_softmax": False},
    {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "global_scaling_weight": 1.7},
    {"scaling_pass_value": 0.4},
    {"scaling_pass_value": 0.4, "top_k_lora": 2, "enable_softmax_topk": True},
]


@pytest.fixture(scope="module", name="experts")
def lora_folders(tiny_llama: Builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of three LoRAs; their ranks and the layers that they change are not all the same."""
    folder = tmp_path_factory.mktemp("experts")
    for number in range(3):
        model = get_peft_model(tiny_llama(), LoraConfig(r=2 + number, target_modules=TARGETS, task_type="CAUSAL_LM"))
        scattered([p for p in model.parameters() if p.requires_grad], seed=number)
        model.save_pretrained(folder / str(number))
    return {str(number): str(folder / str(number)) for number in range(3)}


def mixed(base: nn.Module, experts: dict[str, str], seed: int = 9, **options: Any) -> Any:
    """A model with the experts and a random gate that prefers some of them clearly."""
    config = XLoraConfig(**{"adapters": experts, "task_type": "CAUSAL_LM", "use_bias": True} | options)
    torch.manual_seed(1)
    model = get_peft_model(base, config).eval()
    name = model.active_adapter
    scattered([value for key, value in model.adapters.parameters(name) if key.startswith("/")], seed)
    return model


def gate(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {key[1:]: value for key, value in model.adapters.parameters(name) if key.startswith("/")}


def peers(base: nn.Module, experts: dict[str, str], own: Any = None, **options: Any) -> Any:
    """The peer's model, with the gate of ours."""
    import peft

    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=experts, **options)
    base.config.use_cache = False  # type: ignore[union-attr]
    model = peft.get_peft_model(base, config).eval()
    if own is not None:
        values = gate(own)
        with torch.no_grad():
            for name, value in peer_gate(model).items():
                value.copy_(values[name])
    return model


def peer_gate(model: Any) -> dict[str, Tensor]:
    return {n.split("base_model.")[1]: p for n, p in model.named_parameters() if "xlora_classifier" in n}


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


PADDED = torch.ones_like(IDS)
PADDED[0, :3] = 0
COMMON: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "attention_mask": PADDED}
