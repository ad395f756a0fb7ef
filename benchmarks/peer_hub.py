"""A cache of the hub with small random models under the names that Hugging Face PEFT's tests ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

__all__ = ["fill"]

_SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_OPT = {**_SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 128}
_T5: dict[str, Any] = {"vocab_size": 1024, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
_T5["decoder_start_token_id"] = 0
_BART: dict[str, Any] = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 1024}
_GPT2: dict[str, Any] = {"vocab_size": 1024, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
_LLAMA = {**_SIZES, "num_key_value_heads": 2}
_KINDS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT2, rotary_dim=4)),
    "gptneox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=1024, hidden_size=16, n_layer=2, n_head=4)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_SIZES)),
    "debertav2": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**_SIZES)),
    "deberta": lambda: hf.DebertaModel(hf.DebertaConfig(**_SIZES)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_SIZES)),
}
"""Small models by a part of the names that they stand in for, longer ones first."""
_ASKED = {
    "opt": "peft-internal-testing/opt-125m peft-internal-testing/tiny-random-OPTForCausalLM facebook/opt-125m "
    "facebook/opt-350m hf-internal-testing/tiny-random-OPTForCausalLM",
    "llama": "trl-internal-testing/tiny-random-LlamaForCausalLM peft-internal-testing/tiny-random-LlamaForCausalLM "
    "hf-internal-testing/tiny-random-LlamaForCausalLM peft-internal-testing/zephyr-smol_llama-100m-sft-full",
    "mistral": "hf-internal-testing/tiny-random-MistralForCausalLM",
    "qwen2": "peft-internal-testing/tiny-dummy-qwen2 trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
    "gpt2": "gpt2 openai-community/gpt2 peft-internal-testing/tiny-random-gpt2 hf-internal-testing/tiny-random-gpt2 "
    "peft-internal-testing/tiny-random-GPT2LMHeadModel",
    "gptj": "peft-internal-testing/tiny-random-GPTJForCausalLM",
    "gptneox": "peft-internal-testing/tiny-random-GPTNeoXForCausalLM",
    "bloom": "peft-internal-testing/tiny-random-BloomForCausalLM bigscience/bloomz-560m",
    "t5": "peft-internal-testing/tiny-random-t5 peft-internal-testing/tiny-random-T5ForConditionalGeneration "
    "google/flan-t5-base google/flan-t5-small",
    "bart": "peft-internal-testing/tiny-random-BartForConditionalGeneration",
    "roberta": "peft-internal-testing/tiny-random-RobertaForSequenceClassification "
    "peft-internal-testing/tiny-random-RobertaModel",
    "debertav2": "peft-internal-testing/tiny-random-DebertaV2Model",
    "deberta": "peft-internal-testing/tiny-random-DebertaModel",
    "bert": "bert-base-uncased peft-internal-testing/tiny-random-BertModel "
    "peft-internal-testing/tiny-random-BertForSequenceClassification",
}


def fill(folder: Path) -> None:
    """Writes the models into ``folder``, as ``HF_HUB_CACHE`` lays them out."""
    for kind, names in _ASKED.items():
        for name in names.split():
            home = folder / f"models--{name.replace('/', '--')}"
            (home / "refs").mkdir(parents=True)
            (home / "refs" / "main").write_text("0" * 40)
            torch.manual_seed(0)
            _KINDS[kind]().save_pretrained(home / "snapshots" / ("0" * 40))
            _tokenizer().save_pretrained(home / "snapshots" / ("0" * 40))


def _tokenizer() -> Any:
    """Every byte is a token; the first four ids are special."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token=special[-1]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=model, **names)
