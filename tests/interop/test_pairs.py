"""Two adapters of the peer that act together: made ours and given back they compute the same, or they are refused."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import set_adapter
from torch import Tensor, nn

from peanut import PeanutError, from_peft, to_peft
from peanut.interop import from_peft as importing
from peanut.interop import to_peft as exporting
from peanut.model.adapters.adapter_set import AdapterSet

from ..support import INPUTS, LAYERS, PEER_WARNINGS, Net, distance, one_thread, scattered  # noqa: F401

pytestmark = [
    *PEER_WARNINGS,
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter name '.' should not be contained"),
]
SAME = 1e-5
ADAPTERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2},
    "LORA with a bias": {"r": 2, "lora_bias": True},
    "LORA, DoRA": {"r": 2, "use_dora": True},
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "HRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "IA3 of inputs": {"feedforward_modules": ["layer"]},
    "C3A": {"block_size": 4},
    "MISS": {"r": 4},
    "MISS, bat": {"r": 4, "init_weights": "bat"},
    "ROAD": {"group_size": 4},
    "LOKR": {"r": 1},
    "SHIRA": {"r": 1},
    "FOURIERFT": {"n_frequency": 20},
    "PEANUT": {"r": 2, "depth": 1},
    "ADALORA": {"init_r": 2, "target_r": 1, "total_step": 9},
    "VERA": {"r": 4},
    "RANDLORA": {"r": 3},
    "VBLORA": {"r": 2, "num_vectors": 6, "vector_length": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 3]},
}
BESIDE = {"TRAINABLE_TOKENS": {"token_indices": [5, 6]}}
"""Of the second adapter of a pair, where it cannot be as the first."""


def method_of(name: str) -> str:
    return name.partition(" ")[0].rstrip(",")


def config(name: str, second: bool = False) -> Any:
    kind = method_of(name)
    made = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    return made(target_modules=["layer"], **ADAPTERS[name] | (BESIDE.get(name, {}) if second else {}))


def together(layer: nn.Module, first: str, second: str, order: str) -> Any:
    """The peer's model with a first adapter in the layer and a second one; ``None`` where the peer itself fails."""
    torch.manual_seed(1)
    model: Any = Net(layer)
    try:
        if method_of(first) == method_of(second):
            model = peft.get_peft_model(model, config(first), "a")
            model.add_adapter("b", config(second, second=True))
            model.base_model.set_adapter(list(order))
        else:
            peft.inject_adapter_in_model(config(first), model, "a")
            peft.inject_adapter_in_model(config(second, second=True), model, "b")
            set_adapter(model, list(order))
        own = {name: value for name, value in model.named_parameters() if {"a", "b"} & set(name.split(".")[-2:])}
        scattered(value for name, value in own.items() if "ranknum" not in name)
        return model.eval()
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError):
        return None


def answers(model: nn.Module, x: Tensor) -> Tensor | None:
    """In evaluation and in training; ``None`` where the peer itself fails."""
    try:
        with torch.no_grad():
            found = torch.stack([model.eval()(x), model.train()(x)])
    except (KeyError, RuntimeError):  # shapes
        return None
    model.eval()
    return found


def compared(theirs: Any, x: Tensor, expected: Tensor) -> tuple[float, float]:
    """How far ours is from the peer's, and the peer's made of ours from that."""
    ours = from_peft(theirs)
    found = answers(ours, x)
    assert found is not None
    back = answers(to_peft(ours), x)
    assert back is not None
    return distance(found, expected), distance(back, expected)


def check(kind: str, layer: str, first: str, second: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of a pair under both orders of activation; it is refused if, and only if, it would differ."""
    outcomes, x = [], INPUTS[kind]()
    for order in ("ab", "ba"):
        theirs = together(LAYERS[kind][layer](), first, second, order)
        expected = None if theirs is None else answers(theirs, x)
        if expected is None:
            continue
        twin, said = copy.deepcopy(theirs), f"{second} around {first}, {order}"
        try:
            assert max(compared(theirs, x, expected)) < SAME, said
            outcomes.append("equal")
        except PeanutError as error:
            if "act together" not in str(error):
                continue  # one of the two alone is not for this layer
            assert torch.equal(answers(theirs, x), expected), said  # type: ignore[arg-type]
            with monkeypatch.context() as without:
                without.setattr(importing, "check_together", lambda *_: None)
                different = distance(answers(from_peft(twin), x), expected)  # type: ignore[arg-type]
            assert different > SAME, said
            outcomes.append("refused")
    return outcomes


@pytest.mark.parametrize("first", ADAPTERS)
def test_pairs_on_a_linear_layer(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS["linear"], "square, no bias", lambda: nn.Linear(12, 12, bias=False))
    monkeypatch.setitem(LAYERS["linear"], "square", lambda: nn.Linear(12, 12))
    layer = "square, no bias" if first == "TRAINABLE_TOKENS" else "square"
    outcomes = [outcome for second in ADAPTERS for outcome in check("linear", layer, first, second, monkeypatch)]
    assert "equal" in outcomes


OTHER = [(kind, first, second) for kind in ("conv", "embedding") for first in ADAPTERS for second in ADAPTERS
         if method_of(first) == method_of(second)]  # fmt: skip


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_pairs_of_one_method_on_other_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [
        outcome
        for each, first, second in OTHER
        if each == kind
        for outcome in check(kind, "plain", first, second, monkeypatch)
    ]
    assert {"equal", "refused"} == set(outcomes)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_ours_that_the_peer_would_chain_are_not_given(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was activated after they were made ours."""
    theirs = together(nn.Linear(12, 12), "LORA", "OFT", "a")
    model, x = from_peft(theirs), INPUTS["linear"]()
    AdapterSet.of(model).activate(list(order))
    expected = answers(model, x)
    with pytest.raises(PeanutError, match=r"^adapters '[ab]' and '[ab]' act together on 'layer'"):
        to_peft(model)
    assert torch.equal(answers(model, x), expected)  # type: ignore[arg-type]
    monkeypatch.setattr(exporting, "check_together", lambda *_: None)
    assert distance(answers(to_peft(model), x), expected) > SAME  # type: ignore[arg-type]
