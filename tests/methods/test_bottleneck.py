"""Bottleneck adapters against their formula, and against the package ``adapters``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeanutError, get_peft_model
from peanut.methods.bottleneck import BottleneckConfig

from ..references.reading import NAMES, Reference, load
from ..support import distance, filled, one_thread, randomised  # noqa: F401

REFERENCES = [name for name in NAMES if re.match(r"adapters_(houlsby|pfeiffer|parallel)", name)]


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_package_adapters(name: str) -> None:
    reference = load(name)
    options = reference.config["options"]
    config = BottleneckConfig(
        style=name.split("_")[1],  # type: ignore[arg-type]
        act_fn=options["non_linearity"],
        scaling=options["scaling"],
        reduction_factor=options["reduction_factor"],
    )
    model = get_peft_model(reference.base_model(), config).eval()
    paths = sorted({key.rpartition(".bottleneck")[0] for key, _ in model.adapters.parameters("default")}, key=order)
    theirs = sorted({key.partition(".adapters.reference.")[0] for key in reference.adapter}, key=order)
    values = {}
    for ours, other in zip(paths, theirs, strict=True):
        for part, their_part in (("down", "adapter_down.0"), ("up", "adapter_up")):
            for tensor in ("weight", "bias"):
                key = f"{other}.adapters.reference.{their_part}.{tensor}"
                values[f"{ours}.bottleneck_{part}.{tensor}"] = reference.adapter[key]
    assert len(values) == len(reference.adapter)
    with torch.no_grad():
        output = filled(model, values)(**reference.call())
    assert compared(reference, output) < 1e-6


def compared(reference: Reference, output: Any) -> float:
    found = output.logits if "logits" in output else output.last_hidden_state
    return distance(reference.compared(found), reference.compared(reference.outputs["adapted"]))


def order(path: str) -> tuple[int, bool]:
    """By block, attention first."""
    return int(re.findall(r"\.(\d+)\.?", path)[0]), "att" not in path


# Against the formula, written again


class Block(nn.Module):
    """A linear layer and a norm, as at the end of a block of BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x))


def blocks() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Block(), nn.Linear(8, 5)).double().eval()


def formula(values: dict[str, Tensor], path: str, x: Tensor, scaling: float) -> Tensor:
    D, b_d = values[f"{path}.bottleneck_down.weight"], values[f"{path}.bottleneck_down.bias"]
    U, b_u = values[f"{path}.bottleneck_up.weight"], values[f"{path}.bottleneck_up.bias"]
    middle = x @ D.T + b_d
    return scaling * ((middle * 0.5 * (1 + torch.erf(middle / 2**0.5))) @ U.T + b_u)


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("target", ["0.dense", "0.norm"])
def test_formula(style: Any, target: str) -> None:
    base, x = blocks(), torch.randn(3, 4, 6, dtype=torch.float64)
    config = BottleneckConfig(target_modules=[target], style=style, bottleneck_size=3, act_fn="gelu", scaling=0.7)
    model = randomised(get_peft_model(blocks(), config)).eval()
    values = {key: value.detach() for key, value in model.adapters.parameters("default")}
    middle, norm = base[0].dense(x), base[0].norm
    if target == "0.dense":
        given = x if style == "parallel" else middle
        expected = norm(middle + formula(values, target, given, 0.7))
    elif style == "pfeiffer":
        expected = norm(middle + formula(values, target, norm(middle), 0.7))
    else:
        given = middle if style == "parallel" else norm(middle)
        expected = norm(middle) + formula(values, target, given, 0.7)
    assert distance(model(x), base[1](expected)) < 1e-12
    assert distance(model(x), base(x)) > 0.1


def test_two_at_a_norm_follow_each_other() -> None:
    """As if the second was put into a model in which the first is built in; a third, at the output, joins them."""
    base, x = blocks(), torch.randn(3, 4, 6, dtype=torch.float64)
    config = BottleneckConfig(target_modules=["0.norm"], style="pfeiffer", bottleneck_size=3, act_fn="gelu")
    behind = BottleneckConfig(target_modules=["0.norm"], style="houlsby", bottleneck_size=2, act_fn="gelu")
    model = get_peft_model(blocks(), config, "one")
    model.add_adapter("two", config)
    model.add_adapter("behind", behind)
    randomised(model).eval()
    names = ("one", "two", "behind")
    one, two, three = ({key: v.detach() for key, v in model.adapters.parameters(name)} for name in names)
    norm, middle = base[0].norm, base[0].dense(x)
    first = middle + formula(one, "0.norm", norm(middle), 1)
    second = first + formula(two, "0.norm", norm(first), 1)
    model.set_adapter(["one", "two"])
    assert distance(model(x), base[1](norm(second))) < 1e-12
    model.set_adapter(["one", "two", "behind"])
    assert distance(model(x), base[1](norm(second) + formula(three, "0.norm", norm(second), 1))) < 1e-12
    model.set_adapter(["behind", "two"])
    changed = norm(middle) + formula(three, "0.norm", norm(middle), 1)
    expected = changed + norm(middle + formula(two, "0.norm", changed, 1)) - norm(middle)
    assert distance(model(x), base[1](expected)) < 1e-12


def test_two_styles_read_different_inputs_at_one_place(tiny_llama: Any) -> None:
    x = torch.tensor([[3, 4, 5, 6]])
    model = get_peft_model(tiny_llama(), BottleneckConfig(style="houlsby"), "houlsby")
    model.add_adapter("parallel", BottleneckConfig(style="parallel"))
    randomised(model, scale=0.1).eval()
    for style in ("houlsby", "parallel"):
        alone = get_peft_model(tiny_llama(), BottleneckConfig(style=style), style)  # type: ignore[arg-type]
        filled(alone, dict(model.adapters.parameters(style)), style).eval()
        model.set_adapter(style)
        assert torch.equal(model(x).logits, alone(x).logits)
    model.set_adapter(["houlsby", "parallel"])
    both = model(x).logits
    model.delete_adapter("houlsby")
    assert distance(both, model(x).logits) > 1e-3
    model.unload()


# Starts


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
def test_defaults_of_a_style(style: Any) -> None:
    config = BottleneckConfig(style=style)
    found = (config.act_fn, config.reduction_factor, config.scaling)
    assert found == {"houlsby": ("swish", 16, 1), "pfeiffer": ("relu", 16, 1), "parallel": ("relu", 2, 4)}[style]


@pytest.mark.parametrize(("init", "low", "high"), [("near_identity", 1e-8, 1e-4), ("bert", 1e-4, 0.1), ("mam", 0, 0)])
def test_starts(init: Any, low: float, high: float) -> None:
    base, x = blocks(), torch.randn(3, 4, 6, dtype=torch.float64)
    config = BottleneckConfig(target_modules=["0.dense"], init_weights=init, bottleneck_size=3)
    model = get_peft_model(blocks(), config).eval()
    assert low <= distance(model(x), base(x)) <= high


def test_deviations_of_a_start() -> None:
    config = BottleneckConfig(target_modules=["0"], reduction_factor=2)
    model = get_peft_model(nn.Sequential(nn.Linear(400, 400)), config)
    values = dict(model.adapters.parameters("default"))
    assert sorted(value.numel() for value in values.values()) == [200, 400, 80000, 80000]
    for key, value in values.items():
        assert value.detach().std().item() == pytest.approx(0 if key.endswith("bias") else 1e-3, rel=0.02)


def test_dropout_falls_on_what_is_added() -> None:
    config = BottleneckConfig(target_modules=["0"], style="houlsby", dropout=0.5, bottleneck_size=8)
    base = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(10, 64)
    y = base(x).detach()
    model = randomised(get_peft_model(base, config))
    whole = model.eval()(x) - y
    found = model.train()(x) - y
    zero = found.abs() < 1e-6
    assert 0.4 < zero.float().mean() < 0.6
    assert torch.allclose(found[~zero], 2 * whole[~zero], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "serial"}, "style='serial'; expected 'houlsby', 'pfeiffer' or 'parallel'"),
        ({"bottleneck_size": 0}, "bottleneck_size=0"),
        ({"bottleneck_size": 4, "reduction_factor": 2}, "one of the two"),
        ({"reduction_factor": -1}, "reduction_factor=-1"),
        ({"act_fn": "swosh"}, "act_fn='swosh'.*'swish'"),
        ({"scaling": float("nan")}, "scaling=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"init_weights": "zero"}, "init_weights='zero'"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        BottleneckConfig(**options)


def test_a_factor_that_no_number_is_divided_by_asks_for_too_much() -> None:
    config = BottleneckConfig(target_modules=["0"], reduction_factor=5e-324)
    with pytest.raises(PeanutError, match=r"sizes that a tensor can have|what this machine's memory holds"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
