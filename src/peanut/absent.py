"""Public names of Hugging Face PEFT that this library does not have, and what to use instead."""

from __future__ import annotations

import re

__all__ = ["ABSENT", "absent"]

_METHOD = "it belongs to a method that this library does not have; use LoraConfig, PeanutConfig or another of its own"
_START = (
    "it belongs to a start of LoRA that this library does not have; use init_lora_weights='pissa', 'milora' or 'olora'"
)
_VARIANT = "it belongs to a variant of LoRA that this library does not have; use a plain LoraConfig"
_PROMPTS = "methods here compute prompts themselves; use get_peft_model with the method's config"
_QUANTISED = "quantised layers are read by their own library here; nothing has to be called"
_INNER = "it is an inner part of Hugging Face PEFT; use get_peft_model or set_adapter"
_METHODS = (
    "Adamss Beft Cartridge Deft Delora Frod Glora Gralora Hira Lily LoHa MultitaskPromptTuning OSF Psoft Pvera Shadow "
    "Supertuning TinyLora UniLora WaveFT"
)

ABSENT = {
    rf"(?:{_METHODS.replace(' ', '|')})(?:Config|Model)": _METHOD,
    r"CartridgeEncoder|compose_cartridge_adapters|initialize_kv_prefix_from_\w+": _METHOD,
    r"MultitaskPrompt(?:TuningInit|Embedding)": _METHOD,
    r"prompt_embeddings_from_past_key_values": _METHOD,
    r"(?:Arrow|BdLora|Kasa|Montecl?ora|Velora)Config|MontecloraTrainerMixin|create_arrow_model": _VARIANT,
    r"(?:Eva|Corda|LoftQ|LoraGA)Config|get_eva_state_dict|initialize_lora_eva_weights|preprocess_loraga": _START,
    r"replace_lora_weights_loftq": _START,
    r"(?:CPT|Prompt)Embedding|P(?:refix|rompt)Encoder": _PROMPTS,
    r"bloom_model_postprocess_past_key_value|map_cache_to_layer_device_map|_prepare_prompt_learning_config": _PROMPTS,
    r"TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": _PROMPTS,
    r"TRANSFORMERS_MODELS_TO_\w+_MAPPING": _METHOD,
    r"get_gptqmodel_quant_linear|get_quantization_\w+|quantization_extra_repr|resolve_quantization_backend": _QUANTISED,
    r"find_kappa_target_modules|KappaTuneSelector": "it chooses no layers; name them in target_modules",
    r"DoraCaching": "it is not needed: within model.inference() evaluation computes DoRA's norms once",
    r"disable_input_dtype_casting": "it is not needed: inputs are never cast up",
    r"register_peft_method": "use peanut.protocols.register on the method's class",
    r"TrainableTokensWrapper|LoraLayer|_set_trainable|set_additional_trainable_modules": _INNER,
}
"""Patterns of names, each with the reason."""


def absent(name: str) -> str | None:
    """Why there is no such name here, ``None`` if Hugging Face PEFT has none either."""
    return next((reason for pattern, reason in ABSENT.items() if re.fullmatch(pattern, name)), None)
