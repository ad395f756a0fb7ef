"""``convert_to_lora`` and ``save_as_lora``, whose results Hugging Face PEFT and this library read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peanut import (
    LoraConfig,
    OFTConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)

from ..support import PEER_WARNINGS, distance, randomised

pytestmark = PEER_WARNINGS
X = torch.linspace(-1, 1, 32).reshape(4, 8)


def _model(config: Any) -> tuple[nn.Module, Any]:
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    return copy.deepcopy(base), randomised(get_peft_model(base, config)).eval()


@pytest.mark.parametrize("rank", [8, 1.0])
@pytest.mark.parametrize("config", [PeanutConfig(r=3, target_modules=["0", "2"]), OFTConfig(r=2, target_modules=["0"])])
def test_it_computes_what_the_adapter_does(config: Any, rank: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, model = _model(config)
    keys = list(model.state_dict())
    lora, state = convert_to_lora(model, rank)
    save_as_lora(tmp_path, model, rank=rank)
    assert (list(model.state_dict()), list(model.peft_config)) == (keys, ["default"])
    ours = get_peft_model(copy.deepcopy(base), lora)
    set_peft_model_state_dict(ours, state)
    assert distance(ours.eval()(X), model(X)) < 1e-5
    assert distance(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(X), model(X)) < 1e-5
    assert distance(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(X), model(X)) < 1e-5
    assert distance(base(X), model(X)) > 0.01


def test_a_share_of_the_change_decides_the_rank() -> None:
    _, model = _model(OFTConfig(r=1, target_modules=["0"]))
    delta = model.get_base_model()[0].delta("default")
    energy = torch.linalg.svdvals(delta).square()
    ranks = {share: convert_to_lora(model, share)[0].r for share in (0.5, 0.9, 0.999)}
    assert len(set(ranks.values())) > 1
    assert all(energy[:r].sum() >= share * energy.sum() > energy[: r - 1].sum() for share, r in ranks.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_has_the_dtype_of_the_adapter(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    base = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    config = PeanutConfig(r=2, target_modules=["0"])
    narrow = randomised(get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False))
    lora, state = convert_to_lora(narrow, 2, progressbar=True)
    assert {value.dtype for value in state.values()} == {dtype}
    assert "Converting to LoRA" in capsys.readouterr().err
    ours = get_peft_model(copy.deepcopy(base), lora, autocast_adapter_dtype=False)
    set_peft_model_state_dict(ours, state)
    assert distance(ours(X.to(dtype)), narrow(X.to(dtype))) < 0.05
    wide = get_peft_model(base, config)
    assert {value.dtype for value in convert_to_lora(wide, 2)[1].values()} == {torch.float32}


def test_a_lora_is_told_to_be_one_already() -> None:
    _, model = _model(LoraConfig(r=2, target_modules=["0"]))
    delta = model.get_base_model()[0].delta("default")
    with pytest.warns(UserWarning, match=r"^adapter 'default' is a LoRA already"):
        lora, state = convert_to_lora(model, 2)
    factors = [value for _, value in sorted(state.items())]
    assert lora.r == 2
    assert distance(factors[1] @ factors[0], delta) < 1e-6


def test_what_is_trained_and_the_configs_stay() -> None:
    model = inject_adapter_in_model(PeanutConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(8, 8)))
    model[0].peanut_A["default"].requires_grad_(False)
    trained = [name for name, own in model.named_parameters() if own.requires_grad]
    del model.peft_config  # what the peer's scripts may do
    assert convert_to_lora(model, 2)[0].r == 2
    assert (
        [name for name, own in model.named_parameters() if own.requires_grad]
        == trained
        == ["0.peanut_B.default.weight"]
    )


@pytest.mark.parametrize("rank", [0, 0.0, 1.5, -2])
def test_a_rank_that_is_none_is_refused(rank: float) -> None:
    _, model = _model(LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(PeanutError, match="rank="):
        convert_to_lora(model, rank)
    assert list(model.peft_config) == ["default"]


def test_the_random_state_stays_as_it_was() -> None:
    _, model = _model(PeanutConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    before = torch.get_rng_state()
    convert_to_lora(model, 2)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    assert torch.equal(torch.get_rng_state(), before)
