"""A merged model is whole, loads without this library, and never overwrites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from peanut import LoraConfig, PeanutConfig, PeanutError, get_peft_model
from peanut.export import save_merged

from ..support import distance, randomised

IDS = torch.arange(28).reshape(4, 7)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [PeanutConfig(r=4, depth=1, target_modules=["q_proj", "lm_head"])], ids=["peanut"])
def test_merged_model_loads_alone(config: Any, tied: bool, tiny_llama: Any, tmp_path: Path) -> None:
    model = randomised(get_peft_model(tiny_llama(tie_word_embeddings=tied), config)).eval()
    expected = model(IDS).logits
    folder = save_merged(model, tmp_path / "merged")
    again = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert distance(again(IDS).logits, expected) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_what_is_there_stays(tiny_llama: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PeanutError, match="is there already; expected a new or empty folder; choose another"):
        save_merged(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert model.active_adapters == ["default"]
