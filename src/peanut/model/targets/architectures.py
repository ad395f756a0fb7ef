"""The table of architectures: default targets and places by ``model_type``. A new architecture is one entry here."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ...protocols import Architecture, Stack

__all__ = ["ARCHITECTURES", "architecture_of", "model_type_of"]


def model_type_of(model: nn.Module) -> str | None:
    """The name of a model's architecture, ``None`` if its config tells none."""
    return getattr(getattr(model, "config", None), "model_type", None)


def architecture_of(model: nn.Module) -> Architecture:
    """What is known of a model's architecture; an empty entry if that is nothing."""
    return ARCHITECTURES.get(str(model_type_of(model)), Architecture())


_KV = ("k_proj", "v_proj")
_QV = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)
_VISION = ("q_proj", "v_proj", "query", "value")  # transformers renamed these layers; a model has one pair or the other

_BERT_BLOCKS = Stack(
    r"(?:.*\.)?encoder\.layer\.(\d+)",
    r"attention\.self",
    r"attention\.output\.dense",
    r"intermediate\.dense",
    r"output\.dense",
    r"output\.LayerNorm",
)
_MPNET_BLOCKS = replace(_BERT_BLOCKS, attention=r"attention\.attn", attention_output=r"attention\.attn\.o")
_DISTILBERT_BLOCKS = Stack(
    r"(?:.*\.)?layer\.(\d+)", "attention", r"attention\.out_lin", "ffn", r"ffn\.lin2", "output_layer_norm"
)
_GPT2_BLOCKS = Stack(r"(?:.*\.)?h\.(\d+)", "attn", r"attn\.c_proj", "ln_2", r"mlp\.c_proj")
_LLAMA_BLOCKS = Stack(
    r"(?:.*\.)?layers\.(\d+)", "self_attn", r"self_attn\.o_proj", "post_attention_layernorm", r"mlp\.down_proj"
)
_GEMMA_BLOCKS = replace(_LLAMA_BLOCKS, feed_forward_input="pre_feedforward_layernorm")
_OLMO_BLOCKS = replace(_LLAMA_BLOCKS, feed_forward_input="mlp")  # its norms follow attention and feed-forward
_VIT_BLOCKS = Stack(
    r"(?:.*\.)?layers?\.(\d+)",
    "attention",
    r"attention\.(?:o_proj|output\.dense)",
    "layernorm_after",
    r"mlp\.fc2|output\.dense",
)
_T5_ENCODER = Stack(
    r"(?:.*\.)?encoder\.block\.(\d+)",
    r"layer\.0\.SelfAttention",
    r"layer\.0\.SelfAttention\.o",
    r"layer\.1",
    r"layer\.1\.DenseReluDense\.wo",
)
_T5_DECODER = replace(
    _T5_ENCODER,
    block=r"(?:.*\.)?decoder\.block\.(\d+)",
    feed_forward_input=r"layer\.2",
    feed_forward_output=r"layer\.2\.DenseReluDense\.wo",
    writes=True,
)

_BERT = Architecture(("query", "value"), (_BERT_BLOCKS,), ("key", "value"), ("output.dense",))
_FALCON = Architecture(_FUSED, (), _FUSED, ("dense_4h_to_h",))
_GPT2 = Architecture(("c_attn",), (_GPT2_BLOCKS,), ("c_attn",), ("mlp.c_proj",))
_Q_AND_V = Architecture(_QV)
_LLAMA = Architecture(_QV, (_LLAMA_BLOCKS,), _KV, ("down_proj",))
_QWEN = replace(_LLAMA, scaled_outputs=_QV)
_GEMMA2 = replace(_QWEN, stacks=(_GEMMA_BLOCKS,))
_T5 = Architecture(("q", "v"), (_T5_ENCODER, _T5_DECODER), ("k", "v"), ("wo",))

ARCHITECTURES: dict[str, Architecture] = {
    "RefinedWeb": _FALCON,
    "RefinedWebModel": _FALCON,
    "albert": Architecture(("query", "value"), last_in_feed_forward=r".*\.ffn_output"),
    "bart": Architecture(_QV, (), _QV, ("fc2",)),
    "beit": Architecture(_VISION),
    "bert": _BERT,
    "blip-2": Architecture(("q", "v", *_QV)),
    "bloom": Architecture(_FUSED, (), _FUSED, ("mlp.dense_4h_to_h",)),
    "btlm": Architecture(("c_proj", "c_attn")),
    "camembert": _BERT,
    "chatglm": Architecture(_FUSED),
    "clip": _Q_AND_V,
    "codegen": Architecture(("qkv_proj",)),
    "cohere": _Q_AND_V,
    "deberta": Architecture(("in_proj",), (), ("in_proj",), ("output.dense",)),
    "deberta-v2": Architecture(("query_proj", "value_proj"), (), ("key_proj", "value_proj"), ("output.dense",)),
    "deit": Architecture(_VISION),
    "dinov2": Architecture(_VISION),
    "distilbert": Architecture(("q_lin", "v_lin"), (_DISTILBERT_BLOCKS,)),
    "electra": _BERT,
    "falcon": _FALCON,
    "gemma": _QWEN,
    "gemma2": _GEMMA2,
    "gemma3": _Q_AND_V,
    "gemma3_text": _GEMMA2,
    "gemma4": Architecture(r".*language_model\..*\.(q_proj|v_proj)"),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, stacks=()),
    "gpt_neo": Architecture(_QV, (), _QV, ("c_proj",)),
    "gpt_neox": _FALCON,
    "gptj": Architecture(_QV, (), _QV, ("fc_out",)),
    "layoutlm": _BERT,
    "llama": _LLAMA,
    "llama4": replace(_QWEN, stacks=()),
    "mbart": _Q_AND_V,
    "mistral": _LLAMA,
    "mixtral": Architecture(_QV, (), _KV, ("w2",)),
    "modernbert": Architecture(("Wqkv",)),
    "mpnet": Architecture(("q", "v"), (_MPNET_BLOCKS,)),
    "mpt": Architecture(("Wqkv",)),
    "mt5": replace(_T5, scaled_outputs=("k", "v", "wi_1"), scaled_inputs=()),
    "nemotron_h": Architecture(("q_proj", "k_proj", "v_proj", "o_proj")),
    "olmo2": Architecture(_QV, (_OLMO_BLOCKS,)),
    "opt": Architecture(_QV, (), ("q_proj", "k_proj"), ("fc2",), last_in_feed_forward=r".*layers\.\d+\.fc2"),
    "phi": Architecture((*_QV, "fc1", "fc2"), (), _QV, ("fc2",)),
    "phi3": Architecture(("qkv_proj",), (_LLAMA_BLOCKS,)),
    "qwen2": _QWEN,
    "qwen2_moe": _Q_AND_V,
    "qwen3": _QWEN,
    "qwen3_moe": _Q_AND_V,
    "roberta": _BERT,
    "rwkv": Architecture(("key", "value", "receptance", "output")),
    "rwkv7": Architecture(("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")),
    "smollm3": Architecture(_QV, (_LLAMA_BLOCKS,)),
    "stablelm": _Q_AND_V,
    "starcoder2": _Q_AND_V,
    "swin": Architecture(_VISION),
    "t5": _T5,
    "vit": Architecture(_VISION, (_VIT_BLOCKS,)),
    "vit_mae": Architecture(_VISION),
    "wav2vec2": _Q_AND_V,
    "whisper": _Q_AND_V,
    "xlm-roberta": _BERT,
}
"""``model_type`` → what is known. Attention targets and (IA)³'s are those of Hugging Face PEFT where it has any."""
