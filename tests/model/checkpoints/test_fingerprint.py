"""An adapter knows the base it was trained on, in any precision, and refuses another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from peanut import LoraConfig, PeanutConfig, PeftModel, get_peft_model
from peanut.model.checkpoints.fingerprint import fingerprint
from peanut.protocols import METHODS

from ...support import LAYERS, Net, one_thread, randomised, refused, same_bits  # noqa: F401

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)


def adapted(base: Any, **options: Any) -> PeftModel:
    return randomised(get_peft_model(base, PeanutConfig(**{"target_modules": ["q_proj"], "r": 4} | options))).eval()


def assert_loads(base: Any, folder: Path, expected: PeftModel) -> None:
    """The adapter in the folder is loaded on ``base``, with the numbers that it has in ``expected``."""
    loaded, saved = (
        dict(model.adapters.parameters("default")) for model in (PeftModel.from_pretrained(base, folder), expected)
    )
    assert loaded.keys() == saved.keys() > set()
    assert all(torch.equal(value.float(), saved[key].float()) for key, value in loaded.items())


def test_it_holds_values_of_at_most_sixteen_layers(tiny_llama: Build) -> None:
    base = tiny_llama(num_hidden_layers=5)
    model = adapted(base, target_modules="all-linear")
    samples = json.loads(fingerprint(model.adapters, "default"))
    assert 12 <= len(samples) <= 16
    assert {len(values) for values in samples.values()} == {16}
    for path, values in samples.items():
        weight = base.get_submodule(path).weight.flatten()
        assert values[0] == pytest.approx(weight[0].item(), rel=1e-5)
        assert values[-1] == pytest.approx(weight[-1].item(), rel=1e-5)


@pytest.mark.parametrize("kind", METHODS["LORA"].kinds)
def test_every_kind_of_layer_has_one_and_a_merge_does_not_change_it(kind: str) -> None:
    model = randomised(get_peft_model(Net(next(iter(LAYERS[kind].values()))()), LoraConfig(target_modules=["layer"])))
    before = fingerprint(model.adapters, "default")
    model.merge_adapter()
    assert fingerprint(model.adapters, "default") == before
    assert len(json.loads(before)["layer"]) == 16


def test_the_base_in_other_precisions_is_the_base(tiny_llama: Build, tmp_path: Path) -> None:
    for name, dtype in (("wide", torch.float32), ("half", torch.bfloat16)):
        model = adapted(tiny_llama().to(dtype))
        model.save_pretrained(tmp_path / name)
        for other in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert_loads(tiny_llama().to(other), tmp_path / name, model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "meta"])
def test_another_base_is_refused_and_both_are_named(low_cpu_mem_usage: bool, tiny_llama: Build, tmp_path: Path) -> None:
    trained_on = tiny_llama()
    trained_on.config._name_or_path = "the/first"
    model = adapted(trained_on)
    model.save_pretrained(tmp_path)
    other = tiny_llama()
    other.config._name_or_path = "the/second"
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.mul_(1.05)
    message = (
        r"^the adapter was trained on 'the/first' \(weights [0-9a-f]{8}\) and this base is 'the/second' "
        r"\(weights [0-9a-f]{8}\); expected the base that it was trained on; load that one, or pass check_base=False$"
    )
    with refused(other, message):
        PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded = PeftModel.from_pretrained(other, tmp_path, check_base=False, low_cpu_mem_usage=low_cpu_mem_usage)
    with refused(loaded, message):
        loaded.load_adapter(tmp_path, "b", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path, "b", check_base=False)
    loaded.set_adapter("b")
    assert not same_bits(loaded(IDS).logits, model(IDS).logits)


def test_other_weights_that_the_adapter_does_not_lie_on_are_none_of_its_business(
    tiny_llama: Build, tmp_path: Path
) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    assert_loads(base, tmp_path, model)


def test_files_without_one_load_on_any_base(tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path), path)  # as the peer writes it
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(2)
    assert_loads(base, tmp_path, model)


def test_a_base_without_storage_has_none() -> None:
    with torch.device("meta"):
        model = get_peft_model(Net(torch.nn.Linear(3, 4)), PeanutConfig(target_modules=["layer"]))
    assert fingerprint(model.adapters, "default") is None
