"""Every method on a Llama of one small layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from peanut import FullConfig, LinearProbingConfig, LoraConfig, PartialConfig, PeftModel, get_peft_model
from peanut.methods.adaption_prompt import AdaptionPromptConfig
from peanut.methods.bottleneck import BottleneckConfig
from peanut.methods.direft import DireftConfig
from peanut.methods.loreft import LoreftConfig
from peanut.methods.xlora import XLoraConfig
from peanut.protocols import METHODS, PeftConfig, WeightMethod

from ..prompts import FORMS, Kind
from ..support import randomised
from ..variants import VARIANTS, Variant

__all__ = ["ADAPT", "IDS", "adapted_llama", "config_of", "generated", "llama"]

IDS = torch.tensor([[3, 7, 11, 5], [4, 9, 6, 8], [10, 3, 12, 7]])
TARGETS = {"linear": ["q_proj", "down_proj"], "norm": ["input_layernorm"], "embedding": ["embed_tokens"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "OFT": {"oft_block_size": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 7, 9, 4]},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "BITFIT": {"target_modules": ["q_proj"]},
}
"""Where the first variant of a method does not fit."""
SIZES = {"vocab_size": 16, "hidden_size": 12, "intermediate_size": 24, "max_position_embeddings": 32}
_made: list[Any] = []


def llama(layers: int = 1) -> Any:
    """The same random model at every call, in eval mode and float64."""
    if len(_made) == 0 or layers != 1:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = hf.LlamaConfig(
                **SIZES,
                num_hidden_layers=layers,
                num_attention_heads=2,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                initializer_range=0.4,
                attention_bias=True,
            )
            model = hf.LlamaForCausalLM(config).double().eval()
        if layers != 1:
            return model
        _made.append(model)
    return copy.deepcopy(_made[0])


def config_of(method: str) -> PeftConfig:
    """A config of a method that changes weights, for the Llama."""
    kind = METHODS[method].kinds[0]  # type: ignore[attr-defined]
    kind = kind if kind in TARGETS else "linear"
    variant = next(v for v in VARIANTS.get(method, [Variant()]) if v.kinds is None or kind in v.kinds)
    options = OPTIONS.get(method, variant.options)
    return METHODS[method].config_class(**{"target_modules": TARGETS[kind], "task_type": "CAUSAL_LM"} | options)


def _xlora(base: Any) -> PeftModel:
    for name in ("a", "b"):
        get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS["linear"]), name)
    config = XLoraConfig(enable_softmax=False, use_trainable_adapters=True, hidden_size=SIZES["hidden_size"])
    return get_peft_model(base, config)


def _with(config: Callable[[], PeftConfig]) -> Callable[[Any], PeftModel]:
    return lambda base: get_peft_model(base, config())


ADAPT: dict[str, Callable[[Any], PeftModel]] = {
    name: _with(lambda name=name: config_of(name))
    for name, own in METHODS.items()
    if isinstance(own, WeightMethod) and own.kinds
}
"""What puts a method's adapter into the Llama, for every method."""
ADAPT |= {
    "FULL": _with(lambda: FullConfig(task_type="CAUSAL_LM")),
    "PARTIAL": _with(lambda: PartialConfig(target_modules=["mlp"])),
    "LINEAR_PROBING": _with(lambda: LinearProbingConfig(modules_to_save=["lm_head"])),
    "BOTTLENECK": _with(lambda: BottleneckConfig(bottleneck_size=4, init_weights="mam")),
    "LOREFT": _with(lambda: LoreftConfig(r=3, positions=2)),
    "DIREFT": _with(lambda: DireftConfig(r=3, positions=2)),
    "ADAPTION_PROMPT": _with(lambda: AdaptionPromptConfig(adapter_len=3, adapter_layers=1)),
    "XLORA": _xlora,
}
_KIND = Kind("Llama", "ForCausalLM")
for _form in FORMS:
    if _form.method != "CPT":
        ADAPT[str(_form)] = _with(lambda form=_form: form.config(_KIND))
_CPT = {"cpt_token_ids": [5, 9, 12], "cpt_tokens_type_mask": [1, 2, 4], "task_type": "CAUSAL_LM"}
_CPT |= {"opt_projection_epsilon": 90.0, "opt_projection_format_epsilon": 90.0}  # far enough to write to
ADAPT["CPT"] = _with(lambda: METHODS["CPT"].config_class(**_CPT))


def adapted_llama(name: str) -> PeftModel:
    """The Llama with a random adapter of a method, in eval mode."""
    model: PeftModel = randomised(ADAPT[name](llama()), scale=0.3)
    return model.eval()


def generated(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    """The logits of three tokens that are generated, (batch, 3, vocabulary)."""
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    found = model.generate(input_ids=ids, return_dict_in_generate=True, output_logits=True, **options, **more)
    return torch.stack(found.logits, dim=1)
