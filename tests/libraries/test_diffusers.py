"""Models and pipelines of diffusers take our adapters as they take Hugging Face PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peanut

from ..support import PEER_WARNINGS, one_thread  # noqa: F401

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    *PEER_WARNINGS,
    pytest.mark.usefixtures("installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Already found a `peft_config`"),
]

TARGETS = ["to_q", "to_v", "to_out.0"]


def unet() -> Any:
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return made.eval()


def dit() -> Any:
    torch.manual_seed(0)
    made = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
    )
    return made.eval()


@torch.no_grad()
def run(model: Any, **how: Any) -> Tensor:
    torch.manual_seed(1)
    x, context, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.randn(2, 8)
    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(x, 3, context, **({"cross_attention_kwargs": how} if how else {})).sample
    given = {"joint_attention_kwargs": how} if how else {}
    return model(x, context, pooled, torch.tensor([3, 3]), **given).sample


def with_two(build: Callable[[], Any], library: Any) -> Any:
    model = build()
    for name, r in (("a", 2), ("b", 3)):
        model.add_adapter(library.LoraConfig(r=r, lora_alpha=3, target_modules=TARGETS), name)
    generator = torch.Generator().manual_seed(5)
    for name, value in sorted(model.named_parameters()):
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.3
    return model


@pytest.mark.parametrize("build", [unet, dit])
def test_adapters_are_weighted_fused_and_disabled_as_there(build: Callable[[], Any]) -> None:
    base = run(build())

    def life(model: Any) -> list[Tensor]:
        seen = []
        model.set_adapters(["a", "b"], [0.5, 2.0])
        seen.append(run(model))
        model.set_adapters("a")
        seen += [run(model), run(model, scale=0.3), run(model)]
        model.disable_lora()
        assert torch.equal(run(model), base)
        model.enable_lora()
        model.set_adapters(["a", "b"], [0.5, 2.0])
        model.fuse_lora(lora_scale=0.7)
        seen += [run(model), run(model, scale=0.3)]
        model.unfuse_lora()
        seen.append(run(model))
        model.delete_adapters("a")
        assert (list(model.peft_config), model.active_adapters()) == (["b"], ["b"])
        return [*seen, run(model)]

    ours, theirs = life(with_two(build, peanut)), life(with_two(build, peft))
    assert len(ours) == len(theirs) == 8
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert not torch.allclose(one, base, atol=1e-3)


@pytest.mark.parametrize("build", [unet, dit])
def test_files_are_saved_and_loaded(build: Callable[[], Any], tmp_path: Path) -> None:
    model, base = with_two(build, peanut), run(build())
    model.set_adapters("a")
    expected = run(model)
    model.save_lora_adapter(tmp_path, adapter_name="a")
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="c")
    assert model.active_adapters() == ["c"]
    assert torch.equal(run(model), expected)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert list(model.peft_config) == ["a", "b", "c", "default_3"]
    model.unload_lora()
    assert torch.equal(run(model), base)
    model.add_adapter(peanut.PeanutConfig(r=2, init_weights=False, target_modules=TARGETS), "a")
    assert not torch.equal(run(model), base)
    fresh = build()  # by Hugging Face PEFT itself
    fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.allclose(run(fresh), expected, atol=1e-6)


def test_adapters_are_swapped_in_place(tmp_path: Path) -> None:
    expected = {}
    for name, r in (("one", 2), ("two", 4)):
        model = unet()
        model.add_adapter(peft.LoraConfig(r=r, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False), "a")
        expected[name] = run(model)
        model.save_lora_adapter(tmp_path / name, adapter_name="a")
    model = unet()
    model.enable_lora_hotswap(target_rank=5)
    model.add_adapter(peanut.PeanutConfig(r=2, target_modules=TARGETS), "ours")  # it is ours that swap
    model.load_lora_adapter(tmp_path / "one", prefix=None, use_safetensors=True, adapter_name="a")
    assert model.peft_config["a"].r == model.peft_config["ours"].r == 5
    assert torch.allclose(run(model), expected["one"], atol=1e-5)
    keys = {key: value.shape for key, value in model.state_dict().items()}
    model.load_lora_adapter(tmp_path / "two", prefix=None, use_safetensors=True, adapter_name="a", hotswap=True)
    assert torch.allclose(run(model), expected["two"], atol=1e-5)
    assert not torch.allclose(expected["one"], expected["two"], atol=1e-3)
    assert keys == {key: value.shape for key, value in model.state_dict().items()}


def test_weights_of_a_pipeline(tmp_path: Path) -> None:
    model = with_two(unet, peanut)
    model.set_adapters("a")
    expected = run(model)
    clip = hf.CLIPTextModel(
        hf.CLIPTextConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    parts: dict[str, Any] = {"vae": vae, "text_encoder": clip, "tokenizer": None, "unet": model}
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    layers = peft.get_peft_model_state_dict(model, adapter_name="a")
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe.load_lora_weights(tmp_path, use_safetensors=True, adapter_name="c")
    assert pipe.get_active_adapters() == ["c"]
    # a file of diffusers has no alpha without its metadata: the change is BA there, and 3/2 BA here
    pipe.set_adapters(["c"], [1.5])
    assert torch.allclose(run(model), expected, atol=1e-6)
    pipe.fuse_lora()
    assert torch.allclose(run(model), expected, atol=1e-5)
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert torch.equal(run(model), run(unet()))
    pipe.enable_lora()
    assert torch.allclose(run(model), expected, atol=1e-6)
    with pytest.warns(UserWarning, match="adapter 'c', which is deleted, was active; 'a' is active now"):
        pipe.delete_adapters("c")
    assert sorted(model.peft_config) == ["a", "b"]


def test_a_scale_that_a_checkpointed_block_would_miss_in_its_backward_is_told() -> None:
    model = with_two(unet, peanut).train()
    model.enable_gradient_checkpointing()
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    model(x, 3, context).sample.square().mean().backward()
    out = model(x, 3, context, cross_attention_kwargs={"scale": 0.5}).sample
    with pytest.raises(peanut.PeanutError, match="a block is run again in a backward"):
        out.square().mean().backward()
    assert isinstance(model, nn.Module)
