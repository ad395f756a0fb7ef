"""Which layers are adapted where a config names none, by architecture."""

from __future__ import annotations

__all__ = ["DEFAULT_TARGETS", "FEED_FORWARD_OUTPUTS", "HEADS"]

_QV = ["q_proj", "v_proj"]
_QUERY_VALUE = ["query", "value"]
_FUSED = ["query_key_value"]
_VISION = ["q_proj", "v_proj", "query", "value"]  # transformers renamed these layers; a model has one pair or the other

DEFAULT_TARGETS: dict[str, list[str]] = {
    "albert": _QUERY_VALUE,
    "bart": _QV,
    "beit": _VISION,
    "bert": _QUERY_VALUE,
    "bloom": _FUSED,
    "camembert": _QUERY_VALUE,
    "clip": _QV,
    "codegen": ["qkv_proj"],
    "cohere": _QV,
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "deit": _VISION,
    "dinov2": _VISION,
    "distilbert": ["q_lin", "v_lin"],
    "electra": _QUERY_VALUE,
    "falcon": _FUSED,
    "gemma": _QV,
    "gemma2": _QV,
    "gemma3": _QV,
    "gemma3_text": _QV,
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": _QV,
    "gpt_neox": _FUSED,
    "gptj": _QV,
    "layoutlm": _QUERY_VALUE,
    "llama": _QV,
    "llama4": _QV,
    "mbart": _QV,
    "mistral": _QV,
    "mixtral": _QV,
    "modernbert": ["Wqkv"],
    "mpnet": ["q", "v"],
    "mpt": ["Wqkv"],
    "mt5": ["q", "v"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "olmo2": _QV,
    "opt": _QV,
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj"],
    "qwen2": _QV,
    "qwen2_moe": _QV,
    "qwen3": _QV,
    "qwen3_moe": _QV,
    "roberta": _QUERY_VALUE,
    "rwkv": ["key", "value", "receptance", "output"],
    "smollm3": _QV,
    "stablelm": _QV,
    "starcoder2": _QV,
    "swin": _VISION,
    "t5": ["q", "v"],
    "vit": _VISION,
    "vit_mae": _VISION,
    "wav2vec2": _QV,
    "whisper": _QV,
    "xlm-roberta": _QUERY_VALUE,
}
"""``model_type`` → names. Of these, the ones that the model has are taken."""

_BERT_OUTPUT = r".*layer\.\d+\.output\.dense"
_MLP_DOWN = r".*layers\.\d+\.mlp\.down_proj"

FEED_FORWARD_OUTPUTS: dict[str, str] = {
    "albert": r".*\.ffn_output",
    "bert": _BERT_OUTPUT,
    "camembert": _BERT_OUTPUT,
    "distilbert": r".*layer\.\d+\.ffn\.lin2",
    "electra": _BERT_OUTPUT,
    "gemma": _MLP_DOWN,
    "gemma2": _MLP_DOWN,
    "gemma3_text": _MLP_DOWN,
    "gpt2": r".*h\.\d+\.mlp\.c_proj",
    "llama": _MLP_DOWN,
    "mistral": _MLP_DOWN,
    "mpnet": _BERT_OUTPUT,
    "olmo2": _MLP_DOWN,
    "opt": r".*layers\.\d+\.fc2",
    "phi3": _MLP_DOWN,
    "qwen2": _MLP_DOWN,
    "qwen3": _MLP_DOWN,
    "roberta": _BERT_OUTPUT,
    "smollm3": _MLP_DOWN,
    "t5": r".*layer\.\d+\.DenseReluDense\.wo",
    "vit": r".*(layer\.\d+\.output\.dense|layers\.\d+\.mlp\.fc2)",
    "xlm-roberta": _BERT_OUTPUT,
}
"""``model_type`` → the paths of the layers with which the feed-forward blocks end."""

HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that a task trains beside the adapter, whichever of them the model has."""
