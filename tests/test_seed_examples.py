"""Examples and signatures from documents that describe methods for users: they run as written, but for the import."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import peanut
from peanut import PeftModel, VariationalLoraConfig

from .support import distance, gradients, one_thread, randomised, same_bits  # noqa: F401

Builder = Callable[..., hf.PreTrainedModel]
IDS = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def assert_trains(model: PeftModel, base: hf.PreTrainedModel, silent: bool = True) -> None:
    """A new adapter changes nothing, has a gradient everywhere, and a step of it changes the output."""
    assert not silent or distance(logits(model.eval()), logits(base)) < 1e-5
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(gradients(model)) == trained
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0).step()
    assert distance(logits(model.eval()), logits(base)) > 1e-3


# Orthogonal, gains, random projections, norms


def test_oft_on_gpt2(tmp_path: Path, tiny_gpt2: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    # "gpt2" is a folder here: a GPT-2 of the real width, one block deep.
    tiny_gpt2(n_embd=768, n_inner=None, n_head=12, n_layer=1).save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)

    from transformers import AutoModelForCausalLM

    from peanut import OFTConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained("gpt2")

    oft_config = OFTConfig(
        r=8,
        target_modules=["c_attn", "c_proj"],
        module_dropout=0.05,
        task_type="CAUSAL_LM",
    )

    peft_model = get_peft_model(model, oft_config)

    shapes = {path: layer.values("default")["oft_R.weight"].shape for path, layer in peft_model.adapters.layers()}
    assert shapes == {
        "transformer.h.0.attn.c_attn": (8, 96 * 95 // 2),
        "transformer.h.0.attn.c_proj": (8, 96 * 95 // 2),
        "transformer.h.0.mlp.c_proj": (8, 384 * 383 // 2),
    }
    assert_trains(peft_model, AutoModelForCausalLM.from_pretrained("gpt2"))


def test_ia3(tiny_llama: Builder) -> None:
    model = tiny_llama()
    from peanut import IA3Config, get_peft_model

    ia3_config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )

    peft_model = get_peft_model(model, ia3_config)

    shapes = {path[15:]: tuple(layer.values("default")["ia3_l"].shape) for path, layer in peft_model.adapters.layers()}
    assert shapes == {"self_attn.k_proj": (16, 1), "self_attn.v_proj": (16, 1), "mlp.down_proj": (1, 64)}
    assert_trains(peft_model, tiny_llama())


def test_vera(tiny_llama: Builder) -> None:
    model = tiny_llama()
    from peanut import VeraConfig, get_peft_model

    vera_config = VeraConfig(
        r=256,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        projection_prng_key=42,
        vera_dropout=0.1,
        d_initial=0.1,
        task_type="CAUSAL_LM",
    )

    peft_model = get_peft_model(model, vera_config)

    assert len(list(peft_model.adapters.layers())) == 8
    assert peft_model.get_nb_trainable_parameters()[0] == 2 * (4 * 256 + 32 + 16 + 16 + 32)
    assert_trains(peft_model, tiny_llama())


def test_layer_norms(tiny_llama: Builder) -> None:
    model = tiny_llama()
    from peanut import LNTuningConfig, get_peft_model

    ln_config = LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm"],
        task_type="CAUSAL_LM",
    )

    peft_model = get_peft_model(model, ln_config)

    assert peft_model.get_nb_trainable_parameters()[0] == 2 * 2 * 32
    assert_trains(peft_model, tiny_llama())


# A quantised base; a merged adapter


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch, of its own doing
def test_qlora(tmp_path: Path, tiny_llama: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from peanut import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    def setup_qlora(model_name: str, rank: int = 64):
        """QLoRA setup"""

        # 4-bit quantization config
        bnb_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",  # Normal Float 4
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,  # Double quantization
        )

        # Load model
        model = AutoModelForCausalLM.from_pretrained(
            model_name,
            quantization_config=bnb_config,
            device_map="auto",
            trust_remote_code=True,
        )

        # Prepare for kbit training
        model = prepare_model_for_kbit_training(model)

        # LoRA config
        lora_config = LoraConfig(
            r=rank,
            lora_alpha=rank * 2,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        )

        model = get_peft_model(model, lora_config)

        # Check trainable parameters
        trainable_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        all_params = sum(p.numel() for p in model.parameters())
        print(f"Trainable: {trainable_params:,} / {all_params:,} ({100 * trainable_params / all_params:.2f}%)")

        return model

    model = setup_qlora(str(tmp_path))

    attention, feed_forward = (64 + 64) + 2 * (64 + 32) + (64 + 64), 3 * (64 + 128)
    assert f"Trainable: {2 * 64 * (attention + feed_forward):,} / " in capsys.readouterr().out
    codes = [p.clone() for p in model.parameters() if p.dtype == torch.uint8]
    assert len(codes) == 2 * 7
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    after = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert all(same_bits(a, b) for a, b in zip(after, codes, strict=True))


def test_load_and_merge(tmp_path: Path, tiny_llama: Builder) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    config = peanut.LoraConfig(r=4, task_type="CAUSAL_LM")
    adapted = randomised(peanut.get_peft_model(tiny_llama(), config), scale=0.1).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    from transformers import AutoModelForCausalLM

    def load_and_merge_adapter(base_model_name: str, adapter_path: str):
        """Load and merge adapter"""
        from peanut import PeftModel

        # Base model
        base_model = AutoModelForCausalLM.from_pretrained(base_model_name)

        # Load adapter
        model = PeftModel.from_pretrained(base_model, adapter_path)

        # Merge (for inference speed improvement)
        merged_model = model.merge_and_unload()

        return merged_model  # noqa: RET504

    merged = load_and_merge_adapter(str(tmp_path / "base"), str(tmp_path / "adapter"))

    assert type(merged) is hf.LlamaForCausalLM
    assert merged.state_dict().keys() == tiny_llama().state_dict().keys()
    assert distance(logits(adapted), logits(tiny_llama())) > 0.01
    assert distance(logits(merged), logits(adapted)) < 1e-5


# Signatures


SHARED = {"target_modules": None, "modules_to_save": None}
BLOCKS = {"layers_to_transform": None, "layers_pattern": None}
SIGNATURES: dict[str, dict[str, Any]] = {
    "Poly": {"r": 8, "poly_type": "poly", "n_tasks": 1, "n_skills": 4, "n_splits": 1, **SHARED},
    "OFT": {
        "r": 8,
        "module_dropout": 0.0,
        "init_weights": True,
        "coft": False,
        "eps": 6e-5,
        "block_share": False,
        **SHARED,
        **BLOCKS,
    },
    "BOFT": {
        "boft_block_size": 4,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": 1,
        "boft_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_weights": True,
        **SHARED,
        **BLOCKS,
    },
    "IA3": {"feedforward_modules": None, "fan_in_fan_out": False, "init_ia3_weights": True, **SHARED},
    "Vera": {"r": 256, "target_modules": None, "projection_prng_key": 0, "vera_dropout": 0.0, "d_initial": 0.1},
    "LNTuning": SHARED,
    "FourierFT": {"n_frequency": 1000, "scaling": 300.0, **SHARED},
    "Bone": {"r": 8, **SHARED},
    "VBLoRA": {"vb_r": 8, "vb_pi": 0.5, "vb_beta": 1.0},
}
"""The keywords of each method's config with their defaults."""
WITHOUT: dict[str, dict[str, Any]] = {
    "HRA": {},
    "Miss": {"r": 4},
    "RandLora": {},
    "Shira": {"r": 2},
    "C3A": {"block_size": 8},
    "TrainableTokens": {"token_indices": IDS[0].unique().tolist()},
}
"""Methods that are named without a signature, with what a model of this size needs."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_defaults_are_those_of_the_signature(name: str) -> None:
    config_class = getattr(peanut, f"{name}Config")
    given = config_class(**SIGNATURES[name])
    assert given == (VariationalLoraConfig() if name == "VBLoRA" else config_class())
    for field in dataclasses.fields(given):
        if field.name in SIGNATURES[name]:
            assert getattr(given, field.name) == SIGNATURES[name][field.name]


@pytest.mark.parametrize("name", [*SIGNATURES, *WITHOUT])
def test_models_take_a_config_and_a_name(name: str, tiny_llama: Builder) -> None:
    base = tiny_llama(num_key_value_heads=4)
    options = SIGNATURES[name] if name in SIGNATURES else WITHOUT[name]
    config = getattr(peanut, f"{name}Config")(**options)
    model = getattr(peanut, f"{name}Model")(base, config, "first")
    assert model.model is base
    assert list(model.adapters.configs) == ["first"]
    assert model.adapters.state.active == ["first"]
    silent = name not in ("FourierFT", "C3A", "VBLoRA")
    expected = logits(tiny_llama(num_key_value_heads=4))
    assert not silent or distance(logits(model.eval()), expected) < 1e-5
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert set(gradients(model)) == {key for key, p in model.named_parameters() if p.requires_grad}
    randomised(base)
    assert distance(logits(model), expected) > 1e-3


# Mixtures


def test_xlora_over_several_loras(tmp_path: Path, tiny_gpt2: Builder) -> None:
    sizes = {"n_embd": 768, "n_inner": None, "n_head": 12, "n_layer": 1}
    for number in range(3):
        one = peanut.get_peft_model(tiny_gpt2(**sizes), peanut.LoraConfig(r=2, target_modules=["c_attn"]))
        randomised(one, scale=0.1 * (number + 1)).save_pretrained(tmp_path / str(number))

    model = PeftModel.from_pretrained(tiny_gpt2(**sizes), tmp_path / "0")
    model.load_adapter(tmp_path / "1", "poems")
    model.load_adapter(tmp_path / "2", "law")

    from peanut import XLoraConfig, get_peft_model

    xlora_config = XLoraConfig(
        hidden_size=768,
        xlora_size=64,
        xlora_depth=2,
        layernorm_type="rms",
        xlora_dropout_p=0.1,
        task_type="CAUSAL_LM",
    )

    # Load multiple LoRA adapters first, then apply X-LoRA
    peft_model = get_peft_model(model, xlora_config)

    assert peft_model.active_adapters == ["xlora"]
    assert peft_model.peft_config["xlora"].adapters == {"default": None, "law": None, "poems": None}
    assert peft_model.get_nb_trainable_parameters()[0] == 768 * 64 + 64 * 3
    assert_trains(peft_model, tiny_gpt2(**sizes), silent=False)
    texts = peft_model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    peft_model.save_pretrained(tmp_path / "whole")
    again = PeftModel.from_pretrained(tiny_gpt2(**sizes), tmp_path / "whole/xlora")
    assert same_bits(logits(again), logits(peft_model))
    assert texts.shape == (2, 11)


def test_defaults_of_mixtures_are_those_of_the_signatures() -> None:
    from peanut import PolyConfig, XLoraConfig

    poly = {"r": 8, "target_modules": None, "modules_to_save": None, "poly_type": "poly", "n_tasks": 1}
    assert PolyConfig(**poly, n_skills=4, n_splits=1) == PolyConfig()
    gate = {"xlora_depth": 1, "xlora_size": 2048, "enable_softmax": True, "softmax_temperature": 1.0}
    more = {"layernorm_type": "rms", "use_bias": False, "xlora_dropout_p": 0.2}
    assert XLoraConfig(hidden_size=768, **gate, **more) == XLoraConfig(hidden_size=768)
