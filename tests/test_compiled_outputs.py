"""Law 7 for methods that change outputs: training and evaluation are one graph each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peanut import get_peft_model
from peanut.methods.adaption_prompt import AdaptionPromptConfig

from .compiling import assert_compiles
from .support import one_thread, randomised  # noqa: F401
from .test_output_laws import VARIANTS, base, batch, labels

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(output: Any) -> torch.Tensor:
    return output["logits"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("variant", "model"), [("pfeiffer", "bert"), ("parallel", "llama"), ("loreft", "llama"), ("adaption", "gpt2")]
)
def test_outputs(variant: str, model: str) -> None:
    one = {"n_layer": 1} if model == "gpt2" else {"num_hidden_layers": 1}
    alone = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    config = alone if variant == "adaption" else VARIANTS[variant].make()
    torch.manual_seed(1)
    made = randomised(get_peft_model(base(model, **one), config), scale=0.2)
    made.config.problem_type = "single_label_classification"  # else the first call finds it out, for another graph
    # GPT-2's own loss warns, which transformers has no place for in a graph
    assert_compiles(made, batch(model) | (labels(model) if model != "gpt2" else {}), logits)
