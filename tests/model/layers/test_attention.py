"""``nn.MultiheadAttention``, whose two projections are adapted; as Hugging Face PEFT does it where it does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import peanut
from peanut import (
    BOFTConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    VeraConfig,
    get_peft_model,
    to_lora,
)
from peanut.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from ...support import PEER_WARNINGS, directed, distance, frozen_state, gradients, randomised, same_bits

pytestmark = [
    *PEER_WARNINGS,
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),  # which torch's encoder makes of padding
]
TARGETS = ["attention", "head"]


class Block(nn.Module):
    """Attention called as open_clip calls it: what it sees by position, its mask by name."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, other: Tensor | None = None, **how: Any) -> Tensor:
        other = x if other is None else other
        y, weights = self.attention(x, other, other, **how)
        return self.head(y) if weights is None else self.head(y) * weights.mean()


def base(**options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block(**options).double()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.4)
    return block


X = torch.linspace(-1, 1, 4 * 4 * 8, dtype=torch.float64).sin().reshape(4, 4, 8)
MASK = torch.ones(4, 4).triu(1).bool()
CALLS: list[dict[str, Any]] = [
    {},
    {"need_weights": False},
    {"attn_mask": MASK, "is_causal": True, "need_weights": False},
    {"attn_mask": MASK.double() * -5},
    {"other": X.flip(0), "average_attn_weights": False},
    {"key_padding_mask": MASK},
]
OPTIONS: list[dict[str, Any]] = [{"batch_first": True}, {}, {"bias": False}, {"add_bias_kv": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("writer", ["peft", "peanut"])
def test_files_are_read_both_ways_and_mean_the_same(options: dict[str, Any], writer: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    library, other = (peft, peanut) if writer == "peft" else (peanut, peft)
    config = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "rank_pattern": {"attention": 3}}
    written = library.get_peft_model(base(**options), library.LoraConfig(target_modules=TARGETS, **config))
    written.save_pretrained(tmp_path)
    read = other.PeftModel.from_pretrained(base(**options), tmp_path)
    assert written.state_dict().keys() == read.state_dict().keys()
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                written.train(training), read.train(training)
                for how in CALLS:
                    expected = written(X, **how)
                    assert distance(read(X, **how), expected) < 1e-6
                    assert distance(base(**options)(X, **how), expected) > 1e-2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_slopes_are_the_peers_but_where_it_derives_half_of_what_it_computes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(base(**options), peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base(**options), tmp_path, is_trainable=True)
    for how in CALLS:
        slopes = []
        for model in (theirs, ours):
            model.zero_grad()
            directed(model(X, **how)).backward()
            slopes.append(gradients(model))
        expected, found = slopes
        assert len(expected) == 6
        assert expected.keys() == found.keys()
        for name, slope in expected.items():  # it adds the output projection's change twice, once without a gradient
            assert distance(found[name], slope * (2 if "out_proj" in name else 1)) < 1e-9


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=TARGETS),
        LoraConfig(r=2, use_dora=True, target_modules=TARGETS),
        PeanutConfig(r=2, depth=1, act_fn="gelu", target_modules=TARGETS),
        VeraConfig(r=2, target_modules=TARGETS),
        OFTConfig(oft_block_size=4, target_modules=TARGETS),
        BOFTConfig(boft_block_size=2, target_modules=["attention"]),
        IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    ],
    ids=lambda config: config.method,
)
def test_the_attention_has_both_changes(config: Any, tmp_path: Path) -> None:
    model = randomised(get_peft_model(base(), config))
    block: Any = model.get_base_model()
    written: Any = base()
    attention = block.attention
    written.attention.in_proj_weight.data += attention.delta("default")
    written.attention.out_proj.weight.data += attention.out_proj.delta("default")
    for layer, own in ((attention, "in_proj_bias"), (attention.out_proj, "bias")):
        change = layer.change("default")
        holder = written.attention if own == "in_proj_bias" else written.attention.out_proj
        getattr(holder, own).data = change.offset(getattr(holder, own).data)
    if config.target_modules == TARGETS:
        written.head.weight.data += block.head.delta("default")
        written.head.bias.data = block.head.change("default").offset(written.head.bias.data)
    before = frozen_state(model)
    model.eval()
    for how in CALLS:
        expected = model(X, **how)
        assert distance(expected, written(X, **how)) < 1e-9
    directed(model(X)).backward()
    assert gradients(model)
    assert all(slope.abs().sum() > 0 for slope in gradients(model).values())
    with model.disable_adapter(), torch.no_grad():
        assert same_bits(model(X), base()(X))
    model.save_pretrained(tmp_path)
    assert same_bits(PeftModel.from_pretrained(base(), tmp_path)(X), model(X))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(again(X), model(X))
    model.merge_adapter()
    assert distance(model(X, need_weights=False), written(X, need_weights=False)) < 1e-9
    assert {key: value for key, value in model.state_dict().items() if key in before}.keys() == before.keys()
    model.unmerge_adapter()
    after = frozen_state(model)
    assert before.keys() == after.keys()
    assert all(same_bits(after[key], value) for key, value in before.items())
    assert same_bits(copy.deepcopy(model).unload()(X), base()(X))
    plain = model.merge_and_unload()
    assert distance(plain(X), written(X)) < 1e-9
    assert plain.state_dict().keys() == base().state_dict().keys()
    assert type(plain.attention.out_proj) is type(written.attention.out_proj)


def test_a_live_model_of_the_peer_becomes_ours_and_back() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, rank_pattern={"attention": 3})
    theirs = peft.get_peft_model(base(), config)
    expected = theirs(X)
    ours = peanut.from_peft(theirs)
    layers = ours.get_submodule("base_model.model.attention"), theirs.get_submodule("base_model.model.attention")
    assert (layers[0].in_features, layers[0].out_features) == (layers[1].in_features, layers[1].out_features)
    assert [place.path for place in ours.adapters.places()] == ["attention", "attention.base_layer.out_proj", "head"]
    assert distance(ours(X), expected) < 1e-6
    again = peanut.to_peft(ours)
    assert type(again).__module__.startswith("peft")
    assert distance(again(X), expected) < 1e-6


@pytest.mark.parametrize("targets", [["self_attn"], ["self_attn", "linear2"]], ids=str)
@pytest.mark.parametrize("config", [LoraConfig(r=2), PeanutConfig(r=2)], ids=lambda config: config.method)
def test_torchs_fast_path_for_encoders_computes_with_the_adapters(config: Any, targets: list[str]) -> None:
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2).double()

    model = randomised(get_peft_model(encoder(), replace(config, target_modules=targets)))
    slow, padding = model.train()(X), torch.zeros(4, 4, dtype=torch.bool)
    padding[0, 3:] = True
    model.eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert distance(model(X), slow) < 1e-9
            assert distance(encoder().eval()(X), slow) > 1e-3
            padded = model(X, src_key_padding_mask=padding)
            model.merge_adapter()
            assert distance(model(X), slow) < 1e-9
            assert distance(model(X, src_key_padding_mask=padding)[~padding], padded[~padding]) < 1e-9
            model.unmerge_adapter()
            with model.disable_adapter():
                assert distance(model(X), encoder().eval()(X)) < 1e-9


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of its own doing
def test_it_is_compiled_in_one_graph_and_swapped_into(tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = randomised(get_peft_model(base(), PeanutConfig(r=2, target_modules=TARGETS)))
    randomised(get_peft_model(base(), LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))).save_pretrained(tmp_path)
    expected = model(X)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert distance(model(X), expected) < 1e-6
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert distance(compiled(X), expected) < 1e-6
    hotswap_adapter(compiled, tmp_path, "default")
    assert distance(compiled(X), PeftModel.from_pretrained(base(), tmp_path)(X)) < 1e-6
    assert counters["stats"]["unique_graphs"] == 1


def test_several_adapters_and_what_is_made_of_them(tmp_path: Path) -> None:
    model = get_peft_model(base(), PeanutConfig(r=2, target_modules=TARGETS), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["attention"]))
    model = randomised(model).eval()
    alone = []
    for name in ("a", "b"):
        model.set_adapter(name)
        alone.append(model(X))
    export = to_lora(model, "a")
    assert export.largest_error < 1e-6
    model.set_adapter(export.name)
    assert distance(model(X), alone[0]) < 1e-6
    export.save(tmp_path)
    assert distance(PeftModel.from_pretrained(base(), tmp_path)(X), alone[0]) < 1e-6
    model.set_adapter(["a", "b"])
    both = model(X)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert distance(model(X), both) < 1e-6
    model.set_adapter("b")
    for name in ("a", "sum", export.name):
        model.delete_adapter(name)
    assert list(model.peft_config) == ["b"]
    assert distance(model(X), alone[1]) < 1e-9


def test_what_is_not_done_is_one_line() -> None:
    model: Callable[..., nn.Module] = lambda: Block(kdim=4)  # noqa: E731
    with pytest.raises(PeanutError, match=r"^'attention': a MultiheadAttention whose query, key and value have differ"):
        get_peft_model(model(), LoraConfig(target_modules=["attention"]))
    with pytest.raises(PeanutError, match=r"^'attention\.out_proj' belongs .*; name 'attention', of which both"):
        get_peft_model(base(), LoraConfig(target_modules=["out_proj"]))
    several = get_peft_model(base(), LoraConfig(r=2, target_modules=["attention"])).eval()
    with pytest.raises(PeanutError, match="differ between the samples"):
        several(X, adapter_names=["default", "__base__", "default", "__base__"])
    with pytest.warns(peanut.OutOfReachWarning, match=r"in MultiheadAttention\.in_proj_weight"):
        linear = get_peft_model(base(), LoraConfig(r=2, target_modules="all-linear"))
    assert [place.path for place in linear.adapters.places()] == ["head"]
