"""Names of Hugging Face PEFT that this library does not have, and what to use instead."""

from __future__ import annotations

import re

__all__ = ["ABSENT", "absent", "without"]

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
    r"bloom_model_postprocess_past_key_value|map_cache_to_layer_device_map|_prepare_prompt_learning_config": _PROMPTS,
    r"TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": _PROMPTS,
    r"TRANSFORMERS_MODELS_TO_\w+_MAPPING": _METHOD,
    r"get_gptqmodel_quant_linear|get_quantization_\w+|quantization_extra_repr|resolve_quantization_backend": _QUANTISED,
    r"register_peft_method": "use peanut.protocols.register on the method's class",
    r"_set_trainable|set_additional_trainable_modules": _INNER,
}
"""Patterns of names, each with the reason."""


_HOOKS = "prompts are put before the input by hooks; get_prompt_embedding_to_save(name) gives what is trained"
_ALLOCATES = "AdaLoRA's schedule follows the optimizer's steps by itself, and save_pretrained cuts the ranks"
_STARTED = "the config says how an adapter starts: add it anew with another init_lora_weights"
_FIELD = "it is in the adapter's config: model.peft_config[name]"
_CASTS = "inputs are never cast up, so there is nothing to switch off"
_ATTRIBUTES = {
    "base_model_prepare_inputs_for_generation": "call prepare_inputs_for_generation, which is the base model's",
    "prompt_tokens": _HOOKS,
    "transformer_backbone_name": "the base model is get_base_model(), and its decoder get_base_model().get_decoder()",
    "set_modules_to_save": "name them in the config's modules_to_save, before get_peft_model",
    "rankallocator": _ALLOCATES,
    "trainable_adapter_name": "several adapters may be trained; requires_grad of their parameters tells which are",
    "resize_modules_by_rank_pattern": _ALLOCATES,
    "resize_state_dict_by_rank_pattern": _ALLOCATES,
    "subtract_mutated_init": "the base keeps its weights here, so save_pretrained has nothing to subtract",
    "target_module_mapping": "it is peanut.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING and the like",
    **dict.fromkeys(("corda_init", "lora_ga_init", "loftq_init", "mica_init"), _START),
    **dict.fromkeys(("olora_init", "orthogonal_init", "pissa_init", "reset_lora_parameters"), _STARTED),
    **dict.fromkeys(("lora_variant", "lora_variants", "resolve_lora_variant"), _VARIANT),
    **dict.fromkeys(("fan_in_fan_out", "lora_dropout"), _FIELD),
    "is_target_conv_1d_layer": "layer.frozen.kind tells how the layer stores its weight",
    "cast_input_dtype_enabled": _CASTS,
    "ephemeral_gpu_offload": "tensors follow the base's device",
    "frozen_peft_weight_names": "the requires_grad of a parameter tells whether it is trained",
    "kwargs": _FIELD,
    "quantization_backend": _QUANTISED,
    "set_base_weight": "write into base_layer.weight",
    "update_layer": "call add_adapter of the model",
}
"""Attributes of a model, of its ``base_model`` and of a layer with adapters, each with the reason."""


def without(owner: object, name: str) -> AttributeError | None:
    """The error for an attribute that Hugging Face PEFT has there and we have not, ``None`` if neither has."""
    reason = _ATTRIBUTES.get(name)
    return None if reason is None else AttributeError(f"{type(owner).__name__!r} has no attribute {name!r}: {reason}")


def absent(name: str) -> str | None:
    """Why there is no such name here, ``None`` if Hugging Face PEFT has none either."""
    return next((reason for pattern, reason in ABSENT.items() if re.fullmatch(pattern, name)), None)
