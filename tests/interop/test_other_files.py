"""Files that Hugging Face PEFT wrote in another form: pickles, and keys of older layouts of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peanut
from peanut import PeanutError

from ..support import PEER_WARNINGS, one_thread, randomised  # noqa: F401

pytestmark = PEER_WARNINGS

NAME, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / PICKLE).is_file()
    assert not (tmp_path / NAME).exists()
    return tmp_path


def test_a_pickle_of_tensors_is_loaded(pickled: Path) -> None:
    x = torch.ones(2, 4)
    wanted = peft.PeftModel.from_pretrained(net(), pickled)(x)
    ours = peanut.PeftModel.from_pretrained(net(), pickled)
    torch.testing.assert_close(ours(x), wanted)
    ours.load_adapter(pickled, "other", use_safetensors=False)
    ours.set_adapter("other")
    torch.testing.assert_close(ours(x), wanted)
    read, theirs = peanut.load_peft_weights(pickled), peft.load_peft_weights(str(pickled))
    assert read.keys() == theirs.keys()
    assert all(torch.equal(read[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", ["LORA", "PEANUT"])
def test_a_pickle_that_we_write_is_loaded_by_both(method: str, tmp_path: Path) -> None:
    config = peanut.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["0"])
    model = randomised(peanut.get_peft_model(net(), config)).eval()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)  # takes the place of the other
    assert sorted(path.name for path in tmp_path.iterdir() if "adapter" in path.name) == ["adapter_config.json", PICKLE]
    x = torch.ones(2, 4)
    for library in (peanut, peft):
        torch.testing.assert_close(library.PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


def test_safetensors_come_first(pickled: Path) -> None:
    state = {key: value + 1 for key, value in torch.load(pickled / PICKLE).items()}
    save_file(state, pickled / NAME)
    read = peanut.load_peft_weights(pickled)
    assert read.keys() == state.keys() != set()
    assert all(torch.equal(read[key], state[key]) for key in state)


class Anything:
    pass


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"a": Anything()}, "cannot read '.*adapter_model.bin'.*expected a pickle of tensors and nothing else"),
        ([torch.ones(1)], "holds 'list'; expected tensors by name"),
        ({"a": 3}, "holds 3 in 'a'; expected a tensor"),
        ({"base_model.model.0.lora_A.weight": torch.tensor([float("nan")])}, "not finite"),
    ],
)
def test_a_pickle_of_more_is_one_line(held: Any, message: str, pickled: Path) -> None:
    torch.save(held, pickled / PICKLE)
    with pytest.raises(PeanutError, match=message) as refused:
        peanut.PeftModel.from_pretrained(net(), pickled)
    assert "\n" not in str(refused.value)
    (pickled / PICKLE).write_bytes(b"nonsense")
    with pytest.raises(PeanutError, match="cannot read"):
        peanut.load_peft_weights(pickled)


def llava() -> Any:
    torch.manual_seed(0)
    seen = hf.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4, projection_dim=16)
    read = hf.LlamaConfig(**SMALL, vocab_size=32)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=seen, text_config=read)).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    read = SMALL | {"vocab_size": 32, "num_key_value_heads": 2, "rope_parameters": rope}
    seen = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=read, vision_config=seen)).eval()


def plain() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, vocab_size=32)).eval()


LAYOUTS = {
    "llava": (llava, "base_model.model.model.language_model.", "base_model.model.language_model.model."),
    "qwen2_vl": (qwen, "base_model.model.model.language_model.", "base_model.model.model."),
    "torch.compile": (plain, "base_model.model.", "base_model.model._orig_mod."),
    "torch.compile outside": (plain, "base_model.model.", "_orig_mod.base_model.model."),
    "DDP": (plain, "base_model.model.", "module.base_model.model."),
    "DDP inside": (plain, "base_model.model.", "base_model.model.module."),
}
"""A model; how the keys of an adapter's file begin today, and how they began, or do in another wrapper."""


def outputs(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(1, 9)[None]).logits
    return found.detach()


def test_keys_are_renamed_as_a_model_of_ones_own_says(tmp_path: Path) -> None:
    class Moved(nn.Module):
        _checkpoint_conversion_mapping: ClassVar = {r"^body(?!\.inner)": "body.inner"}

        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"inner": layers})

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 2))
    old = nn.Module()
    old.body = layers
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(old, config)
    theirs.save_pretrained(tmp_path)
    wanted = theirs.base_model.model.body[0].lora_A["default"].weight
    ours = peanut.PeftModel.from_pretrained(Moved(nn.Sequential(nn.Linear(2, 2))), tmp_path)
    assert torch.equal(ours.base_model.model.body["inner"][0].lora_A["default"].weight, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_keys_of_another_layout_are_renamed(layout: str, method: str, tmp_path: Path) -> None:
    make, now, before = LAYOUTS[layout]
    config = {
        "lora": peft.LoraConfig(target_modules=r".*layers.*\.q_proj", init_lora_weights=False),
        "ia3": peft.IA3Config(target_modules=r".*layers.*\.v_proj", feedforward_modules=[], init_ia3_weights=False),
    }[method]
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path)
    wanted = outputs(theirs)
    state = load_file(tmp_path / NAME)
    older = {key.replace(now, before, 1): value for key, value in state.items() if "vision" not in key}
    older |= {key: value for key, value in state.items() if "vision" in key}
    assert older.keys() != state.keys()
    save_file(older, tmp_path / NAME)
    ours = peanut.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(outputs(ours), wanted)
    assert (wanted - outputs(make())).abs().max() > 2e-4
    other = peanut.get_peft_model(make(), peanut.PeftConfig.from_pretrained(tmp_path))
    peanut.set_peft_model_state_dict(other, older)
    torch.testing.assert_close(outputs(other.eval()), wanted)


def test_a_module_of_the_users_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = net()

    model = peft.get_peft_model(Outer(), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    ours = peanut.PeftModel.from_pretrained(Outer(), tmp_path)
    read = peanut.get_peft_model_state_dict(ours)
    assert read.keys() == load_file(tmp_path / NAME).keys()
    injected = peanut.inject_adapter_in_model(peanut.LoraConfig(target_modules=["0"]), Outer())
    state = {key.removeprefix("base_model.model."): value for key, value in read.items()}
    assert next(iter(state)).startswith("module.0.")
    peanut.set_peft_model_state_dict(injected, state)
    found = peanut.get_peft_model_state_dict(injected)
    assert all(torch.equal(found[key], state[key]) for key in state)
