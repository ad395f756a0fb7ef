"""Lightning: a LightningModule around a model with adapters is fitted, checkpointed, resumed and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import (
    LoraConfig,
    PeanutConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from ..support import one_thread  # noqa: F401

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's and its libraries'

IDS = torch.randint(3, 101, (8, 6), generator=torch.Generator().manual_seed(0))
CONFIGS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: LoraConfig(r=4, task_type="CAUSAL_LM"),
    "PEANUT": lambda: PeanutConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
}


class Whole(lightning.LightningModule):
    """Its checkpoints hold the base too, as those of any module do."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=0.01)


class Adapter(Whole):
    """Its checkpoints hold the adapter alone."""

    strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = get_peft_model_state_dict(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_peft_model_state_dict(self.model, checkpoint["state_dict"])
        checkpoint["state_dict"] = {}


@pytest.fixture(params=CONFIGS)
def made(request: pytest.FixtureRequest, tiny_llama: Callable[..., Any]) -> Iterator[Callable[[], PeftModel]]:
    def make() -> PeftModel:
        torch.manual_seed(1)
        return get_peft_model(tiny_llama(), CONFIGS[request.param]())

    return make


def fitted(module: Whole, folder: Path, steps: int, resumed: Path | None = None) -> Path:
    """Fits for so many steps; the checkpoint that is then written."""
    saves = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, every_n_train_steps=steps)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, max_epochs=-1, callbacks=[saves], **options)
    trainer.fit(module, torch.utils.data.DataLoader(IDS, batch_size=8), ckpt_path=resumed)  # type: ignore[arg-type]
    return Path(saves.best_model_path)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("kind", [Whole, Adapter])
def test_fit_resume_and_load(kind: type[Whole], made: Callable[[], PeftModel], tmp_path: Path) -> None:
    whole = kind(made())
    start = logits(whole.model)
    fitted(whole, tmp_path / "whole", 4)
    expected = logits(whole.model)
    assert not torch.allclose(start, expected, atol=1e-3)
    first = kind(made())
    checkpoint = fitted(first, tmp_path / "first", 2)
    loaded = kind.load_from_checkpoint(checkpoint, model=made())
    assert torch.equal(logits(loaded.model), logits(first.model))
    held = torch.load(checkpoint, weights_only=True)["state_dict"]
    own = get_peft_model_state_dict(first.model)
    assert own
    assert (held.keys() == own.keys()) == (kind is Adapter)
    resumed = kind(made())
    fitted(resumed, tmp_path / "resumed", 4, checkpoint)
    assert torch.equal(logits(resumed.model), expected)
