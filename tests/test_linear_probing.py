"""Linear probing trains the head and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peanut import LinearProbingConfig, PeanutError, PeftModel, get_peft_model

from .support import randomised, same_bits

IDS = torch.arange(28).reshape(4, 7)


def test_head_alone_is_trained_saved_and_loaded(tiny_bert: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), LinearProbingConfig(task_type="SEQ_CLS"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"base_model.model.classifier.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")]
    randomised(model).eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert same_bits(again(IDS).logits, model(IDS).logits)
    with model.disable_adapter():
        assert same_bits(model(IDS).logits, tiny_bert()(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_type": "SEQ_CLS", "target_modules": ["query"]}, "for LINEAR_PROBING, which changes no layer; leave it"),
        ({}, "LINEAR_PROBING without a head to train; expected modules_to_save, or a task_type with a head"),
    ],
)
def test_without_a_head_or_with_layers_it_is_refused(options: Any, message: str, tiny_bert: Any) -> None:
    with pytest.raises(PeanutError, match=message):
        get_peft_model(tiny_bert(), LinearProbingConfig(**options))
