"""Two layers of different shapes, for methods whose layers share something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peanut import PeftModel, get_peft_model
from peanut.protocols import PeftConfig

from ..support import peer_model, randomised


class Pair(nn.Module):
    """(…, 12) → (…, 8) through a wide layer ``a`` and a narrow one ``b``; the same weights each time it is made."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def adapted(config: PeftConfig, dtype: torch.dtype = torch.float64) -> PeftModel:
    """A pair with a random adapter, for evaluation."""
    return randomised(get_peft_model(Pair().to(dtype), config)).eval()


def tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors: those of a layer as ``a.suffix``, shared ones by their suffix alone."""
    layers = {name: model.get_base_model().get_submodule(name) for name in ("a", "b")}
    values = {name: layer.values("default") for name, layer in layers.items()}
    own = {name: layer.adapters["default"].suffixes for name, layer in layers.items()}
    return {
        f"{name}.{suffix}" if suffix in own[name] else suffix: value.detach()
        for name in layers
        for suffix, value in values[name].items()
    }


def through(deltas: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the pair answers with ``deltas`` added to its weights."""
    pair = Pair().to(x.dtype)
    with torch.no_grad():
        for name, delta in deltas.items():
            pair.get_submodule(name).weight += delta
    return pair(x)


def saved(model: PeftModel, folder: Path) -> dict[str, Tensor]:
    """The tensors of the file that the model writes."""
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def peer_banks(config: PeftConfig, *names: str) -> list[Tensor]:
    """The tensors that the peer's layers share under ``config``."""
    theirs: Any = peer_model(Pair(), config).base_model
    return [getattr(theirs, name)["default"] for name in names]
