"""Models of transformers take our configs as they take Hugging Face PEFT's: ``model.add_adapter(config)`` and on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import pytest
import torch
import transformers as hf
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

import peanut
from peanut import LoraConfig, OFTConfig, PeanutConfig, PeanutError

from ..support import PEER_WARNINGS, ids, one_thread  # noqa: F401

pytestmark = [*PEER_WARNINGS, pytest.mark.usefixtures("installed")]

CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": lambda **own: LoraConfig(r=2, init_lora_weights=False, **own),
    "peanut": lambda **own: PeanutConfig(r=2, init_weights=False, **own),
    "dora": lambda **own: LoraConfig(r=2, use_dora=True, init_lora_weights=False, **own),
}
IDS = ids()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_are_added_switched_and_deleted(kind: str, tiny_llama: Callable[..., Any]) -> None:
    model, base = tiny_llama(), logits(tiny_llama())
    model.add_adapter(CONFIGS[kind](), "a")
    first = logits(model)
    assert model.active_adapters() == ["a"]
    assert not torch.equal(first, base)
    model.add_adapter(CONFIGS[kind](), "b")
    assert model.active_adapters() == ["b"]
    second = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), first)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(".a" in name for name in trained)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    assert not any(value.requires_grad for value in model.parameters())
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
    assert len(model.get_adapter_state_dict("b")) == len(trained)
    with pytest.warns(UserWarning, match="adapter 'a', which is deleted, was active; 'b' is active now"):
        model.delete_adapter("a")
    assert (model.active_adapters(), list(model.peft_config)) == (["b"], ["b"])
    assert torch.equal(logits(model), second)
    model.delete_adapter("b")
    assert torch.equal(logits(model), base)


def saved_in(folder: Path, kind: str, base: nn.Module) -> tuple[Any, Tensor]:
    """A base in ``base`` and an adapter on it in ``adapter``: the model, and what it answers."""
    base.save_pretrained(folder / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "base")
    model.add_adapter(CONFIGS[kind]())
    expected = logits(model)
    model.save_pretrained(folder / "adapter")
    return model, expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_folders_are_saved_and_loaded(kind: str, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model, expected = saved_in(tmp_path, kind, tiny_llama())
    folder = str(tmp_path / "adapter")
    assert not list(Path(folder).glob("model*"))
    assert torch.allclose(logits(hf.AutoModelForCausalLM.from_pretrained(folder)), expected, atol=1e-6)
    wrapped = peanut.PeftModel.from_pretrained(tiny_llama(), folder)
    assert torch.allclose(logits(wrapped), expected, atol=1e-6)
    model.add_adapter(CONFIGS[kind](), "other")
    other = logits(model)
    model.load_adapter(folder, "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)
    model.set_adapter("other")
    assert torch.equal(logits(model), other)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pipeline_of_a_folder(kind: str, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    _, expected = saved_in(tmp_path, kind, tiny_llama())
    words = Tokenizer(WordLevel({word: number for number, word in enumerate("abcdefgh")}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a", pad_token="b").save_pretrained(tmp_path / "base")
    made = hf.pipeline("text-generation", model=str(tmp_path / "adapter"), device="cpu")
    assert torch.allclose(logits(made.model), expected, atol=1e-6)
    assert made("c d", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("c d")


def test_layers_are_taken_for_the_other_librarys(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["lm_head"]), "a")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == 2
    assert isinstance(model.lm_head, peft.utils.ModulesToSaveWrapper)
    assert not isinstance(model.lm_head, BaseTunerLayer)
    again = copy.deepcopy(layers[0])
    assert type(again) is type(layers[0])
    (layer, _) = layers
    assert (layer.scaling, layer.r, layer.lora_alpha) == ({"a": 1.5}, {"a": 2}, {"a": 3})
    assert isinstance(layer.get_base_layer(), nn.Linear)
    assert (layer.active_adapters, layer.merged, layer.disable_adapters) == (["a"], False, False)


@pytest.mark.parametrize("kind", CONFIGS)
def test_scales_multiply_the_change_merged_and_unmerged(kind: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    config = CONFIGS[kind](target_modules=["q_proj", "v_proj"])
    model.add_adapter(config)
    expected = logits(model)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    whole = [layer.delta("default") for layer in layers]
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        half = logits(model)
        if kind != "dora":  # which scales what it normalises
            assert all(
                torch.allclose(layer.delta("default"), own / 2) for layer, own in zip(layers, whole, strict=True)
            )
        for layer in layers:
            layer.merge()
        assert torch.allclose(logits(model), half, atol=1e-6)
        for layer in layers:
            layer.unmerge()
        assert torch.equal(logits(model), half)
    assert not torch.allclose(half, expected)
    assert torch.equal(logits(model), expected)
    for layer in layers:
        layer.scale_layer(0.5)
    assert torch.equal(logits(model), half)
    for layer in layers:
        layer.unscale_layer(0.5)
    assert torch.equal(logits(model), expected)


def test_dora_is_scaled_as_there(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    own = peanut.get_peft_model(tiny_llama(), CONFIGS["dora"]())
    own.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with peft.helpers.rescale_adapter_scale(own, 0.3), peft.helpers.rescale_adapter_scale(theirs, 0.3):
        assert torch.allclose(logits(own), logits(theirs), atol=1e-6)


def test_rotations_are_not_scaled(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.add_adapter(OFTConfig(r=4, target_modules=["q_proj"]))
    layer: Any = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    layer.set_scale("default", 1.0)
    with pytest.raises(PeanutError, match=r"^a scale for adapter 'default' at .*; expected an adapter that does, or a"):
        layer.set_scale("default", 0.5)
    assert layer.scaling == {"default": 1.0}


@pytest.mark.parametrize("heads", [None, ["lm_head"]])
def test_weights_are_synchronised_as_trl_does(heads: list[str] | None, tiny_llama: Callable[..., Any]) -> None:
    for make in (CONFIGS["lora"], CONFIGS["peanut"]):
        model = peanut.get_peft_model(tiny_llama(), make(modules_to_save=heads))
        expected = logits(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.merge_adapter()
        sent = {}
        for full, value in model.named_parameters():
            name = full.removeprefix("base_model.model.").replace(".base_layer", "")
            if model.prefix in name or "original_module" in name:
                continue
            sent[name.replace("modules_to_save.default.", "")] = value.data.clone()
        model.unmerge_adapter()
        base = tiny_llama()
        assert sent.keys() == dict(base.named_parameters()).keys()
        base.load_state_dict(sent)
        assert torch.allclose(logits(base), expected, atol=1e-6)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reference_passes_within_one_another(tiny_llama: Callable[..., Any]) -> None:
    model, base = peanut.get_peft_model(tiny_llama(), CONFIGS["lora"]()), logits(tiny_llama())
    expected = logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
        model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    with model.disable_adapter():
        model.base_model.enable_adapter_layers()
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)


def test_the_state_of_a_model_is_told(tiny_llama: Callable[..., Any]) -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    own = peanut.get_peft_model(tiny_llama(), LoraConfig(**config))  # type: ignore[arg-type]
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config))  # type: ignore[arg-type]
    mine, other = vars(own.get_model_status()), vars(theirs.get_model_status())
    assert mine.keys() == other.keys()
    assert {key for key in mine if mine[key] != other[key]} <= {"total_params"}
    assert vars(peft.get_model_status(own)) == mine
    for one, two in zip(own.get_layer_status(), theirs.get_layer_status(), strict=True):
        assert vars(one).keys() == vars(two).keys()
        assert {key for key in vars(one) if vars(one)[key] != vars(two)[key]} <= {"module_type"}


@pytest.mark.parametrize("kind", ["lora", "peanut"])
def test_hot_swaps(kind: str, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """By transformers' own ``load_adapter``: LoRAs of one rank and α; by ``hotswap_adapter``: of any, as everywhere."""
    other = peanut.get_peft_model(tiny_llama(), CONFIGS[kind]())
    other.save_pretrained(tmp_path)
    expected, model = logits(other), tiny_llama()
    model.add_adapter(CONFIGS[kind](), "a")
    assert not torch.allclose(logits(model), expected, atol=1e-4)
    if kind == "lora":
        model.load_adapter(str(tmp_path), adapter_name="a", hotswap=True)
    else:
        with pytest.raises(ValueError, match="only supported for LoRA"):
            model.load_adapter(str(tmp_path), adapter_name="a", hotswap=True)
        peft.utils.hotswap.hotswap_adapter(model, tmp_path, "a")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert list(model.peft_config) == ["a"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_loaded_from_its_tensors(kind: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.add_adapter(CONFIGS[kind](), "a")
    state = {f"base_model.model.{key}": value for key, value in model.get_adapter_state_dict("a").items()}
    again = tiny_llama()
    again.load_adapter(adapter_state_dict=state, peft_config=CONFIGS[kind](), adapter_name="a")
    assert isinstance(again.peft_config["a"], peanut.PeftConfig)
    assert torch.equal(logits(again), logits(model))


def test_what_the_peers_functions_make_of_our_models(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = peanut.get_peft_model(tiny_llama(), CONFIGS["peanut"]())
    base = peft.get_base_model_state_dict(model)
    assert base.keys() == tiny_llama().state_dict().keys()
    peft.set_base_model_state_dict(model, base)
    config, state = peft.convert_to_lora(model, 2)
    assert isinstance(config, LoraConfig)
    assert len(state) == 2 * 2 * len(tiny_llama().model.layers)
    peft.save_as_lora(tmp_path, model, 2)
    assert isinstance(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path), peft.PeftModel)
    lora = peanut.get_peft_model(tiny_llama(), CONFIGS["lora"]())
    made = peft.optimizers.create_riemannian_optimizer(lora, torch.optim.SGD, lr=0.1)
    assert {id(value) for group in made.param_groups for value in group["params"]} == {
        id(value) for value in lora.parameters() if value.requires_grad
    }


def test_adapters_beside_those_of_the_peers_layers(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, init_lora_weights=False)).save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(str(tmp_path), "theirs")
    expected = logits(model)
    with pytest.raises(PeanutError, match=r"a layer of Hugging Face PEFT; .*; call peanut\.from_peft\(model\) fir"):
        model.add_adapter(CONFIGS["peanut"](), "ours")
    peanut.from_peft(model)
    model.add_adapter(CONFIGS["peanut"](), "ours")
    assert not torch.equal(logits(model), expected)
    model.set_adapter("theirs")
    assert (logits(model) - expected).abs().max() < 1e-5
