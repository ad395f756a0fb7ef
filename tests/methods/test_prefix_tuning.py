"""Prefix tuning: its keys and values against their definition, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.prefix_tuning import PrefixTuningConfig
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS

from ..prompts import KINDS, Kind, answer, moved
from ..support import CACHE, distance, one_thread, same_bits  # noqa: F401

LLAMA, QWEN3, T5 = (
    next(kind for kind in KINDS if str(kind) == name)
    for name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "T5ForConditionalGeneration")
)


def tensors(model: PeftModel) -> dict[str, Tensor]:
    return {key.removeprefix("/"): value.detach() for key, value in AdapterSet.of(model).parameters("default")}


def new(kind: Kind = LLAMA, **options: Any) -> PeftModel:
    torch.manual_seed(7)
    model = get_peft_model(kind.base(torch.float64), PrefixTuningConfig(num_virtual_tokens=4, **options))
    return model.eval()


def made(model: PeftModel) -> Tensor:
    config = model.active_peft_config
    found: Tensor = METHODS["PREFIX_TUNING"].prepended(config, tensors(model), False)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("kind", [LLAMA, QWEN3], ids=str)
def test_rows_hold_keys_and_values_layer_by_layer(kind: Kind) -> None:
    model = new(kind)
    rows, size = tensors(model)["prompt_embeddings"], 16 if kind is QWEN3 else 8
    assert rows.shape == (4, 2 * 2 * 2 * size)
    found = made(model)
    assert found.shape == (2, 2, 2, 4, size)
    for layer in range(2):
        for part in range(2):
            for head in range(2):
                at = ((layer * 2 + part) * 2 + head) * size
                assert same_bits(found[layer, part, head], rows[:, at : at + size])


def test_attention_sees_them_as_a_cache() -> None:
    model, batch = new(), LLAMA.batch()
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(made(model)):
        cache.update(keys.expand(3, -1, -1, -1), values.expand(3, -1, -1, -1), layer)
    expected = answer(LLAMA.base(torch.float64), {**batch, CACHE: cache})
    assert distance(answer(model, batch), expected) < 1e-12


@pytest.mark.parametrize("layers", [2, 3])
def test_the_peers_order_of_two_stacks(layers: int) -> None:
    torch.manual_seed(7)
    base = T5.base(torch.float64, num_layers=layers, num_decoder_layers=layers)
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4))
    stored = tensors(model)["prompt_embeddings"].view(4, 2 * layers, 4, 8)
    twice = torch.cat([stored, stored], dim=1)  # the peer's split: four rows for each layer, the first two its own
    found = made(model)
    assert found.shape == (layers, 2, 4, 4, 8)
    for layer in range(layers):
        assert same_bits(found[layer, 0], twice[:, 4 * layer].transpose(0, 1).contiguous())
        assert same_bits(found[layer, 1], twice[:, 4 * layer + 1].transpose(0, 1).contiguous())


def test_projection() -> None:
    model = moved(new(prefix_projection=True, encoder_hidden_size=12))
    values = tensors(model)
    hidden = torch.tanh(values["embedding.weight"] @ values["transform.0.weight"].T + values["transform.0.bias"])
    rows = hidden @ values["transform.2.weight"].T + values["transform.2.bias"]
    assert values["embedding.weight"].shape == (4, 16)
    assert distance(made(model), rows.view(4, 2, 2, 2, 8).permute(1, 2, 3, 0, 4)) < 1e-12


@pytest.mark.parametrize("projection", [False, True])
def test_zero_start(projection: bool) -> None:
    """Keys and values are zero; the attention still gives some weight to them, so the answer changes."""
    model = new(init_weights="zero", prefix_projection=projection)
    assert float(made(model).abs().max()) == 0
    cache = DynamicCache()
    for layer in range(2):
        nothing = torch.zeros(3, 2, 4, 8, dtype=torch.float64)
        cache.update(nothing, nothing, layer)
    batch = LLAMA.batch()
    expected = answer(LLAMA.base(torch.float64), {**batch, CACHE: cache})
    assert distance(answer(model, batch), expected) < 1e-12
    model(**LLAMA.batch(labels=True))["loss"].backward()
    assert any(
        value.grad is not None and float(value.grad.abs().max()) > 0
        for _, value in AdapterSet.of(model).parameters("default")
    )


def test_files_hold_what_is_written_and_the_network_apart(tmp_path: Path) -> None:
    model = moved(new(prefix_projection=True, encoder_hidden_size=12))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    assert set(load_file(tmp_path / "adapter_training.safetensors")) == set(tensors(model))
    (tmp_path / "adapter_training.safetensors").unlink()
    base = LLAMA.base(torch.float64)
    with pytest.warns(UserWarning, match="no adapter_training"):
        again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert set(tensors(again)) == {"prompt_embeddings"}
    assert same_bits(answer(again, LLAMA.batch()), answer(model, LLAMA.batch()))


def test_sizes_are_those_of_keys_and_values() -> None:
    config = new().active_peft_config
    found = [getattr(config, name) for name in ("token_dim", "num_attention_heads", "encoder_hidden_size")]
    assert found == [16, 2, 16]
    with pytest.raises(PeanutError, match="token_dim=32 for a model that has 16"):
        new(token_dim=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_weights": "one"}, "expected 'zero'"),
        ({"encoder_hidden_size": 0}, "at least 1"),
        ({"num_virtual_tokens": 2.5}, "whole number"),
        ({"layers_to_transform": [0]}, "changes no layer"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        PrefixTuningConfig(**{"num_virtual_tokens": 3} | options)
