"""Whoever holds an adapted layer's weight otherwise than by reading it is told of when the adapter is added."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peanut import LoraConfig, PeanutConfig, PeftModel, get_peft_model

from ...support import distance, one_thread, randomised, same_bits  # noqa: F401


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.proj(x))


def told(model: nn.Module, names: list[str], method: Any = LoraConfig) -> list[str]:
    """What is said when an adapter is added."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        get_peft_model(model, method(r=2, target_modules=names))
    return [str(each.message) for each in found]


KEPT: dict[str, Callable[[Any], Any]] = {
    "w": lambda net: object.__setattr__(net, "w", net.proj.weight),
    "parameter": lambda net: setattr(net, "parameter", net.proj.weight),
    "weights": lambda net: setattr(net, "weights", [0, net.proj.weight]),
    "by_name": lambda net: setattr(net, "by_name", {"proj": (net.proj.weight,)}),
    "view": lambda net: object.__setattr__(net, "view", net.proj.weight.T),
    "rows": lambda net: object.__setattr__(net, "rows", net.proj.weight.data[3:]),
    "buffer": lambda net: net.register_buffer("buffer", net.proj.weight.detach()),
    "out.w": lambda net: object.__setattr__(net.out, "w", net.proj.weight),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("method", [LoraConfig, PeanutConfig])
def test_a_module_that_keeps_the_weight_is_told_of(name: str, method: Any) -> None:
    net = Net()
    KEPT[name](net)
    (line,) = told(net, ["proj"], method)
    assert line.startswith(f"'{name}' holds the weight of 'proj', and what computes with that computes without")
    net = Net()
    KEPT[name](net)
    assert told(net, ["out"]) == []


HELD: dict[str, Callable[[Any], Any]] = {
    "steps": lambda net: setattr(net, "steps", [net.proj, net.out]),
    "pair": lambda net: setattr(net, "pair", (0, (net.proj,))),
    "by_name": lambda net: setattr(net, "by_name", {"proj": net.proj.forward}),
    "later": lambda net: setattr(net, "later", partial(net.proj)),
    "given": lambda net: setattr(net, "given", partial(torch.nn.Module.__call__, self=net.proj)),
    "hidden": lambda net: object.__setattr__(net, "hidden", net.proj),
    "out.other": lambda net: object.__setattr__(net.out, "other", net.proj),
}
WAYS: dict[str, Any] = {
    "adapted": LoraConfig(r=2, target_modules=["proj"]),
    "trained whole": LoraConfig(r=2, target_modules=["last"], modules_to_save=["proj"]),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_holds_the_layer_outside_of_the_modules_is_told_of(name: str, way: str) -> None:
    net = Net()
    net.last = nn.Linear(3, 3)
    HELD[name](net)
    with pytest.warns(UserWarning, match="itself, and what calls it there computes without") as found:
        model = get_peft_model(net, WAYS[way])
    assert [str(each.message).partition(" itself")[0] for each in found] == [f"'{name}' holds 'proj'"]
    assert told(model.unload(), ["last"]) == []


def test_a_layer_that_holds_itself_or_stands_in_the_modules_is_not_told_of() -> None:
    net = Net()
    net.again = nn.ModuleList([net.proj])
    net.blocks = [net]  # in which the layer is replaced
    object.__setattr__(net.proj, "itself", [net.proj.forward])  # as accelerate's hooks do
    assert told(net, ["proj"]) == []


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


IDS = torch.arange(6).view(1, -1)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS).logits  # type: ignore[no-any-return]


TIED: list[tuple[list[str], str]] = [
    (["shared"], "'shared' shares its weight with 'encoder.embed_tokens', 'decoder.embed_tokens'"),
    (["encoder.embed_tokens"], "'encoder.embed_tokens' shares its weight with 'shared', 'decoder.embed_tokens'"),
    (["embed_tokens"], ""),
    (["shared", "embed_tokens"], ""),
    (["lm_head"], ""),
]


@pytest.mark.parametrize(("names", "line"), TIED, ids=[str(names) for names, _ in TIED])
def test_layers_that_share_the_weight_and_are_not_adapted_are_told_of(names: list[str], line: str) -> None:
    found = told(t5(), names)
    assert [each.partition(", which")[0] for each in found] == [line] * bool(line)


WHOLE = [(["shared"], True), (["shared", "lm_head"], True), (["shared", "embed_tokens"], False), (["lm_head"], False)]


@pytest.mark.parametrize(("names", "unused"), WHOLE, ids=[str(names) for names, _ in WHOLE])
def test_modules_trained_whole_that_share_the_weight_with_others_are_told_of(names: list[str], unused: bool) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        get_peft_model(t5(), LoraConfig(r=2, target_modules=["q"], modules_to_save=names))
    line = "'shared' shares its weight with 'encoder.embed_tokens', 'decoder.embed_tokens'"
    assert [str(each.message).partition(", which")[0] for each in found] == [line] * unused


@pytest.mark.filterwarnings("ignore:'.*shares its weight with")
@pytest.mark.parametrize("names", [names for names, _ in TIED], ids=str)
def test_merging_writes_into_no_layer_that_is_not_adapted(names: list[str]) -> None:
    model: PeftModel = randomised(get_peft_model(t5(), LoraConfig(r=2, target_modules=names))).eval()
    y, base = logits(model), t5()
    assert same_bits(y, logits(base)) == (names == ["shared"])
    model.merge_adapter()
    assert distance(logits(model), y) < 1e-5
    merged: Any = model.merge_and_unload()
    assert distance(logits(merged), y) < 1e-5
    for path in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        adapted = any(path == name or path.endswith(f".{name}") for name in names)
        assert same_bits(merged.get_submodule(path).weight, base.get_submodule(path).weight) != adapted
