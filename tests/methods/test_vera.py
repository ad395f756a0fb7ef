"""VeRA against its formula (arXiv 2310.11454), its shared matrices and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.vera import VeraConfig
from peanut.operators import LowRank

from ..support import Net, distance, one_thread, peer_loaded, randomised, same_bits  # noqa: F401
from .pairs import Pair, adapted, peer_banks, saved, tensors, through

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # the peer's, of save_projection=False
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def config(**options: Any) -> VeraConfig:
    return VeraConfig(target_modules=["a", "b"], **{"r": 5, "projection_prng_key": 3} | options)


def test_layers_are_the_formula_with_slices_of_one_pair_of_matrices() -> None:
    model = adapted(config())
    t = tensors(model)
    A, B = t["vera_A"], t["vera_B"]
    assert (A.shape, B.shape) == ((5, 20), (20, 5))  # the widest input is b's, the widest output a's
    deltas = {
        name: torch.diag(t[f"{name}.vera_lambda_b"]) @ B[:out] @ torch.diag(t[f"{name}.vera_lambda_d"]) @ A[:, :width]
        for name, out, width in (("a", 20, 12), ("b", 8, 20))
    }
    assert distance(through(deltas, X), Pair().double()(X)) > 0.05
    assert distance(model(X), through(deltas, X)) < 1e-12


def test_kernels_and_embeddings_are_the_formula() -> None:
    pixels, ids = torch.randn(2, 3, 7, 7).double(), torch.tensor([[1, 4], [0, 1]])
    for layer, x in ((nn.Conv2d(3, 40, 3, stride=2, padding=1), pixels), (nn.Embedding(7, 6), ids)):
        model = randomised(get_peft_model(Net(layer.double()), VeraConfig(target_modules=["layer"], r=4))).eval()
        adapted_layer = model.get_base_model().layer
        t = {suffix: value.detach() for suffix, value in adapted_layer.values("default").items()}
        delta = torch.diag(t["vera_lambda_b"]) @ t["vera_B"] @ torch.diag(t["vera_lambda_d"]) @ t["vera_A"]
        plain = type(layer)(3, 40, 3, stride=2, padding=1) if x is pixels else nn.Embedding(7, 6)
        plain.double().load_state_dict(layer.state_dict())
        plain.weight.data += delta.T if x is ids else delta.reshape(plain.weight.shape)
        assert distance(model(x), plain(x)) < 1e-12


@pytest.mark.parametrize("key", [0, 11])
def test_seed_stands_for_the_matrices_of_the_peer(key: int) -> None:
    chosen = config(projection_prng_key=key)
    ours = tensors(get_peft_model(Pair(), chosen))
    for name, theirs in zip(("vera_A", "vera_B"), peer_banks(chosen, "vera_A", "vera_B"), strict=True):
        assert same_bits(ours[name], theirs)


def test_start_trains_the_scalings_alone() -> None:
    model = get_peft_model(Pair(), config(d_initial=0.3))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == (5 + 20) + (5 + 8)
    starts = [p.detach() for name, p in trained.items() if "lambda_d" in name]
    assert [same_bits(start, torch.full((5,), 0.3)) for start in starts] == [True, True]
    assert same_bits(model(X.float()), Pair()(X.float()))


@pytest.mark.parametrize("save_projection", [True, False])
def test_files_hold_the_matrices_once_or_not_at_all(save_projection: bool, tmp_path: Path) -> None:
    model = get_peft_model(Pair(), config(save_projection=save_projection))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) if parameter.requires_grad else 0)
    state = saved(model.eval(), tmp_path)
    shared = {key for key in state if key.startswith("base_model.vera")}
    assert shared == ({"base_model.vera_A", "base_model.vera_B"} if save_projection else set())
    assert len(state) == 4 + len(shared)
    for empty in (False, True):
        again = PeftModel.from_pretrained(Pair(), tmp_path, low_cpu_mem_usage=empty)
        assert same_bits(again(X.float()), model(X.float()))
    assert distance(peer_loaded(Pair(), tmp_path)(X.float()), model(X.float())) < 1e-5


def test_adapters_of_different_seeds_and_ranks_keep_their_own_matrices() -> None:
    model = adapted(config())
    alone = model(X)
    model.add_adapter("other", config(r=2, projection_prng_key=9))
    assert same_bits(model(X), alone)
    randomised(model, ["other"])
    model.set_adapter("other")
    assert distance(model(X), alone) > 0.05


def test_evaluation_has_ready_factors_below_full_rank() -> None:
    layer = adapted(config()).get_base_model().a
    with torch.no_grad():
        assert isinstance(layer.change("default").delta.for_inference(torch.float32), LowRank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0; expected a whole number of at least 1"),
        ({"vera_dropout": 1}, "vera_dropout=1; expected a probability"),
        ({"d_initial": float("nan")}, "d_initial=nan; expected a finite number"),
        ({"bias": "lora_only"}, "bias='lora_only'; expected 'none', 'all' or 'vera_only'"),
        ({"projection_prng_key": 0.5}, "projection_prng_key=0.5; expected a whole number"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        VeraConfig(**options)
