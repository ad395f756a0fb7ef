"""RandLoRA against its formula (arXiv 2502.00987), its shared bases and its files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.randlora import RandLoraConfig

from ..support import distance, one_thread, peer_loaded, peer_model, same_bits, scattered  # noqa: F401
from .pairs import Pair, adapted, peer_banks, saved, tensors, through

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not"),  # the peer's, of save_projection=False
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # the peer's, of bases that are there only once
]
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def config(**options: Any) -> RandLoraConfig:
    return RandLoraConfig(target_modules=["a", "b"], **{"r": 3, "randlora_alpha": 2} | options)


def delta(t: dict[str, Tensor], name: str, out: int, width: int, r: int, alpha: float) -> Tensor:
    """(α/r) Σ over the pairs of a row of S and a column of B that share a place."""
    m, M, n = min(out, width), max(out, width), math.ceil(min(out, width) / r)
    A, B = t["randlora_A"], t["randlora_B"]
    scale, gamma = t[f"{name}.randlora_lambda"], t[f"{name}.randlora_gamma"]
    assert (scale.shape, gamma.shape) == ((r, n), (n, m))
    total = torch.zeros(M, m, dtype=torch.float64)
    for place in range(n * r):
        k, j = divmod(place, n)
        basis, column = divmod(place, r)
        total += torch.outer(B[:M, basis, column], scale[k, j] * A[k, 0, :m] * gamma[j])
    return alpha / r * (total if width == m else total.T)


@pytest.mark.parametrize("r", [2, 3, 16], ids=lambda r: f"r={r}")
def test_layers_are_the_formula_with_slices_of_the_same_bases(r: int) -> None:
    model = adapted(config(r=r))
    t = tensors(model)
    assert (t["randlora_A"].shape, t["randlora_B"].shape) == ((r, 1, 20), (20, math.ceil(20 / r), r))
    deltas = {"a": delta(t, "a", 20, 12, r, 2), "b": delta(t, "b", 8, 20, r, 2)}
    assert distance(through(deltas, X), Pair().double()(X)) > 0.05
    assert distance(model(X), through(deltas, X)) < 1e-12
    assert torch.linalg.matrix_rank(deltas["a"]) == 12  # full, whatever r


@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}])
@pytest.mark.parametrize("key", [0, 11])
def test_seed_stands_for_the_bases_of_the_peer(key: int, kind: dict[str, Any]) -> None:
    chosen = config(projection_prng_key=key, **kind)
    ours = tensors(get_peft_model(Pair(), chosen))
    for name, theirs in zip(("randlora_A", "randlora_B"), peer_banks(chosen, "randlora_A", "randlora_B"), strict=True):
        assert same_bits(ours[name], theirs.float())
        assert len(ours[name].unique()) == 3 if kind else len(ours[name].unique()) > 30


def test_starts_as_the_peer_does() -> None:
    ours = get_peft_model(Pair(), config())
    theirs = peer_model(Pair(), config())
    state = {key: value for key, value in theirs.state_dict().items() if "lambda" in key or "gamma" in key}
    own = tensors(ours)
    assert len(state) == 4
    for key, value in state.items():
        layer, suffix = key.removesuffix(".default").split(".")[-2:]
        assert same_bits(own[f"{layer}.{suffix}"], value)
    assert same_bits(ours(X.float()), Pair()(X.float()))
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        value.numel() for value in state.values()
    )


@pytest.mark.parametrize("save_projection", [True, False])
def test_files_hold_the_bases_once_or_not_at_all(save_projection: bool, tmp_path: Path) -> None:
    model = get_peft_model(Pair(), config(save_projection=save_projection))
    scattered([p for p in model.parameters() if p.requires_grad])
    state = saved(model.eval(), tmp_path)
    shared = {key for key in state if key.endswith(("_A", "_B"))}
    assert shared == ({"base_model.randlora_A", "base_model.randlora_B"} if save_projection else set())
    assert len(state) == 4 + len(shared)
    for empty in (False, True):
        again = PeftModel.from_pretrained(Pair(), tmp_path, low_cpu_mem_usage=empty)
        assert same_bits(again(X.float()), model(X.float()))
    assert distance(peer_loaded(Pair(), tmp_path)(X.float()), model(X.float())) < 1e-5


def test_files_that_repeat_the_bases_for_every_layer_load(tmp_path: Path) -> None:
    theirs = peer_model(Pair(), config())
    scattered([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    assert sum(key.endswith("randlora_A") for key in load_file(tmp_path / "adapter_model.safetensors")) == 3
    model = PeftModel.from_pretrained(Pair(), tmp_path)
    assert distance(theirs(X.float()), Pair()(X.float())) > 0.05
    assert distance(model(X.float()), theirs(X.float())) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0; expected a whole number of at least 1"),
        ({"randlora_dropout": -0.1}, "randlora_dropout=-0.1; expected a probability"),
        ({"randlora_alpha": "640"}, "randlora_alpha='640'; expected a finite number"),
        ({"bias": True}, "bias=True; expected 'none', 'all' or 'randlora_only'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        RandLoraConfig(**options)
