"""Law 7 for methods that change the input: training and evaluation are one graph each."""

from __future__ import annotations

import pytest
import torch

from peanut import get_peft_model

from .compiling import assert_compiles
from .prompts import FORMS, KINDS, answer_of, moved
from .support import one_thread  # noqa: F401

CASES = [
    ("BertForSequenceClassification", "PROMPT_TUNING"),
    ("LlamaForCausalLM", "P_TUNING-MLP"),
    ("LlamaForCausalLM", "PREFIX_TUNING"),
    ("LlamaForCausalLM", "CPT"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "method"), CASES)
def test_inputs(model: str, method: str) -> None:
    kind, form = (next(each for each in all_ if str(each) == name) for all_, name in ((KINDS, model), (FORMS, method)))
    torch.manual_seed(7)
    made = moved(get_peft_model(kind.base(torch.float64, num_hidden_layers=1), form.config(kind)))
    made.config.problem_type = "single_label_classification"  # else the first call finds it out, for another graph
    assert_compiles(made, kind.batch(labels=True), answer_of)
