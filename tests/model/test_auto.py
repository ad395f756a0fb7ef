"""A base and its adapter in one call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import peanut
from peanut import LoraConfig, PeanutConfig, PeanutError, get_peft_model

from ..support import distance, one_thread, randomised, same_bits, save_small_llama  # noqa: F401

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


def test_another_task_than_the_adapters_is_refused_and_the_fifth_argument_is_the_revision(tmp_path: Path) -> None:
    base = hf.LlamaForCausalLM(LLAMA)
    base.save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = randomised(get_peft_model(base, PeanutConfig(r=4, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(
        PeanutError,
        match=r"^AutoPeftModelForSequenceClassification for '.*', an adapter for CAUSAL_LM; expected one for SEQ_CLS; ",
    ):
        peanut.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a")
    auto = peanut.AutoPeftModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "a", "default", False, None, None, import_allowlist=["transformers"])
    assert same_bits(answer(loaded), answer(model))


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
    written = json.loads(path.read_text()) | {"base_model_name_or_path": "some/base"}
    elsewhere = {"base_model_class": "LlamaForCausalLM", "parent_library": "other"}
    for named, found in ((None, "no task"), (elsewhere, "LlamaForCausalLM as its base's class")):
        path.write_text(json.dumps(written | {"auto_mapping": named}))
        with pytest.raises(
            PeanutError, match=rf"names {found}; expected one of SEQ_CLS, .*; use AutoPeftModelForCausalLM or an"
        ):
            peanut.AutoPeftModel.from_pretrained(tmp_path)


def test_without_a_task_the_class_of_the_base_is_in_the_file(
    tiny_llama: Callable[..., hf.PreTrainedModel], tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = randomised(get_peft_model(base, PeanutConfig(r=2))).eval()
    model.save_pretrained(tmp_path / "a")
    loaded = peanut.AutoPeftModel.from_pretrained(tmp_path / "a")
    assert isinstance(loaded.get_base_model(), hf.LlamaForCausalLM)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert same_bits(loaded(ids).logits, model(ids).logits)


def test_the_base_is_resized_by_the_tokenizer_in_the_folder(smollm2: Path, tmp_path: Path) -> None:
    save_small_llama(tmp_path / "base", smollm2)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "base")
    added = tokenizer.add_tokens(["<one>", "<two>"])
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    rows = base.config.vocab_size
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = randomised(get_peft_model(base, PeanutConfig(r=4, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(PeanutError, match=rf"; call resize_token_embeddings\({rows + added}\) on the base first$"):
        peanut.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = peanut.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    ids = tokenizer("a <two> b <one>", return_tensors="pt").input_ids
    assert ids.max() == rows + added - 1
    with torch.no_grad():
        assert same_bits(loaded(ids).logits, model(ids).logits)
    assert len(loaded.get_input_embeddings().weight) == rows + added


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=["", "embedding adapted"])
def test_a_base_that_was_padded_beyond_the_tokenizer_is_padded_again(
    targets: list[str], smollm2: Path, tmp_path: Path
) -> None:
    save_small_llama(tmp_path / "base", smollm2)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<one>", "<two>"])
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    rows = len(base.get_input_embeddings().weight)
    model = randomised(get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets))).eval()
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = peanut.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert len(loaded.get_input_embeddings().weight) == rows > len(tokenizer)
    with torch.no_grad():
        assert same_bits(loaded(IDS).logits, model(IDS).logits)


def test_a_smaller_tokenizer_resizes_nothing(smollm2: Path, tmp_path: Path) -> None:
    save_small_llama(tmp_path / "base", smollm2)
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    rows = base.config.vocab_size + 8
    base.resize_token_embeddings(rows, mean_resizing=False)  # filled up, as is done for speed
    base.save_pretrained(tmp_path / "padded")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "padded")
    get_peft_model(base, PeanutConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    hf.AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "a")
    assert len(peanut.AutoPeftModel.from_pretrained(tmp_path / "a").get_input_embeddings().weight) == rows


@pytest.mark.parametrize("rows", [1e12, 1e30])
def test_rows_that_only_the_metadata_tell_of_are_not_made(rows: float, smollm2: Path, tmp_path: Path) -> None:
    save_small_llama(tmp_path / "base", smollm2)
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, PeanutConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    hf.AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "peanut_sum"}
    recorded = json.loads(metadata["peanut_base_values"])
    recorded["values"]["model.embed_tokens.weight"][:2] = [rows * 32, rows]
    save_file(load_file(path), path, {**metadata, "peanut_base_values": json.dumps(recorded)})
    with pytest.raises(PeanutError, match=r"this base is .*'model\.embed_tokens\.weight' differs"):
        peanut.AutoPeftModel.from_pretrained(tmp_path / "a")


def test_what_a_file_lacks_and_a_pickle(tmp_path: Path) -> None:
    _, build = TASKS["CAUSAL_LM"]
    build().save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = randomised(get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "a")
    config, weights = tmp_path / "a/adapter_config.json", tmp_path / "a/adapter_model.safetensors"
    plain = json.loads(config.read_text()) | {"peft_version": "0.21.2"}
    config.write_text(json.dumps(plain))
    state = load_file(weights)
    weights.unlink()
    torch.save(state, tmp_path / "a/adapter_model.bin")
    assert same_bits(answer(peanut.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")), answer(model))
    torch.save(dict(sorted(state.items())[1:]), tmp_path / "a/adapter_model.bin")
    with pytest.raises(PeanutError, match="or pass strict=False"):
        peanut.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="stays as it is here"):
        loaded = peanut.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a", strict=False)
    assert answer(loaded).isfinite().all()
