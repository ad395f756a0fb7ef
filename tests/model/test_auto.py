"""A base and its adapter in one call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

import peanut
from peanut import PeanutConfig, PeanutError, get_peft_model

from ..support import distance, one_thread, randomised, same_bits  # noqa: F401

IDS = torch.arange(3, 15).reshape(2, 6)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
T5 = hf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0)
BERT, LLAMA = hf.BertConfig(**SIZES), hf.LlamaConfig(**SIZES)

TASKS: dict[str, tuple[str, Callable[[], hf.PreTrainedModel]]] = {
    "SEQ_CLS": ("ForSequenceClassification", lambda: hf.BertForSequenceClassification(BERT)),
    "TOKEN_CLS": ("ForTokenClassification", lambda: hf.BertForTokenClassification(BERT)),
    "QUESTION_ANS": ("ForQuestionAnswering", lambda: hf.BertForQuestionAnswering(BERT)),
    "FEATURE_EXTRACTION": ("ForFeatureExtraction", lambda: hf.BertModel(BERT)),
    "CAUSAL_LM": ("ForCausalLM", lambda: hf.LlamaForCausalLM(LLAMA)),
    "SEQ_2_SEQ_LM": ("ForSeq2SeqLM", lambda: hf.T5ForConditionalGeneration(T5)),
}


def answer(model: torch.nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more)[0]


@pytest.mark.parametrize("task", TASKS)
def test_the_base_is_found_and_adapted(task: str, tmp_path: Path) -> None:
    suffix, build = TASKS[task]
    base = build().eval()
    base.save_pretrained(tmp_path / "base")
    plain = answer(base)
    base = type(base).from_pretrained(tmp_path / "base")
    model = randomised(get_peft_model(base, PeanutConfig(r=4, task_type=task, revision="main"))).eval()
    expected = answer(model)
    assert distance(expected, plain) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    for auto in (peanut.AutoPeftModel, getattr(peanut, f"AutoPeftModel{suffix}")):
        loaded = auto.from_pretrained(tmp_path / "adapter")
        assert type(loaded.get_base_model()) is type(base)
        assert same_bits(answer(loaded), expected)
    trained = peanut.AutoPeftModel.from_pretrained(
        tmp_path / "adapter", "own", is_trainable=True, dtype=torch.bfloat16, local_files_only=True
    )
    assert trained.active_adapters == ["own"]
    assert trained.get_nb_trainable_parameters()[0] > 0
    assert trained.dtype == torch.bfloat16


def test_an_adapter_that_names_no_base_or_task_is_refused(
    tiny_llama: Callable[..., hf.PreTrainedModel], tmp_path: Path
) -> None:
    get_peft_model(tiny_llama(), PeanutConfig()).save_pretrained(tmp_path)
    with pytest.raises(
        PeanutError,
        match=r"names no base model; expected base_model_name_or_path in it; load the base yourself and use ",
    ):
        peanut.AutoPeftModel.from_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "some/base"}))
    with pytest.raises(
        PeanutError, match=r"names no task; expected one of SEQ_CLS, .*; use AutoPeftModelForCausalLM or an"
    ):
        peanut.AutoPeftModel.from_pretrained(tmp_path)
