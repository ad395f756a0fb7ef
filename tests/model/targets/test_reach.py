"""The share of a model's weights that no adapter reaches: counted, and said where it would surprise."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from peanut import LoraConfig, OutOfReachWarning, PeanutConfig, PeanutError, get_peft_model, inject_adapter_in_model
from peanut.model.targets.reach import reach_of

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 4},
    "GptOss": {"num_local_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
}


def experts(name: str = "Mixtral") -> Any:
    config = getattr(hf, f"{name}Config")(**SIZES | EXPERTS[name])
    return getattr(hf, f"{name}ForCausalLM")(config)


def stacked(model: nn.Module) -> int:
    """The weights of experts and of what routes tokens to them."""
    found = [p for name, p in model.named_parameters() if ("experts" in name or "router" in name or ".gate." in name)]
    return sum(p.numel() for p in found if p.dim() > 1)


class Bare(nn.Module):
    """Each kind of weight that no adapter reaches: 4 matrices of 64 numbers, and 2 layers that one does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.embedding = nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(8, 8)
        self.own, self.conv = nn.Parameter(torch.randn(8, 8)), nn.ConvTranspose1d(8, 8, 1)
        self.positions, self.scale = nn.Parameter(torch.zeros(1, 20, 8)), nn.Parameter(torch.zeros(1, 1, 8))
        self.recurrent, self.tied = nn.RNN(8, 8, bias=False), nn.Parameter(self.linear.weight)
        self.tied = self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = experts(name)
    count, total = stacked(base), sum(p.numel() for p in base.parameters())
    said = rf"{count:,d} of {total:,d} weights \({100 * count / total:.1f}%\), in {name}Experts\.gate_up_proj"
    assert count > total / 4
    with pytest.warns(OutOfReachWarning, match=rf"^'all-linear' does not reach {said}"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.warns(OutOfReachWarning, match=said):
        model.add_adapter("other", PeanutConfig(r=2, target_modules="all-linear"))
    with pytest.warns(OutOfReachWarning, match=said):
        inject_adapter_in_model(LoraConfig(target_modules="all-linear"), experts(name))
    trained, everything = model.get_nb_trainable_parameters()
    model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        f"trainable params: {trained:,d} || all params: {everything:,d} || trainable%: {100 * trained / everything:.4f}"
    )
    assert second.startswith(f"out of reach of adapters: {count:,d} of {total:,d} weights")


def test_what_counts(capsys: pytest.CaptureFixture[str]) -> None:
    model = Bare()
    total = sum(p.numel() for p in model.parameters())
    reach = reach_of(model)
    assert reach.total == total
    assert reach.unreached == {
        "Bare.own": 64,
        "ConvTranspose1d.weight": 64,
        "RNN.weight_ih_l0": 64,
        "RNN.weight_hh_l0": 64,
    }
    assert reach.linear == 3 * 64  # a convolution is no surprise to who asks for linear layers
    with pytest.warns(UserWarning, match=r"^'tied' holds the weight of 'linear'"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"], modules_to_save=["conv"]), model)
    after = reach_of(model)
    assert after.total == total
    assert after.unreached.keys() == reach.unreached.keys() - {"ConvTranspose1d.weight"}  # it is trained whole


def test_attention_reads_its_weights() -> None:
    reach = reach_of(nn.TransformerEncoderLayer(8, 2, 8))
    assert reach.unreached == {"MultiheadAttention.in_proj_weight": 192, "NonDynamicallyQuantizableLinear.weight": 64}


def test_a_weight_made_by_a_parametrisation_is_reached() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    assert reach_of(model).unreached == {}
    assert reach_of(model).total == sum(p.numel() for p in model.parameters())


def test_silent_where_it_is_no_surprise(tiny_llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings are errors here."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    model.print_trainable_parameters()
    assert len(capsys.readouterr().out.splitlines()) == 1
    get_peft_model(experts(), LoraConfig(target_modules=["q_proj"]))  # the user has chosen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfReachWarning)
        get_peft_model(experts(), LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("named", [["experts"], ["q_proj", "gate_up_proj"], r".*\.experts", r".*gate_up_proj"], ids=str)
def test_experts_by_name(named: list[str] | str) -> None:
    model = experts()
    with pytest.raises(PeanutError, match=r"gate_up_proj' is a parameter that no layer .*cannot be adapted yet$"):
        get_peft_model(model, LoraConfig(target_modules=named))


def test_target_parameters() -> None:
    with pytest.raises(PeanutError, match=r"^target_parameters=.*fused experts, cannot be adapted yet$"):
        LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
