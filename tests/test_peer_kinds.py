"""Files of every method on every kind of layer on which Hugging Face PEFT has it too, both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peanut

from .support import PEER_WARNINGS, distance

peft = pytest.importorskip("peft")
pytestmark = PEER_WARNINGS
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 48), (3, 64)),
    "Conv1D": (lambda: Conv1D(48, 64), (3, 64)),
    "1d": (lambda: nn.Conv1d(64, 48, 3), (2, 64, 7)),
    "2d": (lambda: nn.Conv2d(64, 48, 3), (2, 64, 5, 5)),
    "groups": (lambda: nn.Conv2d(64, 48, 3, groups=2), (2, 64, 5, 5)),
    "3d": (lambda: nn.Conv3d(64, 48, 3), (2, 64, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(50, 64), ()),
}
RANDOM = {"init_weights": False}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("Lora", {"init_lora_weights": False}, "linear Conv1D 1d 2d 3d embedding"),
    ("Lora", {"init_lora_weights": False, "use_dora": True}, "linear Conv1D 1d 2d 3d embedding"),
    ("OFT", {**RANDOM, "oft_block_size": 8, "r": 0}, "linear embedding"),
    ("OFT", {**RANDOM, "oft_block_size": 8, "r": 0, "use_cayley_neumann": False}, "linear embedding"),
    ("HRA", RANDOM, "linear 2d"),
    ("BOFT", {**RANDOM, "boft_block_size": 4}, "linear 2d"),
    ("LoKr", RANDOM, "linear 1d 2d groups"),
    ("LoKr", {**RANDOM, "r": 2}, "linear 1d 2d groups"),
    ("Vera", RANDOM, "linear Conv1D"),
    ("AdaLora", {"init_lora_weights": False, "total_step": 4}, "linear Conv1D 2d"),
    ("Shira", {**RANDOM, "r": 8}, "linear"),
    ("RandLora", RANDOM, "linear Conv1D"),
    ("Miss", RANDOM, "linear"),
    ("VBLoRA", {"num_vectors": 8, "vector_length": 8}, "linear Conv1D"),
    ("FourierFT", RANDOM, "linear Conv1D"),
    ("IA3", {"init_ia3_weights": False, "feedforward_modules": []}, "linear Conv1D 2d groups 3d"),
    ("IA3", {"init_ia3_weights": False, "feedforward_modules": ["layer"]}, "linear Conv1D 2d 3d"),
    ("C3A", {**RANDOM, "block_size": 16}, "linear"),
    ("Road", {**RANDOM, "group_size": 16}, "linear"),
    ("Peanut", RANDOM, "linear"),
]


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = LAYERS[kind][0]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("writer", ["peft", "peanut"])
@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [(name, options, kind) for name, options, kinds in CASES for kind in kinds.split()],
    ids=str,
)
def test_files_mean_the_same_on_every_kind_of_layer(
    name: str, options: dict[str, Any], kind: str, writer: str, tmp_path: Path
) -> None:
    library, other = (peft, peanut) if writer == "peft" else (peanut, peft)
    written = library.get_peft_model(Net(kind), getattr(library, f"{name}Config")(target_modules=["layer"], **options))
    written.eval().save_pretrained(tmp_path)
    read = other.PeftModel.from_pretrained(Net(kind), tmp_path).eval()
    size = LAYERS[kind][1]
    x = torch.linspace(-3, 3, torch.Size(size).numel()).sin().reshape(size) if size else torch.arange(5)
    change = written(x) - Net(kind)(x)
    assert change.abs().max() > 1e-4
    assert distance(read(x) - Net(kind)(x), change) < 1e-3
