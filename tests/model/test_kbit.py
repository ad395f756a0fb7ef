"""Quantised bases of bitsandbytes on the CPU: NF4 with double quantisation, FP4, and LLM.int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from peanut import (
    IA3Config,
    LoraConfig,
    MultiplicativeLoraConfig,
    OFTConfig,
    PartialConfig,
    PeanutConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peanut.lab.measure import saved_bytes
from peanut.model.layers.layer import AdaptedLayer
from peanut.weights import FrozenLayer, kind_of

from ..support import distance, gradients, one_thread, randomised, refused, same_bits  # noqa: F401

pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch, of its own doing

QUANTISED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
LAYERS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "LORA": LoraConfig(r=4, target_modules=LAYERS),
    "DORA": LoraConfig(r=4, use_dora=True, target_modules=LAYERS),
    "PEANUT": PeanutConfig(r=4, depth=1, act_fn="gelu", target_modules=LAYERS),
    "OFT": OFTConfig(oft_block_size=16, target_modules=LAYERS),
    "IA3": IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
}
IDS = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(0))

Base = Callable[..., hf.PreTrainedModel]
every_base = pytest.mark.parametrize("quantised", QUANTISED)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def base(tmp_path: Path, tiny_llama: Callable[..., hf.PreTrainedModel]) -> Base:
    """``base("nf4")``: a tiny Llama from a local folder, quantised as it is loaded; options are BitsAndBytes'.

    On some processors the first evaluation packs 4-bit codes anew, in place and with scales in bfloat16, for a product
    that has no gradient. With ``repacks=False`` it does not, so that results are the same on every processor.
    """
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def load(
        quantised: str, dtype: torch.dtype = torch.float32, repacks: bool = False, **options: Any
    ) -> hf.PreTrainedModel:
        chosen = hf.BitsAndBytesConfig(**QUANTISED[quantised] | options)
        found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=chosen, dtype=dtype)
        for module in found.modules() if not repacks else ():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return found.eval()

    return load


def layers(model: PeftModel) -> dict[str, AdaptedLayer]:
    return dict(model.adapters.layers())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def codes(model: PeftModel) -> dict[str, tuple[Tensor, ...]]:
    """Copies of all that a layer's codes are: the codes, and their scales."""
    found = {}
    for path, layer in layers(model).items():
        weight: Any = layer.base_layer.weight
        if hasattr(weight, "quant_state"):
            state = weight.quant_state
            nested = (state.offset, state.state2.absmax) if state.nested else ()
            found[path] = tuple(part.clone() for part in (weight.data, state.absmax, *nested))
        else:
            scales = layer.base_layer.state.SCB if weight.SCB is None else weight.SCB
            found[path] = (weight.data.clone(), scales.clone())
    return found


def weights(model: PeftModel) -> dict[str, Any]:
    return {path: layer.base_layer.weight for path, layer in layers(model).items()}


def equal(found: dict[str, tuple[Tensor, ...]], expected: dict[str, tuple[Tensor, ...]]) -> bool:
    pairs = [(a, b) for path, parts in expected.items() for a, b in zip(found[path], parts, strict=True)]
    return found.keys() == expected.keys() and all(same_bits(a, b) for a, b in pairs)


# What is kept


@pytest.mark.parametrize("name", ["PEANUT", "DORA", "MULTIPLICATIVE"])
@every_base
def test_the_numbers_that_codes_stand_for_are_not_kept(quantised: str, name: str, base: Base) -> None:
    config = CONFIGS.get(name) or MultiplicativeLoraConfig(r=4, target_modules=LAYERS)
    model = randomised(get_peft_model(base(quantised), config))
    layer = layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(2, 128, requires_grad=True)
    for _ in range(2):  # the second finds W Aᵀ made
        layer.train()(x).sum().backward()
        own = [*layer.parameters(), *layer.buffers()]
        assert saved_bytes(lambda: layer(x), [layer], own) < 128 * 64 * 4 / 2  # W in float32, (64, 128)
    with torch.no_grad():
        kept = layer.eval().change(model.active_adapter).delta
    assert all(value.numel() < 128 * 64 for value in vars(kept).values() if isinstance(value, Tensor))


# Made ready


@every_base
def test_what_is_not_quantised_is_frozen_in_float32(quantised: str, base: Base) -> None:
    found = base(quantised, torch.bfloat16)
    before = {name: p.detach().clone() for name, p in found.named_parameters()}
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16, torch.int8 if quantised == "int8" else torch.uint8}
    assert prepare_model_for_kbit_training(found) is found
    assert found.is_activation_checkpointing
    for name, parameter in found.named_parameters():
        assert not parameter.requires_grad
        wide = before[name].float() if before[name].is_floating_point() else before[name]
        assert same_bits(parameter.detach(), wide)


def test_codes_stored_as_bfloat16_stay_codes(base: Base) -> None:
    """What FSDP needs: codes in a floating-point storage, which are no numbers to be widened."""
    found = base("nf4", bnb_4bit_quant_storage=torch.bfloat16)
    expected = logits(found)
    assert found.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    prepare_model_for_kbit_training(found, use_gradient_checkpointing=False)
    assert found.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert same_bits(logits(found), expected)


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointing_changes_no_gradient(options: dict[str, Any] | None, base: Base) -> None:
    found = []
    for checkpointing in (False, True):
        ready = prepare_model_for_kbit_training(base("nf4"), checkpointing, options)
        assert ready.is_activation_checkpointing == checkpointing
        torch.manual_seed(1)
        model = randomised(get_peft_model(ready, CONFIGS["LORA"])).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(gradients(model))
    assert len(found[0]) == 2 * 3 * 2
    assert found[0].keys() == found[1].keys()
    assert all(distance(grad, found[0][name]) < 1e-5 for name, grad in found[1].items())


# Adapters


@every_config
@every_base
def test_one_step_trains_the_adapter_alone(quantised: str, config: PeftConfig, base: Base) -> None:
    plain = base(quantised)
    expected = logits(plain)
    model = get_peft_model(prepare_model_for_kbit_training(plain), config).eval()
    before, trained = codes(model), [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert same_bits(logits(model), expected) or distance(logits(model), expected) < (
        1e-2 if quantised == "int8" else 1e-5
    )
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
        assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert equal(codes(model), before)
    model.eval()
    assert distance(logits(model), expected) > 0.02
    with model.disable_adapter():
        assert same_bits(logits(model), expected)


@every_config
@every_base
def test_changes_are_those_of_the_numbers_that_the_codes_stand_for(
    quantised: str, config: PeftConfig, base: Base, tmp_path: Path
) -> None:
    model = randomised(get_peft_model(base(quantised), config), scale=0.1).eval()
    model.save_pretrained(tmp_path / "adapter")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        for path, module in base(quantised).named_modules():
            kind = kind_of(module)
            if kind is not None and kind.quantised:
                plain.get_submodule(path).weight.copy_(FrozenLayer(module, kind).matrix())
    dense = PeftModel.from_pretrained(plain, tmp_path / "adapter", check_base=False).eval()
    for path, layer in layers(model).items():
        assert distance(layer.delta("default"), layers(dense)[path].delta("default")) < 1e-5
    # LLM.int8 rounds activations, too.
    assert distance(logits(model), logits(dense)) < (0.05 if quantised == "int8" else 1e-4)


@pytest.mark.parametrize("quantised", ["nf4", "fp4"])
def test_evaluating_the_base_first_changes_nothing(quantised: str, base: Base) -> None:
    # Where the processor has the instructions for it, the first evaluation packs the codes anew.
    torch.manual_seed(1)
    expected = randomised(get_peft_model(base(quantised), CONFIGS["PEANUT"]), scale=0.1)
    found = base(quantised, repacks=True)
    logits(found)
    torch.manual_seed(1)
    model = randomised(get_peft_model(found, CONFIGS["PEANUT"]), scale=0.1).eval()
    for _ in range(2):
        for path, layer in layers(model).items():
            assert distance(layer.delta("default"), layers(expected)[path].delta("default")) < 0.02
        logits(model)
    # Training still reaches every layer, also those below quantised ones.
    for one in (model, expected):
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
    wanted = gradients(expected)
    assert gradients(model).keys() == wanted.keys()
    assert all(distance(grad, wanted[name]) < 0.1 for name, grad in gradients(model).items())


@pytest.mark.parametrize(
    "config",
    [PartialConfig(target_modules=["q_proj"]), LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"])],
    ids=["PARTIAL", "modules_to_save"],
)
@every_base
def test_codes_cannot_be_trained_whole(quantised: str, config: PeftConfig, base: Base) -> None:
    model = base(quantised)
    with refused(model, r"'model.layers.0.self_attn.q_proj'"):
        get_peft_model(model, config)


# Merged


def half_step(quantised: str, matrix: Tensor) -> Tensor:
    """How far the nearest code may be from each entry of a matrix (out, in)."""
    if quantised == "int8":
        return (0.5 / 127 + 2**-10) * matrix.abs().amax(1, keepdim=True).expand_as(matrix)
    # NF4's widest gap is from -1 to -0.696, FP4's from 2/3 to 1, in units of a block's largest entry. That entry is
    # rounded as well where scales are quantised again, by up to a share of the largest of all.
    blocks = matrix.reshape(-1, 64)
    gap = (0.153 if quantised == "nf4" else 0.168) * blocks.abs().amax(1, keepdim=True)
    gap = gap + 0.02 * matrix.abs().max() if quantised == "nf4" else gap
    return gap.expand_as(blocks).reshape(matrix.shape)


@every_config
@every_base
def test_merged_is_the_nearest_code_and_unmerged_the_same_bits(quantised: str, config: PeftConfig, base: Base) -> None:
    model = randomised(get_peft_model(base(quantised), config), scale=0.2).eval()
    expected, before, own = logits(model), codes(model), weights(model)
    wanted = {path: layer.frozen.matrix() + layer.delta("default") for path, layer in layers(model).items()}
    with model.disable_adapter():
        plain = logits(model)
    model.merge_adapter()
    for path, layer in layers(model).items():
        merged = layer.frozen.kind.matrix(layer.base_layer, layer.base_layer.weight)
        assert distance(merged, layer.frozen.matrix()) > 0.01
        assert ((merged - wanted[path]).abs() <= half_step(quantised, wanted[path])).all()
    ratio = distance(logits(model), expected) / distance(plain, expected)
    assert ratio < (0.05 if quantised == "int8" else 0.5)  # of the adapter's own effect
    with model.disable_adapter():
        assert same_bits(logits(model), plain)
    model.unmerge_adapter()
    assert equal(codes(model), before)
    assert all(weight is own[path] for path, weight in weights(model).items())
    assert same_bits(logits(model), expected)


@every_base
def test_merged_for_good_the_model_is_quantised_and_plain(quantised: str, base: Base) -> None:
    model = randomised(get_peft_model(base(quantised), CONFIGS["LORA"]), scale=0.1).eval()
    model.merge_adapter()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not [name for name, module in merged.named_modules() if isinstance(module, AdaptedLayer)]
    assert type(merged.model.layers[0].self_attn.q_proj) is type(base(quantised).model.layers[0].self_attn.q_proj)
    assert same_bits(logits(merged), expected)


# Files


@every_config
@every_base
def test_saved_and_loaded_on_the_same_quantised_base(
    quantised: str, config: PeftConfig, base: Base, tmp_path: Path
) -> None:
    model = randomised(get_peft_model(base(quantised), config), scale=0.1).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(quantised), tmp_path / "adapter").eval()
    assert same_bits(logits(again), logits(model))
