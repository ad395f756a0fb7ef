"""Values that only a model shows to be wrong: refused with the value and the layer, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

from peanut import (
    AdaLoraConfig,
    BitFitConfig,
    BOFTConfig,
    BoneConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PartialConfig,
    PeanutError,
    PeftConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    get_peft_model,
)

from .support import one_thread, refused  # noqa: F401


class Mixed(nn.Module):
    """One layer of each kind, the widths 12, 20 and 6."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 12)
        self.wide = nn.Linear(12, 20)
        self.bare = nn.Linear(20, 6, bias=False)
        self.turned = Conv1D(6, 20)
        self.image = nn.Conv2d(4, 10, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2)


def on(layer: str, config_class: type[PeftConfig], **options: Any) -> PeftConfig:
    return config_class(target_modules=[layer], **options)


def mask_of_all(module: nn.Module, r: int) -> torch.Tensor:
    return torch.ones(20, 12)


CASES: list[tuple[PeftConfig, str]] = [
    # Ranks and blocks
    (
        on("wide", LoraConfig, r=13, init_lora_weights="pissa"),
        r"r=13 with .*'pissa' for 'wide', whose weight is 20 × 12",
    ),
    (on("bare", LoraConfig, r=7, init_lora_weights="olora"), r"r=7 with .*'olora' for 'bare', whose weight is 6 × 20"),
    (
        on("turned", LoraConfig, rank_pattern={"turned": 8}, r=2, init_lora_weights="milora"),
        r"r=8 with .*'milora' for 'turned', whose weight is 6 × 20",
    ),
    (on("wide", LoraConfig, lora_alpha=0, init_lora_weights="pissa"), r"lora_alpha=0 with .*'pissa' for 'wide'"),
    (on("wide", HRAConfig, r=13), r"r=13 reflections for 'wide', whose input has 12 features"),
    (on("wide", OFTConfig, r=5), r"r=5 for 'wide', whose input has 12 features.*4 and 6"),
    (on("bare", OFTConfig, oft_block_size=8), r"oft_block_size=8 for 'bare', whose input has 20 features.*5 and 10"),
    (on("wide", OFTConfig, r=12), r"r=12 for 'wide', whose input has 12 features"),
    (on("image", OFTConfig, oft_block_size=5), r"oft_block_size=5 for 'image', whose input has 36 features"),
    (on("bare", BOFTConfig, boft_block_size=8), r"boft_block_size=8 for 'bare', whose input has 20 features"),
    (on("wide", BOFTConfig, boft_block_size=0, boft_block_num=5), r"boft_block_num=5 for 'wide'.* 12 features"),
    (on("wide", BOFTConfig, boft_n_butterfly_factor=3), r"boft_n_butterfly_factor=3 with 3 blocks of 4 for 'wide'"),
    (
        on("wide", C3AConfig, block_size=3),
        r"block_size=3 for 'wide' of 20×12; expected a divisor of both, that is of 4",
    ),
    (on("bare", C3AConfig, block_size=2, block_size_pattern={"bare": 4}), r"block_size=4 for 'bare' of 6×20"),
    (on("wide", MissConfig, r=13), r"r=13 for 'wide' with 12 inputs"),
    (on("wide", MissConfig, r=3, init_weights="bat"), r"r=3 with init_weights='bat' for 'wide' of 20×12"),
    (on("bare", MissConfig, r=4, mini_r=4, init_weights="mini"), r"mini_r=4 for 'bare' with 6 outputs"),
    (on("turned", BoneConfig, r=4, init_weights="bat"), r"r=4 with init_weights='bat' for 'turned' of 6×20"),
    (on("words", BoneConfig, r=12), r"r=12 for 'words' with 11 inputs"),
    (on("wide", VBLoRAConfig, vector_length=6), r"vector_length=6 for 'wide' of shape \(20, 12\)"),
    # Numbers of entries
    (on("wide", FourierFTConfig, n_frequency=241), r"n_frequency=241 for 'wide' of 20×12; expected at most 240"),
    (
        on("bare", FourierFTConfig, n_frequency=10, n_frequency_pattern={"ba.e": 121}),
        r"n_frequency=121 for 'bare' of 6×20; expected at most 120",
    ),
    (on("wide", ShiraConfig, r=8), r"r=8 trains 256 entries of 'wide', which has 20×12; expected r of at most 7"),
    (on("wide", ShiraConfig, r=2, mask_type="mine"), r"mask_type='mine' without a mask_fn"),
    (on("wide", ShiraConfig, r=2, mask_type="mine", mask_fn=mask_of_all), r"240 places of \(20, 12\) for 'wide'.* 64"),
    # Tokens
    (on("words", TrainableTokensConfig, token_indices=[2, 11]), r"token_indices holds 11, for 'words' of 11 tokens"),
    (on("words", TrainableTokensConfig, token_indices=[2, 2]), r"token_indices holds 2 twice, for 'words'"),
    (on("words", TrainableTokensConfig), r"token_indices is empty, for 'words'"),
    # Layers that a method has no use for
    (on("bare", BitFitConfig), r"'bare' \(20 → 6\) has no bias"),
    (on("words", BitFitConfig), r"target_modules matches 'words', a Embedding; expected layers of kind linear"),
    (on("norm", LoraConfig), r"target_modules matches 'norm', a LayerNorm; expected layers of kind linear"),
    (on("words", OFTConfig, r=5), r"r=5 for 'words', whose output has 12 features.*4 and 6"),
    (on("attention.out_proj", LoraConfig), r"'attention.out_proj' belongs to an nn.MultiheadAttention"),
    (on("grouped", IA3Config, feedforward_modules=["grouped"]), r"'grouped', a convolution in 2 groups"),
    (IA3Config(target_modules=".*e", feedforward_modules=["turned"]), r"feedforward_modules names 'turned'"),
    (on("wide", LoraConfig, modules_to_save=["wiide"]), r"modules_to_save names 'wiide'.*nearest: 'wide'"),
    (on("wide", PartialConfig, layers_to_transform=[0]), r"layers_to_transform names \[0\]"),
]


@pytest.mark.parametrize(("config", "message"), CASES, ids=[f"{c.method}-{i}" for i, (c, _) in enumerate(CASES)])
def test_what_does_not_fit_a_layer_is_refused(config: PeftConfig, message: str) -> None:
    model = Mixed()
    with refused(model, message):
        get_peft_model(model, config)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["wide", "turned"]))
    with refused(adapted, message):
        adapted.add_adapter("second", config)
    assert list(adapted.peft_config) == ["default"]


def test_feed_forward_modules_are_targets() -> None:
    with pytest.raises(PeanutError, match="feedforward_modules names 'turned'; expected names that are among") as error:
        IA3Config(target_modules=["wide", "bare"], feedforward_modules=["turned"])
    assert "\n" not in str(error.value)


def test_second_layer_that_does_not_fit_leaves_the_first_alone() -> None:
    model = Mixed()
    with refused(model, r"block_size=4 for 'bare' of 6×20"):
        get_peft_model(model, C3AConfig(target_modules=["wide", "bare"], block_size=4))


# In whole models


Builder = Callable[..., hf.PreTrainedModel]


def test_two_methods_of_one_adapter_on_one_layer(tiny_llama: Builder) -> None:
    model = tiny_llama()
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], trainable_token_indices=[3, 4])
    with refused(model, r"'model.embed_tokens' is a target of LORA and of TRAINABLE_TOKENS in one adapter"):
        get_peft_model(model, config)


@pytest.mark.parametrize("config_class", [LoraConfig, AdaLoraConfig])
def test_tokens_beyond_the_vocabulary_beside_a_method(config_class: type[PeftConfig], tiny_llama: Builder) -> None:
    model = tiny_llama()
    config = config_class(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 101]})
    with refused(model, r"token_indices holds 101, for 'model.embed_tokens' of 101 tokens"):
        get_peft_model(model, config)


def test_a_layer_inside_a_module_that_is_trained_whole(tiny_llama: Builder) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with refused(
        model, r"'model.layers.0.self_attn' is to be trained whole, and another adapter changes a layer in it"
    ):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["self_attn"]))


def test_defaults_that_do_not_fit_name_the_layer(tiny_llama: Builder) -> None:
    model = tiny_llama()
    with refused(model, r"n_frequency=1000 for 'model.layers.0.self_attn.v_proj' of 16×32; expected at most 512"):
        get_peft_model(model, FourierFTConfig())
    with refused(model, r"vector_length=256 for 'model.layers.0.self_attn.q_proj' of shape \(32, 32\)"):
        get_peft_model(model, VBLoRAConfig())
    with refused(model, r"block_size=256 for 'model.layers.0.self_attn.q_proj' of 32×32"):
        get_peft_model(model, C3AConfig())
    with refused(model, r"no default target_modules of BITFIT for LlamaForCausalLM"):
        get_peft_model(model, BitFitConfig())
