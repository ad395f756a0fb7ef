"""P-tuning: its networks against their formulas, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.p_tuning import PromptEncoderConfig
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS

from ..prompts import KINDS, Kind, answer, moved
from ..support import distance, one_thread, same_bits  # noqa: F401

LLAMA, T5 = (
    next(kind for kind in KINDS if str(kind) == name) for name in ("LlamaForCausalLM", "T5ForConditionalGeneration")
)


def tensors(model: PeftModel) -> dict[str, Tensor]:
    return {key.removeprefix("/"): value.detach() for key, value in AdapterSet.of(model).parameters("default")}


def new(kind: Kind = LLAMA, **options: Any) -> PeftModel:
    torch.manual_seed(7)
    config = PromptEncoderConfig(**{"num_virtual_tokens": 4, "encoder_hidden_size": 12} | options)
    return moved(get_peft_model(kind.base(torch.float64), config))  # type: ignore[no-any-return]


def made(model: PeftModel, training: bool = False) -> Tensor:
    config = model.active_peft_config
    found: Tensor = METHODS["P_TUNING"].prepended(config, tensors(model), training)  # type: ignore[attr-defined]
    return found


def written_out(values: dict[str, Tensor]) -> Tensor:
    """The MLP, one token and one layer after the other."""
    rows = []
    for x in values["embedding.weight"]:
        for layer in (0, 2, 4):
            x = values[f"mlp_head.{layer}.weight"] @ x + values[f"mlp_head.{layer}.bias"]  # noqa: PLW2901
            x = x if layer == 4 else x * (x > 0)  # noqa: PLW2901
        rows.append(x)
    return torch.stack(rows)


@pytest.mark.parametrize("hidden", [None, 12])
def test_mlp(hidden: int | None) -> None:
    model = new(encoder_hidden_size=hidden)
    assert model.active_peft_config.encoder_hidden_size == (hidden or 32)  # type: ignore[attr-defined]
    assert distance(made(model), written_out(tensors(model))) < 1e-12


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", [LLAMA, T5], ids=str)
def test_lstm(kind: Kind, layers: int) -> None:
    model = new(kind, encoder_reparameterization_type="LSTM", encoder_num_layers=layers)
    values = tensors(model)
    lstm = nn.LSTM(32, 12, layers, bidirectional=True, batch_first=True, dtype=torch.float64)
    prefix = "lstm_head."
    assert set(lstm.state_dict()) == {name.removeprefix(prefix) for name in values if name.startswith(prefix)}
    lstm.load_state_dict({name: values[prefix + name] for name in lstm.state_dict()})
    x = lstm(values["embedding.weight"][None])[0][0]
    x = torch.relu(x @ values["mlp_head.0.weight"].T + values["mlp_head.0.bias"])
    x = x @ values["mlp_head.2.weight"].T + values["mlp_head.2.bias"]
    assert len(x) == (8 if kind is T5 else 4)
    assert distance(made(model), x[:4]) < 1e-12


def test_dropout_is_between_the_layers_of_the_lstm_in_training() -> None:
    model = new(encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    assert same_bits(made(model), made(model))
    torch.manual_seed(1)
    first = made(model, training=True)
    assert distance(made(model, training=True), first) > 1e-3
    torch.manual_seed(1)
    assert same_bits(made(model, training=True), first)


def test_files_hold_what_is_written_and_the_network_apart(tmp_path: Path) -> None:
    model = new()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    apart = load_file(tmp_path / "adapter_training.safetensors")
    assert set(apart) == set(tensors(model))
    assert same_bits(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], made(model))


def test_without_the_network_the_tokens_themselves_are_trained(tmp_path: Path) -> None:
    model, batch = new(), LLAMA.batch()
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "adapter_training.safetensors").unlink()
    with pytest.warns(UserWarning, match="no adapter_training"):
        again = PeftModel.from_pretrained(LLAMA.base(torch.float64), tmp_path / "first", is_trainable=True)
    assert set(tensors(again)) == {"prompt_embeddings"}
    moved(again)
    expected = answer(again, batch)
    assert distance(expected, answer(model, batch)) > 1e-3
    again.save_pretrained(tmp_path / "second")
    read = PeftModel.from_pretrained(LLAMA.base(torch.float64), tmp_path / "second", is_trainable=True).eval()
    assert set(tensors(read)) == {"prompt_embeddings"}
    assert same_bits(answer(read, batch), expected)


def test_a_network_of_another_adapter_is_refused(tmp_path: Path) -> None:
    new().save_pretrained(tmp_path / "a")
    other = new()
    moved(other)
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "adapter_training.safetensors").write_bytes(
        (tmp_path / "b" / "adapter_training.safetensors").read_bytes()
    )
    with pytest.raises(PeanutError, match="saved together"):
        PeftModel.from_pretrained(LLAMA.base(torch.float64), tmp_path / "a", is_trainable=True)


def test_layers_of_an_mlp_are_fixed() -> None:
    with pytest.warns(UserWarning, match="are for the LSTM"):
        PromptEncoderConfig(num_virtual_tokens=3, encoder_num_layers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_reparameterization_type": "GRU"}, "one of MLP, LSTM"),
        ({"encoder_hidden_size": 0}, "at least 1"),
        ({"encoder_num_layers": 0}, "from 1 to 10,000"),
        ({"encoder_dropout": 1.0}, "below 1"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        PromptEncoderConfig(**{"num_virtual_tokens": 3} | options)
