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
    """What is known of a model's architecture; an empty entry if that is nothing.

    Feed-forward layers that it has no more are left out: transformers fuses Mixtral's experts, which had a ``w2``.
    """
    found = ARCHITECTURES.get(str(model_type_of(model)), Architecture())
    if not found.scaled_inputs:
        return found
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    there = (name for name in found.scaled_inputs if name.rpartition(".")[2] in names)
    return replace(found, scaled_inputs=tuple(there))


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

_FAMILIES: tuple[tuple[Architecture, str], ...] = (
    (_FALCON, "RefinedWeb RefinedWebModel falcon gpt_neox"),
    (Architecture(("query", "value"), last_in_feed_forward=r".*\.ffn_output"), "albert"),
    (Architecture(_QV, (), _QV, ("fc2",)), "bart"),
    (Architecture(_VISION), "beit deit dinov2 swin vit_mae"),
    (_BERT, "bert camembert electra layoutlm roberta xlm-roberta"),
    (Architecture(("q", "v", *_QV)), "blip-2"),
    (Architecture(_FUSED, (), _FUSED, ("mlp.dense_4h_to_h",)), "bloom"),
    (Architecture(("c_proj", "c_attn")), "btlm"),
    (Architecture(_FUSED), "chatglm"),
    (_Q_AND_V, "clip cohere gemma3 mbart qwen2_moe qwen3_moe stablelm starcoder2 wav2vec2 whisper"),
    (Architecture(("qkv_proj",)), "codegen"),
    (Architecture(("in_proj",), (), ("in_proj",), ("output.dense",)), "deberta"),
    (Architecture(("query_proj", "value_proj"), (), ("key_proj", "value_proj"), ("output.dense",)), "deberta-v2"),
    (Architecture(("q_lin", "v_lin"), (_DISTILBERT_BLOCKS,)), "distilbert"),
    (_QWEN, "gemma qwen2 qwen3"),
    (_GEMMA2, "gemma2 gemma3_text"),
    (Architecture(r".*language_model\..*\.(q_proj|v_proj)"), "gemma4"),
    (_GPT2, "gpt2"),
    (replace(_GPT2, stacks=()), "gpt_bigcode"),
    (Architecture(_QV, (), _QV, ("c_proj",)), "gpt_neo"),
    (Architecture(_QV, (), _QV, ("fc_out",)), "gptj"),
    (_LLAMA, "llama mistral"),
    (replace(_QWEN, stacks=()), "llama4"),
    (Architecture(_QV, (), _KV, ("w2",)), "mixtral"),
    (Architecture(("Wqkv",)), "modernbert mpt"),
    (Architecture(("q", "v"), (_MPNET_BLOCKS,)), "mpnet"),
    (replace(_T5, scaled_outputs=("k", "v", "wi_1"), scaled_inputs=()), "mt5"),
    (Architecture(("q_proj", "k_proj", "v_proj", "o_proj")), "nemotron_h"),
    (Architecture(_QV, (_OLMO_BLOCKS,)), "olmo2"),
    (Architecture(_QV, (), ("q_proj", "k_proj"), ("fc2",), last_in_feed_forward=r".*layers\.\d+\.fc2"), "opt"),
    (Architecture((*_QV, "fc1", "fc2"), (), _QV, ("fc2",)), "phi"),
    (Architecture(("qkv_proj",), (_LLAMA_BLOCKS,)), "phi3"),
    (Architecture(("key", "value", "receptance", "output")), "rwkv"),
    (Architecture(("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")), "rwkv7"),
    (Architecture(_QV, (_LLAMA_BLOCKS,)), "smollm3"),
    (_T5, "t5"),
    (Architecture(_VISION, (_VIT_BLOCKS,)), "vit"),
)

ARCHITECTURES = {name: architecture for architecture, names in _FAMILIES for name in names.split()}
"""``model_type`` → what is known. Attention targets and (IA)³'s are those of Hugging Face PEFT where it has any."""
