"""timm: a ViT and a ResNet without pretrained weights are adapted, trained, saved, loaded and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeftModel, get_peft_model

from ..support import distance, one_thread  # noqa: F401

pytest.importorskip("torchvision")  # which timm imports
timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")  # timm's and its libraries'

CONFIGS: dict[str, Callable[..., Any]] = {"LORA": LoraConfig, "PEANUT": PeanutConfig}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
RESNET = {"channels": (8, 8, 16, 16), "stem_width": 8}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit_tiny_patch16_224": (VIT, {"target_modules": "all-linear", "modules_to_save": ["head"]}),
    "resnet10t": (RESNET, {"target_modules": ["conv1", "conv2"], "modules_to_save": ["fc"]}),
}
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **MODELS[name][0])
    return model.eval()  # batch norms would follow the training


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(X)
    return found


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_train_save_load_and_merge(name: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(made(name), CONFIGS[method](r=4, **MODELS[name][1])).eval()
    start = logits(model)
    assert torch.equal(start, logits(made(name)))
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(X), torch.arange(4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(made(name), tmp_path)), expected)
    if method == "LORA":
        theirs = peft.PeftModel.from_pretrained(made(name), tmp_path)
        assert distance(logits(theirs), expected) < 1e-5
    merged = model.merge_and_unload()
    assert type(merged) is type(made(name))
    assert distance(logits(merged), expected) < 1e-5
