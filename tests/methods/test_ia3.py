"""(IA)³ against its formula, against the peer, and which layers it treats as feed-forward ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTModel,
    T5Config,
    T5Model,
)
from transformers.pytorch_utils import Conv1D

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.ia3 import IA3Config
from peanut.model.adapters.adapter_set import AdapterSet

from ..support import PEER_WARNINGS, Net, distance, one_thread, peer_model, randomised, scattered  # noqa: F401

pytestmark = PEER_WARNINGS


def net(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    made = Net(layer).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def layer_of(model: Any, path: str = "layer") -> Any:
    return dict(AdapterSet.of(model).layers())[path]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    ).eval()


@pytest.mark.parametrize("inside", [False, True])
def test_output_or_input_is_scaled(inside: bool) -> None:
    base = net(nn.Linear(12, 8))
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if inside else [])
    model = randomised(get_peft_model(base, config)).eval()
    layer = layer_of(model)
    W, b, gains = layer.frozen.matrix().detach(), base.layer.bias, layer.values("default")["ia3_l"].detach()
    assert gains.shape == ((1, 12) if inside else (8, 1))
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = (x * gains.flatten()) @ W.T + b if inside else (x @ W.T + b) * gains.flatten()
    assert distance(model(x), expected) < 1e-12
    assert distance(W + layer.delta("default"), W * gains) < 1e-12
    model.merge_adapter()
    assert distance(model(x), expected) < 1e-12


@pytest.mark.parametrize("inside", [False, True])
def test_convolution_scales_channels(inside: bool) -> None:
    base = net(nn.Conv2d(4, 10, (3, 2), padding=1))
    config = IA3Config(target_modules=["layer"], feedforward_modules=".*" if inside else [])
    model = randomised(get_peft_model(base, config)).eval()
    layer = layer_of(model)
    gains = layer.values("default")["ia3_l"].detach()
    assert gains.shape == ((1, 4, 1, 1) if inside else (1, 10, 1, 1))
    x, module = torch.randn(2, 4, 9, 7, dtype=torch.float64), layer.base_layer
    expected = module(x * gains) if inside else module(x) * gains
    assert distance(model(x), expected) < 1e-12


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv"])
def test_equals_the_peer(kind: str, inside: bool) -> None:
    layers = {"linear": nn.Linear(12, 8), "conv1d": Conv1D(8, 12), "conv": nn.Conv2d(4, 10, 3, stride=2, padding=1)}

    def base() -> Net:
        return net(layers[kind], torch.float32)

    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if inside else [])
    model = randomised(get_peft_model(base(), config)).eval()
    value = layer_of(model).values("default")["ia3_l"]
    x = torch.randn(2, 4, 9, 7) if kind == "conv" else torch.randn(5, 12)
    y = model(x)
    theirs = peer_model(base(), config)
    own = theirs.base_model.model.layer.ia3_l["default"]
    assert own.shape == value.shape
    own.data.copy_(value)
    assert distance(y, theirs(x)) < 1e-5


def test_random_start() -> None:
    config = IA3Config(target_modules=["layer"], feedforward_modules=[], init_ia3_weights=False)
    gains = layer_of(get_peft_model(net(nn.Linear(12, 500)), config)).values("default")["ia3_l"]
    assert abs(gains.mean()) < 0.2
    assert 0.9 < gains.std() < 1.1


@pytest.mark.parametrize(
    ("targets", "given", "expected"),
    [
        (["k_proj", "v_proj", "down_proj"], None, ["down_proj"]),
        (["k_proj", "v_proj"], None, []),
        (["k_proj", "mlp.down_proj"], None, ["mlp.down_proj"]),
        (["k_proj", "down_proj"], [], []),
        (["k_proj", "down_proj"], ["k_proj"], ["k_proj"]),
    ],
)
def test_feed_forward_layers_of_an_architecture(targets: list[str], given: Any, expected: list[str]) -> None:
    config = IA3Config(target_modules=targets, feedforward_modules=given)
    model = get_peft_model(llama(), config)
    assert AdapterSet.of(model).configs["default"].feedforward_modules == expected
    for path, layer in AdapterSet.of(model).layers():
        inside = any(path.endswith(name) for name in expected)
        assert (layer.change("default").in_scale is not None) == inside
        assert (layer.change("default").left is None) == inside


def test_file_of_the_peer_on_an_architecture(tmp_path: Path) -> None:
    import peft

    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"])
    theirs = peft.get_peft_model(llama(), config).eval()
    scattered([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    x = torch.arange(8)[None]
    assert distance(model(x).logits, theirs(x).logits) < 1e-5
    assert distance(model(x).logits, llama()(x).logits) > 0.01


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5", "opt"])
def test_defaults_of_an_architecture_are_those_of_the_peer(architecture: str) -> None:
    import peft

    made: dict[str, Callable[[], Any]] = {
        "llama": llama,
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8)),
        "bert": lambda: BertModel(
            BertConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
        ),
        "t5": lambda: T5Model(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)),
        "opt": lambda: OPTModel(
            OPTConfig(vocab_size=11, hidden_size=8, ffn_dim=12, num_hidden_layers=1, num_attention_heads=2)
        ),
    }
    ours = get_peft_model(made[architecture](), IA3Config())
    theirs = peft.get_peft_model(made[architecture](), peft.IA3Config())
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): tuple(parameter.shape)
        for name, parameter in theirs.named_parameters()
        if "ia3_l" in name
    }
    found = {path: tuple(layer.values("default")["ia3_l"].shape) for path, layer in AdapterSet.of(ours).layers()}
    assert found == expected


def test_names_that_are_no_targets_are_refused() -> None:
    with pytest.raises(PeanutError, match=r"feedforward_modules names 'fc2'; expected .*nearest: 'fc1'"):
        IA3Config(target_modules=["fc1"], feedforward_modules=["fc2"])
    with pytest.raises(PeanutError, match="feedforward_modules='\\('"):
        IA3Config(feedforward_modules="(")
    with pytest.raises(PeanutError, match="feedforward_modules=3"):
        IA3Config(feedforward_modules=3)  # type: ignore[arg-type]
    narrower = IA3Config(target_modules=["c_proj"], feedforward_modules=["mlp.c_proj"])
    assert narrower.for_layer("h.0.mlp.c_proj").scales_input
    assert not narrower.for_layer("h.0.attn.c_proj").scales_input
    assert IA3Config(feedforward_modules=r"h\.\d\.mlp").for_layer("h.0.mlp").scales_input
    assert not IA3Config(feedforward_modules=r"h\.\d\.mlp").for_layer("h.0.mlp.fc").scales_input


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv"])
def test_a_gain_near_one_acts_in_half_precision(layer: str, dtype: torch.dtype, side: str, training: bool) -> None:
    """Gains near one are what training makes; bfloat16 itself knows none between 1 and 1.0078."""
    made = {
        "linear": (lambda: nn.Linear(256, 256, bias=False), (64, 256)),
        "conv1d": (lambda: Conv1D(256, 256), (64, 256)),
        "conv": (lambda: nn.Conv2d(16, 16, 3, bias=False), (8, 16, 6, 6)),
    }
    module, shape = made[layer]
    base, gains = net(module(), dtype), [1.003]
    if dtype is torch.float16:
        gains.append(0.9985)  # in bfloat16 that is less than half a step
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if side == "input" else [])
    model = get_peft_model(base, config).train(training)
    x = torch.randn(shape, dtype=dtype)
    for gain in gains:
        with torch.no_grad():
            for _, value in model.adapters.parameters("default"):
                assert value.dtype == torch.float32
                value.fill_(gain)
            with model.disable_adapter():
                plain = model(x).double()
            found = [model(x).double()]
            with model.inference():
                found += [model(x).double(), model(x).double()]
        for y in found:
            assert abs(float((y * plain).sum() / plain.square().sum()) - gain) < 4e-4


def test_grouped_convolution_is_no_feed_forward_layer() -> None:
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"])
    with pytest.raises(PeanutError, match="'layer', a convolution in 2 groups"):
        get_peft_model(net(nn.Conv2d(4, 10, 3, groups=2)), config)
