"""timm: a ViT and a ResNet without pretrained weights are adapted, trained, saved, loaded and merged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeftModel, get_peft_model

from ..support import distance, one_thread  # noqa: F401


class Named(type):
    """Whatever is asked for by name: a class that has whatever is asked for by name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (), {})


class StandIn(MetaPathFinder, Loader):
    """For torchvision, where it is not installed: timm imports it for data sets and transforms, not for its models."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = partial(Named.__getattr__, Named)


def imported() -> Any:
    if find_spec("torchvision") is not None:
        return pytest.importorskip("timm")
    before = set(sys.modules)
    sys.meta_path.append(StandIn())
    try:
        return pytest.importorskip("timm")
    finally:
        sys.meta_path.pop()
        for name in [name for name in sys.modules if name.startswith("torchvision") and name not in before]:
            del sys.modules[name]


timm = imported()
pytestmark = pytest.mark.filterwarnings("ignore")  # timm's and its libraries'

CONFIGS: dict[str, Callable[..., Any]] = {"LORA": LoraConfig, "PEANUT": PeanutConfig}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
RESNET = {"channels": (8, 8, 16, 16), "stem_width": 8}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit_tiny_patch16_224": (VIT, {"target_modules": "all-linear", "modules_to_save": ["head"]}),
    "resnet10t": (RESNET, {"target_modules": r"layer\d\..*conv\d", "modules_to_save": ["fc"]}),
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
