"""SHiRA against its entries (arXiv 2406.13175), the peer's places, masks of one's own, and files of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.shira import ShiraConfig

from ..support import Net, distance, one_thread, peer_model, randomised, refused, same_bits  # noqa: F401


def config(**options: Any) -> ShiraConfig:
    return ShiraConfig(target_modules=["layer"], **options)


def values_of(model: PeftModel) -> dict[str, Tensor]:
    values: dict[str, Tensor] = model.get_base_model().layer.values("default")
    return values


def test_the_update_is_zero_but_at_its_places() -> None:
    model = randomised(get_peft_model(Net(nn.Linear(8, 6).double()), config(r=2)))
    layer, values = model.get_base_model().layer, values_of(model)
    weight, (rows, columns) = values["shira_weight"], values["shira_indices"].tolist()
    assert len(set(zip(rows, columns, strict=True))) == weight.numel() == 2 * (8 + 6)
    expected = torch.zeros(6, 8, dtype=torch.float64)
    for value, row, column in zip(weight.tolist(), rows, columns, strict=True):
        expected[row, column] = value
    assert torch.equal(layer.delta("default"), expected)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = model(x)
    assert distance(y, x @ (layer.base_layer.weight + expected).T + layer.base_layer.bias) < 1e-14
    direction = torch.randn_like(y)
    y.backward(direction)
    assert weight.grad is not None
    assert distance(weight.grad, (direction.T @ x)[rows, columns]) < 1e-14
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("seed", [0, 5, 123456])
@pytest.mark.parametrize("size", [(8, 6), (6, 8), (9, 9)], ids=str)
def test_seeded_places_are_the_peers(seed: int, size: tuple[int, int]) -> None:
    chosen = config(r=2, random_seed=seed)
    places = values_of(get_peft_model(Net(nn.Linear(*size)), chosen))["shira_indices"]
    theirs = peer_model(Net(nn.Linear(*size)), chosen).base_model.model.layer.shira_indices["default"]
    assert same_bits(places, theirs)


def test_without_a_seed_each_layer_has_its_own_places() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layers = get_peft_model(net, ShiraConfig(target_modules=["0", "1"], r=1)).base_model.model
    one, other = (layer.values("default")["shira_indices"] for layer in layers)
    assert one.shape == other.shape == (2, 16)
    assert not torch.equal(one, other)


def test_start() -> None:
    model = get_peft_model(Net(nn.Linear(80, 60)), config(r=10))
    assert values_of(model)["shira_weight"].abs().max() == 0
    weight = values_of(get_peft_model(Net(nn.Linear(80, 60)), config(r=10, init_weights=False)))["shira_weight"]
    assert abs(weight.std().item() - 1) < 0.1


@pytest.mark.parametrize(("make", "at"), [(nn.Linear, (1, 2)), (Conv1D, (2, 1))], ids=["linear", "conv1d"])
def test_a_mask_of_ones_own(make: Any, at: tuple[int, int], tmp_path: Path) -> None:
    seen: list[tuple[nn.Module, int]] = []

    def mask_fn(module: nn.Module, r: int) -> Tensor:
        """As many of the largest weights as LoRA of rank r trains numbers, and one place for certain."""
        seen.append((module, r))
        score = module.weight.detach().abs().clone()
        score[at] = 100
        mask = torch.zeros_like(score)
        mask.view(-1)[score.view(-1).topk(14 * r).indices] = 1
        return mask

    layer = make(8, 6)
    out, inputs = layer.weight.shape if make is nn.Linear else layer.weight.T.shape
    model = randomised(get_peft_model(Net(layer), config(r=1, mask_type="largest", mask_fn=mask_fn)))
    assert all(module is layer and r == 1 for module, r in seen)
    places = set(zip(*values_of(model)["shira_indices"].tolist(), strict=True))
    W = layer.weight.detach() if make is nn.Linear else layer.weight.detach().T
    others = [(-W[o, i].abs().item(), (o, i)) for o in range(out) for i in range(inputs) if (o, i) != (1, 2)]
    assert places == {(1, 2)} | {place for _, place in sorted(others)[:13]}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(layer), tmp_path)  # the places are in the file, the function is not
    assert torch.equal(values_of(again)["shira_indices"], values_of(model)["shira_indices"])
    assert torch.equal(values_of(again)["shira_weight"], values_of(model)["shira_weight"])


def test_masks_that_do_not_fit() -> None:
    net = Net(nn.Linear(8, 6))
    with refused(net, r"mask_type='largest' without a mask_fn; .*give mask_fn"):
        get_peft_model(net, config(r=1, mask_type="largest"))
    with refused(net, r"mask_fn chose 48 places of \(6, 8\) for 'layer'; expected 14 of \(6, 8\)"):
        get_peft_model(net, config(r=1, mask_type="all", mask_fn=lambda module, r: torch.ones_like(module.weight)))
    with refused(net, r"mask_fn chose 0 places of \(3,\) for 'layer'"):
        get_peft_model(net, config(r=1, mask_type="none", mask_fn=lambda module, r: torch.zeros(3)))


def test_files_written_on_windows_load(tmp_path: Path) -> None:
    model = randomised(get_peft_model(Net(nn.Linear(8, 6)), config(r=2)))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.layer.shira_indices"
    assert tensors[key].dtype == torch.int32
    save_file(tensors | {key: tensors[key].float()}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="was saved by this library and"):
        again = PeftModel.from_pretrained(Net(nn.Linear(8, 6)), tmp_path)
    assert same_bits(values_of(again)["shira_indices"], tensors[key])


def test_more_entries_than_the_weight_has() -> None:
    net = Net(nn.Linear(8, 6))
    with refused(net, r"r=4 trains 56 entries of 'layer', which has 6×8; expected r of at most 3"):
        get_peft_model(net, config(r=4))
    get_peft_model(net, config(r=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 0}, "r=0; expected a whole number of at least 1"), ({"random_seed": 1.5}, "random_seed=1.5")],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        ShiraConfig(**options)


def test_an_unknown_mask_without_a_function_is_refused_where_the_adapter_is_made() -> None:
    config = ShiraConfig(mask_type="x", r=1, target_modules=["layer"])
    model = Net(nn.Linear(8, 6))
    with refused(model, r"^mask_type='x' without a mask_fn; expected a function \(module, r\) → mask; give mask_fn$"):
        get_peft_model(model, config)
    config.mask_fn = lambda module, r: (torch.arange(48) < 14 * r).reshape(6, 8).float()  # as scripts set it
    assert get_peft_model(model, config).get_nb_trainable_parameters()[0] == 14
