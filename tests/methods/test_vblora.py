"""VB-LoRA against its formula (arXiv 2405.15179), its bank, and files that hold only what was chosen."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peanut
from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.variational_lora import VariationalLoraConfig
from peanut.methods.vblora import VBLoRAConfig
from peanut.protocols import METHODS, get_peft_config

from ..support import Net, directed, distance, one_thread, peer_loaded, peer_model, refused, same_bits, scattered  # noqa: F401
from .pairs import Pair, adapted, saved, tensors, through

X = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def config(**options: Any) -> VBLoRAConfig:
    small = {"r": 3, "num_vectors": 7, "vector_length": 4, "init_vector_bank_bound": 0.5}
    made: VBLoRAConfig = VBLoRAConfig(target_modules=["a", "b"], **small | options)
    return made


def piece(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """One vector of length v from one row of logits."""
    chosen = sorted(range(len(logits)), key=lambda place: -float(logits[place]))[:k]
    weights = [float(logits[place].exp()) for place in chosen]
    return sum(weight / sum(weights) * bank[place] for weight, place in zip(weights, chosen, strict=True))


def delta(t: dict[str, Tensor], name: str, k: int) -> Tensor:
    a, b, bank = t[f"{name}.vblora_logits_A"], t[f"{name}.vblora_logits_B"], t["vblora_vector_bank"]
    A = torch.stack([torch.cat([piece(logits, bank, k) for logits in row]) for row in a])
    B = torch.stack([torch.cat([piece(logits, bank, k) for logits in column]) for column in b.transpose(0, 1)]).T
    return B @ A


@pytest.mark.parametrize("k", [1, 2, 7])
def test_layers_are_the_formula_over_one_bank(k: int) -> None:
    model = adapted(config(topk=k))
    t = tensors(model)
    assert t["vblora_vector_bank"].shape == (7, 4)
    assert (t["a.vblora_logits_A"].shape, t["a.vblora_logits_B"].shape) == ((3, 3, 7), (5, 3, 7))
    assert (t["b.vblora_logits_A"].shape, t["b.vblora_logits_B"].shape) == ((3, 5, 7), (2, 3, 7))
    deltas = {name: delta(t, name, k) for name in "ab"}
    assert distance(through(deltas, X), Pair().double()(X)) > 0.05
    assert distance(model(X), through(deltas, X)) < 1e-12


def test_bank_is_trained_once_from_both_layers() -> None:
    model = adapted(config()).train()
    banks = [p for name, p in model.named_parameters() if "vector_bank" in name]
    assert len(banks) == 1
    directed(model(X)).backward()
    both = banks[0].grad
    values = tensors(model)
    bank = values["vblora_vector_bank"].requires_grad_()
    weights = {name: module.weight.detach() for name, module in Pair().double().named_children()}
    biases = {name: module.bias.detach() for name, module in Pair().double().named_children()}
    h = torch.tanh(X @ (weights["a"] + delta(values, "a", 2)).T + biases["a"])
    directed(h @ (weights["b"] + delta(values, "b", 2)).T + biases["b"]).backward()
    assert both is not None
    assert bank.grad is not None
    assert distance(both, bank.grad) < 1e-12


def test_start_is_uniform_and_normal_as_asked() -> None:
    model = get_peft_model(Pair(), config(num_vectors=400, init_vector_bank_bound=0.3, init_logits_std=0.7))
    t = tensors(model)
    assert 0.29 < t["vblora_vector_bank"].abs().max() < 0.3
    assert abs(float(t["vblora_vector_bank"].std()) - 0.3 / 3**0.5) < 0.01
    assert abs(float(t["a.vblora_logits_A"].std()) - 0.7) < 0.03
    assert abs(float(t["b.vblora_logits_B"].std()) - 0.7) < 0.03


@pytest.mark.parametrize(
    ("number", "k", "dtype"), [(7, 2, torch.uint8), (255, 3, torch.uint8), (256, 2, torch.int16), (7, 1, torch.uint8)]
)
def test_files_of_what_was_chosen(number: int, k: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(config(num_vectors=number, topk=k, save_only_topk_weights=True), torch.float32)
    expected, state = model(X.float()), saved(model, tmp_path / "ours")
    a = "base_model.model.a.vblora_logits_A"
    assert (state[f"{a}_topk_indices"].dtype, state[f"{a}_topk_indices"].shape) == (dtype, (3, 3, k))
    assert state[f"{a}_topk_weights"].shape == (3, 3, k - 1)
    assert len(state) == 9
    again = PeftModel.from_pretrained(Pair(), tmp_path / "ours", is_trainable=True).eval()
    assert distance(again(X.float()), expected) < 1e-6
    assert distance(peer_loaded(Pair(), tmp_path / "ours")(X.float()), expected) < 1e-5
    second = saved(again, tmp_path / "second")
    assert all(same_bits(state[key], value) for key, value in second.items() if key.endswith("indices"))
    # Training goes on with the vectors that were chosen.
    directed(again.train()(X.float())).backward()
    assert all(torch.isfinite(p.grad).all() for p in again.parameters() if p.grad is not None)


def test_a_weight_of_zero_is_read_back(tmp_path: Path) -> None:
    model = get_peft_model(Pair(), config(save_only_topk_weights=True)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logits" in name:
                parameter.mul_(1e4)  # the second weight is 0, and the first may be 1 and a rounding
    expected = model(X.float())
    saved(model, tmp_path)
    assert distance(PeftModel.from_pretrained(Pair(), tmp_path)(X.float()), expected) < 1e-6


def test_file_of_the_peer_of_what_was_chosen(tmp_path: Path) -> None:
    theirs = peer_model(Pair(), config(save_only_topk_weights=True))
    scattered([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    assert distance(theirs(X.float()), Pair()(X.float())) > 0.05
    assert distance(PeftModel.from_pretrained(Pair(), tmp_path)(X.float()), theirs(X.float())) < 1e-5


@pytest.mark.parametrize("options", [{}, {"save_only_topk_weights": True}, {"num_vectors": 300}])
def test_what_is_saved_is_counted_as_the_peer_counts(options: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    given = {"r": 4, "vector_length": 4, "topk": 2, "target_modules": ["a", "b"], "num_vectors": 20, **options}
    found = []
    for library in (peanut, peft):
        model = library.get_peft_model(
            nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"}), library.VBLoRAConfig(**given)
        )
        model.base_model.model["a"].base_layer.requires_grad_(True)
        found.append(model.get_nb_savable_parameters())
    assert found[0] == found[1]
    assert found[0][1] > 0
    model.print_savable_parameters()
    assert f"{sum(found[0]):,d}" in capsys.readouterr().out


def test_length_that_does_not_divide_is_refused_with_layer_and_size() -> None:
    model = Net(nn.Linear(12, 20))
    wrong = VBLoRAConfig(target_modules=["layer"], vector_length=6)
    with refused(model, r"vector_length=6 for 'layer' of shape \(20, 12\); expected a length that divides both"):
        get_peft_model(model, wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector_length": 0}, "vector_length=0; expected a whole number of at least 1"),
        ({"topk": 9, "num_vectors": 8}, "topk=9 of num_vectors=8; expected at most all of them"),
        ({"init_logits_std": -1}, "init_logits_std=-1; expected a finite number of at least 0"),
        ({"vblora_dropout": 1.5}, "vblora_dropout=1.5; expected a probability"),
        ({"bias": "some"}, "bias='some'; expected 'none', 'all' or 'vblora_only'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        VBLoRAConfig(**options)


def test_variational_keywords_make_the_other_config() -> None:
    for options in ({"vb_r": 4, "vb_pi": 0.25, "vb_beta": 2.0}, {"vb_beta": 0.5, "target_modules": ["a"]}):
        assert VBLoRAConfig(**options) == VariationalLoraConfig(**options)
    assert VBLoRAConfig(vb_r=4).peft_type == "VARIATIONAL_LORA"
    plain = VBLoRAConfig(r=4)
    assert type(plain) is VBLoRAConfig
    for same in (
        copy.copy(plain),
        copy.deepcopy(plain),
        pickle.loads(pickle.dumps(plain)),
        dataclasses.replace(plain),
        get_peft_config(plain.to_dict()),
    ):
        assert type(same) is VBLoRAConfig
        assert same == plain
    with pytest.raises(PeanutError, match="VariationalLoraConfig is given 'num_vectors'"):
        VBLoRAConfig(vb_r=4, num_vectors=8)
    assert METHODS["VBLORA"].config_class is VBLoRAConfig
