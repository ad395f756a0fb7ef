"""Trainable tokens: new embeddings for some tokens, in an embedding, in a head tied to it, and in the peer's files."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.trainable_tokens import TokenAdapter, TrainableTokensConfig
from peanut.weights import FrozenLayer, kind_of

from ..support import (  # noqa: F401
    PEER_WARNINGS,
    Net,
    distance,
    one_thread,
    peer_loaded,
    peer_model,
    randomised,
    refused,
    same_bits,
    scattered,
)

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")]
IDS = torch.tensor([[7, 0, 3, 3], [9, 4, 7, 1]])
SUFFIX = "trainable_tokens_delta"


def config(*tokens: int, **options: Any) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=list(tokens), **{"target_modules": ["layer"], **options})


def llama(tiny_llama: Any, tied: bool) -> Any:
    return tiny_llama(tie_word_embeddings=tied).double()


def test_the_tokens_of_a_whole_vocabulary() -> None:
    count = 100_000
    start = perf_counter()
    net = Net(nn.Embedding(count, 2))
    with refused(net, r"token_indices holds 7 twice"):
        get_peft_model(net, config(*range(count), 7, 7))
    model = get_peft_model(net, config(*range(count)))
    assert perf_counter() - start < 5
    assert model.get_base_model().layer.values("default")[SUFFIX].shape == (count, 2)


def test_the_parameter_is_the_new_embedding() -> None:
    base = nn.Embedding(10, 6).double()
    model = randomised(get_peft_model(Net(base), config(7, 3)))
    new = model.get_base_model().layer.values("default")[SUFFIX]
    table = base.weight.detach().clone()
    table[7], table[3] = new[0].detach(), new[1].detach()
    assert distance(table[[7, 3]], base.weight[[7, 3]]) > 0.1
    y = model(IDS)
    assert distance(y, table[IDS]) < 1e-15
    others = (IDS != 7) & (IDS != 3)
    assert torch.equal(y[others], base.weight[IDS][others])
    direction = torch.randn_like(y)
    y.backward(direction)
    expected = torch.stack([direction[IDS == 7].sum(0), direction[IDS == 3].sum(0)])
    assert distance(new.grad, expected) < 1e-14
    assert base.weight.grad is None
    model.merge_adapter()
    assert distance(base.weight, table) < 1e-15


def test_a_head_scores_its_tokens_anew() -> None:
    base = nn.Linear(6, 10).double()
    model = randomised(get_peft_model(Net(base), config(7, 3)))
    new, x = model.get_base_model().layer.values("default")[SUFFIX].detach(), torch.randn(5, 6, dtype=torch.float64)
    table = base.weight.detach().clone()
    table[7], table[3] = new
    y = model(x)
    assert distance(y, x @ table.T + base.bias) < 1e-14
    others = [token for token in range(10) if token not in (3, 7)]
    assert torch.equal(y[:, others], base(x)[:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start(dtype: torch.dtype) -> None:
    base = nn.Embedding(10, 6).to(dtype)
    model = get_peft_model(Net(base), config(7, 3))
    new = model.get_base_model().layer.values("default")[SUFFIX]
    assert new.dtype == torch.float32
    assert torch.equal(new, base.weight[[7, 3]].float())
    assert same_bits(model(IDS), base.weight[IDS])
    wide = nn.Embedding(10, 600).to(dtype)
    model = get_peft_model(Net(wide), config(7, 3, init_weights=False))
    new = model.get_base_model().layer.values("default")[SUFFIX].detach()
    assert abs(new.std() - 1) < 0.1
    assert distance(new, wide.weight[[7, 3]]) > 0.5


def test_rows_that_a_resize_initialised_anew_do_not_matter(tmp_path: Path) -> None:
    model = randomised(get_peft_model(Net(nn.Embedding(10, 6)), config(8, 9)))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == {f"base_model.model.layer.{SUFFIX}"}
    other = nn.Embedding(10, 6)
    again = PeftModel.from_pretrained(Net(other), tmp_path, check_base=False)
    assert distance(again(torch.tensor([8, 9])), saved[f"base_model.model.layer.{SUFFIX}"]) < 1e-6


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_an_untargeted_model_has_its_embedding_trained_and_the_tied_head_with_it(tied: bool, tiny_llama: Any) -> None:
    base = llama(tiny_llama, tied)
    tokens = torch.tensor([[5, 9, 2, 5]])
    plain = base(tokens).logits
    model = get_peft_model(llama(tiny_llama, tied), TrainableTokensConfig(token_indices=[5, 2]))
    assert torch.equal(model(tokens).logits, plain)
    randomised(model)
    trained = [value for value in model.parameters() if value.requires_grad]
    assert len(trained) == 1
    table = base.get_input_embeddings().weight.detach().clone()
    table[5], table[2] = trained[0].detach()
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(table)
    assert distance(model(tokens).logits, base(tokens).logits) < 1e-12
    assert distance(plain, base(tokens).logits) > 1e-3
    model.merge_adapter()
    assert distance(model(tokens).logits, base(tokens).logits) < 1e-12
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, plain)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_files_go_both_ways(tied: bool, tiny_llama: Any, tmp_path: Path) -> None:
    tokens = torch.tensor([[5, 9, 2, 5]])
    chosen = TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed_tokens"])
    ours = randomised(get_peft_model(llama(tiny_llama, tied), chosen)).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peer_loaded(llama(tiny_llama, tied), tmp_path / "ours")
    assert distance(theirs(tokens).logits, ours(tokens).logits) < 1e-12
    theirs = peer_model(llama(tiny_llama, tied), chosen)
    scattered([value for value in theirs.parameters() if value.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(llama(tiny_llama, tied), tmp_path / "theirs")
    assert distance(again(tokens).logits, theirs(tokens).logits) < 1e-6  # the peer keeps the file in float32


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3, 10], "token_indices holds 10, for 'layer' of 10 tokens; expected each id once, from 0 to 9"),
        ([3, 5, 3], "token_indices holds 3 twice, for 'layer' of 10 tokens"),
        ([], "token_indices is empty, for 'layer' of 10 tokens"),
    ],
)
@pytest.mark.parametrize("layer", [nn.Embedding(10, 6), nn.Linear(6, 10)], ids=["embedding", "head"])
def test_tokens_that_do_not_fit(layer: nn.Module, tokens: list[int], message: str) -> None:
    net = Net(layer)
    with refused(net, message):
        get_peft_model(net, config(*tokens))


@pytest.mark.parametrize("token", [-1, 1.5, "a", True])
def test_what_is_no_token(token: Any) -> None:
    with pytest.raises(PeanutError, match=r"token_indices\[0\]=.*; expected a whole number of at least 0"):
        TrainableTokensConfig(token_indices=[token])


def test_the_adapter_beside_another_method_keeps_the_peers_names() -> None:
    layer = nn.Embedding(10, 6)
    kind = kind_of(layer)
    assert kind is not None
    frozen, method = FrozenLayer(layer, kind), TokenAdapter()
    values: dict[str, Tensor] = method.start(config(7, 3), frozen, torch.Generator())
    saved = values.keys() - method.rebuilt(config(7, 3))
    assert saved == {"token_adapter.trainable_tokens_delta"}
    values["token_adapter.trainable_tokens_delta"] += 1
    delta = method.change(config(7, 3), values, frozen).delta
    assert delta is not None
    assert distance(delta.rows(torch.arange(10)), torch.eye(10)[[7, 3]].sum(0)[:, None].expand(10, 6)) < 1e-6
